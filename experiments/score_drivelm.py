"""Score answers to DriveLM's questions: a file of the challenge's form, or ours.

The challenge's output.json is a list of {id, question, answer, (gt_answer)}; its submission.json
holds that list as its "results". An id is <scene>_<sample>_<number>, the number counted through a
key-frame's perception, prediction, planning and behavior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.drivelm import TOPICS, key_frames
from datamodules.language_files import read_json
from experiments.report import Report, ResultTable
from experiments.submissions import Submission, answer_counts, named
from odvla.errors import UserError
from odvla.metrics.drivelm import LANGUAGE, TAGS, DriveLMAnswer, DriveLMScores, score_drivelm

if TYPE_CHECKING:
    from experiments.score import Found, ScoreRequest

Record = dict[str, Any]
KIND = "drivelm"
# What the challenge calls its questions with answers; the published ones of val have none.
REFERENCES = "drivelm/test_eval.json"


def is_drivelm(records: Sequence[Record]) -> bool:
    """Whether all records answer DriveLM's questions: ours, or the challenge's."""
    return all(
        record["kind"] == KIND
        if "kind" in record
        else "id" in record and "answer" in record and "sample_token" not in record
        for record in records
    )


def scored_by_itself(record: Record) -> bool:
    """Whether a record of ours brings what its answer is scored by: a reference and tags."""
    return bool(record.get("reference")) and bool(record.get("meta", {}).get("tags"))


def evaluate_drivelm(records: Sequence[Record]) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """Tables and numbers of our records that bring references and tags.

    None without DriveLM's questions; where their answers are held back, a table says so.
    """
    answers = [record for record in records if record["kind"] == KIND]
    asked = [record for record in answers if scored_by_itself(record)]
    if answers and not any(record["reference"] for record in answers):
        note = (
            f"{len(answers)} answers; the file of questions holds the right ones back. Predictions "
            "are scored beside a file that has them: score predictions.jsonl --references FILE."
        )
        return (ResultTable("DriveLM", ("final",), (("OpenDriveVLA", ("missing",)),), note),), {}
    frames: dict[str, list[Record]] = {}
    for record in asked:
        frames.setdefault(record["sample_token"], []).append(record)
    if not frames:
        return (), {}
    scores = score_drivelm(_own_answers(found) for found in frames.values())
    return drivelm_tables(scores, "OpenDriveVLA"), {KIND: numbers_of(scores)}


def _own_answers(records: Sequence[Record]) -> list[DriveLMAnswer]:
    """Questions of one key-frame, in their order."""
    ordered = sorted(records, key=lambda record: int(record["meta"]["number"]))
    answers = [
        DriveLMAnswer(
            question=record["meta"]["question"],
            reference=record["reference"],
            answer=record["text"],
            tags=tuple(int(tag) for tag in record["meta"]["tags"].split()),
            name=record["id"],
        )
        for record in ordered
    ]
    if ordered[0]["meta"]["number"] != "0":
        # The question that sets the graph was not asked: nothing was found.
        answers.insert(0, DriveLMAnswer("", "", None, (LANGUAGE,)))
    return answers


def score_answers_of_drivelm(request: ScoreRequest, submission: Submission) -> Found:
    """Answers of a file against the questions with answers of another one.

    Raises:
        UserError: the references are missing or do not fit, no answer belongs to them, or some
            are to other questions.
    """
    from experiments.score import Found

    path = request.references or Path(request.data) / "language" / REFERENCES
    if not path.is_file():
        raise UserError(
            f"the references are missing: there is no {path}; name a file of questions with "
            "answers and tags, as DriveLM's extract_data.py and convert_data.py make it, with "
            "--references"
        )
    records, doubled = _answers(submission)
    answers = {name: _text(record) for name, record in records.items()}
    frames = _frames(read_json(path), path, answers)
    asked = [one for questions in frames.values() for one in questions]
    _refuse_others_questions(records, asked, submission.path, path)
    known = {one.name for one in asked}
    extra = [name for name in answers if name not in known]
    answered = {
        sample: questions
        for sample, questions in frames.items()
        if any(one.answer is not None for one in questions)
    }
    if not answered:
        raise UserError(
            f"{submission.path}: not one of its {len(answers)} answers belongs to a question of "
            f"{path}, e.g. {extra[0]}"
        )
    scores = score_drivelm(answered.values())
    missing = [one.name for one in asked if one.answer is None]
    empty = [one.name for one in asked if one.answer is not None and not one.answer.strip()]
    counts = {
        **answer_counts(
            len(submission.records),
            len(known),
            len(answers) - len(extra),
            missing=missing,
            extra=extra,
            doubled=doubled,
        ),
        "n_empty": len(empty),
        "empty": empty,
        "key_frames": len(frames),
        "n_key_frames_unanswered": len(frames) - len(answered),
    }
    said = [
        f"{len(names)} {sentence}: {named(names)}"
        for names, sentence in (
            (missing, "questions have no answer"),
            (extra, "answers have no question"),
            (doubled, "questions are answered more than once, the first counts"),
            (empty, "answers are empty, they count as wrong"),
        )
        if names
    ]
    numbers = {
        "name": request.planner,
        "predictions": str(submission.path),
        "data": str(request.data),
        "references": str(path),
        "language": {KIND: numbers_of(scores)},
        "counts": counts,
    }
    samples = [
        {
            "sample_token": sample,
            "id": one.name,
            "question": one.question,
            "text": one.answer,
            "reference": one.reference,
        }
        for sample, questions in answered.items()
        for one in questions
    ]
    tables = drivelm_tables(scores, request.planner)
    return Found(Report(request.planner, tables, numbers), tuple(said), samples)


def drivelm_tables(scores: DriveLMScores, name: str) -> tuple[ResultTable, ...]:
    """The terms of the final score that can be had and that it cannot, and the parts of one."""
    known = scores.known_part
    cells = (
        *(scores.accuracy, scores.match_f1, scores.language),
        "missing",
        "-" if known is None else f"{known:.3f} of 0.5",
        "missing",
    )
    counted = scores.counted
    terms = ResultTable(
        title="DriveLM",
        columns=("accuracy", "match F1", "language", "ChatGPT", "known part", "final"),
        rows=((name, cells),),
        note=f"Questions that count: {counted['accuracy']} by accuracy, {counted['match']} by "
        f"match, {counted['language']} by language, {counted['chatgpt']} by ChatGPT alone; "
        f"{scores.out_of_graph} are out of the graph, {scores.unanswered} unanswered. "
        f"{scores.protocol.sentence()} Times 100; the known part is 0.2 accuracy + 0.2 language + "
        "0.1 match F1 of the final score (0..1).",
        digits=1,
    )
    captions = scores.captions
    if captions is None:
        return (terms,)
    parts = ResultTable(
        title="DriveLM, language",
        columns=("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "n"),
        rows=((name, (*captions.bleu, captions.rouge_l, captions.cider, str(captions.captions))),),
        note="pycocoevalcap, its tokenizer in Python, one reference each, x 100.",
        digits=1,
    )
    return terms, parts


def numbers_of(scores: DriveLMScores) -> dict[str, Any]:
    """For results.json."""
    return {
        **asdict(scores),
        "known_part": scores.known_part,
        "final": None,
        "protocol": scores.protocol.as_dict(),
    }


def _text(record: Record) -> Any:
    return record.get("text", record.get("answer"))


def _answers(submission: Submission) -> tuple[dict[str, Record], list[str]]:
    """Records by id, the first where one comes twice; ids that do."""
    answers: dict[str, Record] = {}
    doubled = []
    for number, record in enumerate(submission.records):
        name, text = record.get("id"), _text(record)
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(
                f"record {number} of {submission.path} must have an id and an answer that are "
                f"texts, not {name!r} and {text!r}"
            )
        if name in answers:
            doubled.append(name)
        answers.setdefault(name, record)
    return answers, doubled


def _refuse_others_questions(
    answers: Mapping[str, Record], asked: Sequence[DriveLMAnswer], path: Path, references: Path
) -> None:
    """Stop where answers name another question than their id does."""
    found = []
    for one in asked:
        told = str(answers.get(one.name, {}).get("question") or "")
        told, known = " ".join(told.split()), " ".join(one.question.split())
        # A prompt may add to a question, an image's place or options, or be its last line.
        if told not in known and known not in told:
            found.append((one.name, told, known))
    if found:
        name, told, known = found[0]
        raise UserError(
            f"{path}: {len(found)} answers are to other questions than {references} has under "
            f"their ids: {named(name for name, *_ in found)}; {name} answers {told!r}, not "
            f"{known!r}"
        )


def _frames(content: Any, path: Path, answers: Mapping[str, str]) -> dict[str, list[DriveLMAnswer]]:
    """Questions by sample token, references and answers as the strings they are."""
    frames: dict[str, list[DriveLMAnswer]] = {}
    for scene, sample, record in key_frames(content, path):
        where = f"{path}, scene {scene}, sample {sample}"
        questions: list[DriveLMAnswer] = []
        topics = record.get("QA")
        if not isinstance(topics, Mapping) or not set(topics) <= set(TOPICS):
            raise UserError(
                f"{where}: field 'QA' must be an object of {', '.join(TOPICS)}, not "
                f"{list(topics) if isinstance(topics, Mapping) else topics!r}"
            )
        if sample in frames:
            raise UserError(f"{where}: another scene has the sample, too")
        for topic in TOPICS:
            found = topics.get(topic, [])
            if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
                raise UserError(f"{where}: field 'QA.{topic}' must be a list of questions")
            for asked in found:
                name = f"{scene}_{sample}_{len(questions)}"
                question, tags = asked.get("Q"), asked.get("tag") or []
                if not isinstance(question, str) or not question.strip():
                    raise UserError(f"{path}, {name}: field 'Q' must be a text, not {question!r}")
                if not isinstance(tags, list) or any(tag not in TAGS for tag in tags):
                    raise UserError(
                        f"{path}, {name}: field 'tag' must be a list of "
                        f"{', '.join(map(str, TAGS))}, not {tags!r}"
                    )
                reference = asked.get("A")
                if not reference or not isinstance(reference, str):
                    raise UserError(
                        f"{path}, {name}: the question has no answer to compare with; DriveLM "
                        "keeps those of val to itself"
                    )
                questions.append(
                    DriveLMAnswer(
                        question=question,
                        reference=reference,
                        answer=answers.get(name),
                        tags=tuple(tags),
                        name=name,
                    )
                )
        frames[sample] = questions
    return frames
