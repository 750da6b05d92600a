"""Score answers and captions: ours, which bring their references, or anybody's beside a file.

| records | references |
|---|---|
| ours (kind, text, reference) | in the records |
| NuScenes-QA: sample_token, question, answer or prediction | its questions file |
| nuCaption: sample_token, question, answer or prediction | its file |
| nuX: sample_token -> narration, reasoning | its file |
| DriveLM: id, question, answer | drivelm/test_eval.json (score_drivelm.py) |
| OmniDrive's plans: sample_token, text with [PT, ...] | the driven paths (score_omnidrive.py) |
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.language_files import read_json
from experiments.evaluation import evaluate_language
from experiments.report import Report, ResultTable
from experiments.score_drivelm import is_drivelm, score_answers_of_drivelm, scored_by_itself
from experiments.score_omnidrive import KIND as PLAN_KIND
from experiments.score_omnidrive import TEXT_KIND, score_omnidrive_plans, with_references
from experiments.submissions import Submission, answer_counts, named, unwrapped
from odvla.errors import UserError

if TYPE_CHECKING:
    from experiments.score import Found, ScoreRequest

log = logging.getLogger(__name__)

Record = dict[str, Any]
BERT_LAYERS = {"bert-base-uncased": 9, "roberta-large": 17}
FILES = {
    "qa": ("nuscenes_qa/NuScenes_{}_questions.json", "questions"),
    "narration": ("nux/Nu_X_{}.json", None),
    "caption": ("nucaption/{}.json", None),
}


def score_language(request: ScoreRequest, submission: Submission) -> Found:
    """Answers and captions of a file.

    Raises:
        UserError: references are missing, or nothing fits them.
    """
    from experiments.score import Found

    records = submission.records
    plans = [record for record in records if record.get("kind") == PLAN_KIND]
    if plans:
        return _with_plans(request, submission, plans)
    own = request.references is None and any(scored_by_itself(record) for record in records)
    if is_drivelm(records) and not own:
        return score_answers_of_drivelm(request, submission)
    said: list[str] = []
    counts: dict[str, Any] = {}
    if not all("reference" in record and "text" in record for record in records):
        if all(record.get("kind") == TEXT_KIND for record in records):
            records, counts = with_references(request, records, submission.path)
        else:
            kind, truth = kind_and_references(request, submission)
            records, counts = join(submission, truth, kind)
        for name, sentence in (
            ("missing", "references have no answer"),
            ("extra", "answers have no reference"),
            ("doubled", "answers come more than once, the first counts"),
        ):
            if counts.get(name):
                said.append(f"{len(counts[name])} {sentence}: {named(counts[name])}")
    scored = [record for record in records if record["reference"]]
    empty = [_name(record) for record in scored if not record["text"].strip()]
    if empty:
        said.append(f"{len(empty)} answers are empty, they count as wrong: {named(empty)}")
    alone = [_name(record) for record in records if not record["reference"]]
    if alone:
        said.append(
            f"{len(alone)} answers have an empty reference, and are not scored: {named(alone)}"
        )
    tables, numbers = evaluate_language(
        records, submission.path.name, planner=request.planner, meteor=True
    )
    if not tables:
        raise UserError(f"{submission.path} holds neither answers nor captions that can be scored")
    if request.bert is not None:
        table, scores = _bert(request.bert, scored)
        tables, numbers = (*tables, table), {**numbers, "bert_score": scores}
    found = {
        "name": request.planner,
        "predictions": str(submission.path),
        "data": str(request.data),
        "split": request.split,
        "language": numbers,
        "counts": counts,
    }
    return Found(Report(request.planner, tables, found), tuple(said), records)


def _name(record: Record) -> str:
    return str(record.get("id") or record["sample_token"])


def _with_plans(request: ScoreRequest, submission: Submission, plans: list[Record]) -> Found:
    """OmniDrive's plans under a planning protocol, and the other answers as answers."""
    from experiments.score import Found

    others = [record for record in submission.records if record.get("kind") != PLAN_KIND]
    if not others:
        return score_omnidrive_plans(request, submission, plans)
    told = score_language(request, replace(submission, records=others))
    try:
        planned = score_omnidrive_plans(request, submission, plans)
    except UserError as error:  # the other answers count all the same
        return replace(told, said=(*told.said, f"its {len(plans)} plans are not scored: {error}"))
    report = replace(
        planned.report,
        tables=(*planned.report.tables, *told.report.tables),
        numbers={**told.report.numbers, **planned.report.numbers},
    )
    return Found(report, (*planned.said, *told.said), [*planned.samples, *told.samples])


def kind_and_references(
    request: ScoreRequest, submission: Submission
) -> tuple[str, dict[tuple[str, str], Record]]:
    """What was asked, and its references by (sample token, question).

    NuScenes-QA and nuCaption both have questions. Which of the two was answered is told by the
    references that know the questions, not by the answers: those may be poor.

    Raises:
        UserError: no references are there, or the records are neither answers nor captions.
    """
    first = submission.records[0]
    if "question" not in first:
        if not {"narration", "reasoning", "text"} & set(first):
            raise UserError(
                f"{submission.path}: its records have neither a question nor a narration, and no "
                "reference of their own"
            )
        return "narration", references(request, "narration")
    keys = {key for key, _ in _keyed(submission.records, submission.path)}
    found: dict[str, dict[tuple[str, str], Record]] = {}
    for kind in ("qa", "caption"):
        if request.references is None:
            known = _reference_path(request, kind).is_file()
        else:
            known = kind == _kind_of_references(request.references)
        if known:
            found[kind] = references(request, kind)
    if not found:
        references(request, "qa")  # says which file is missing
    kind = max(found, key=lambda name: len(keys & set(found[name])))
    return kind, found[kind]


def _kind_of_references(path: Path) -> str:
    if not path.is_file():
        return "qa"
    content = read_json(path)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return "qa" if "template_type" in content[0] else "caption"
    return "qa"


def _reference_path(request: ScoreRequest, kind: str) -> Path:
    pattern, _ = FILES[kind]
    return request.references or Path(request.data) / "language" / pattern.format(request.split)


def references(request: ScoreRequest, kind: str) -> dict[tuple[str, str], Record]:
    """References by (sample token, question).

    Raises:
        UserError: the file is missing or does not hold what it should.
    """
    _, inside = FILES[kind]
    path = _reference_path(request, kind)
    if not path.is_file():
        raise UserError(
            f"the references are missing: there is no {path}; name the file with --references"
        )
    content = read_json(path)
    if inside is not None and not isinstance(content, list):
        content = content.get(inside) if isinstance(content, Mapping) else None
    if isinstance(content, Mapping):
        content = [
            {"sample_token": token, **value} if isinstance(value, Mapping) else value
            for token, value in content.items()
        ]
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} holds no references of the kind that {kind!r} needs")
    found: dict[tuple[str, str], Record] = {}
    unclear: set[tuple[str, str]] = set()
    for number, (key, record) in enumerate(_keyed(content, path)):
        if kind == "qa":
            _check_question(record, f"record {number} of {path}")
        # Asked twice, it is one question; answered in two ways, nobody knows which one counts.
        if _of_nux(found.setdefault(key, record)) != _of_nux(record):
            unclear.add(key)
    if unclear:
        log.warning(
            "%s answers %d questions in several ways, and they are not scored: %s",
            path,
            len(unclear),
            named(f"{token} {question!r}" for token, question in sorted(unclear)),
        )
    return {key: record for key, record in found.items() if key not in unclear}


def _check_question(record: Record, where: str) -> None:
    """Stop where a question of NuScenes-QA lacks what its answers are grouped by."""
    template, hops = record.get("template_type"), record.get("num_hop")
    if not isinstance(template, str):
        raise UserError(f"{where}: field 'template_type' must be a text, not {template!r}")
    if not isinstance(hops, int | str) or str(hops) not in ("0", "1"):
        raise UserError(f"{where}: field 'num_hop' must be 0 or 1, not {hops!r}")


def join(
    submission: Submission, truth: Mapping[tuple[str, str], Record], kind: str
) -> tuple[list[Record], dict[str, Any]]:
    """Answers beside their references, and what did not fit.

    Raises:
        UserError: no answer has a reference.
    """
    answers: dict[tuple[str, str], Record] = {}
    doubled: list[str] = []
    for key, record in _keyed(submission.records, submission.path):
        if key in answers:
            doubled.append(key[0])
        answers.setdefault(key, record)
    records: list[Record] = []
    for key, record in answers.items():
        if key not in truth:
            continue
        reference = truth[key]
        meta = {
            name: str(reference[name]) for name in ("template_type", "num_hop") if name in reference
        }
        if kind == "narration":
            texts = [_of_nux(record), _of_nux(reference)]
        else:
            texts = [_answer(record), _answer(reference)]
        records.append(
            {
                "sample_token": key[0],
                "kind": kind,
                "question": key[1],
                "text": texts[0],
                "reference": texts[1],
                "meta": meta,
            }
        )
    extra = [key[0] for key in answers if key not in truth]
    if not records:
        raise UserError(
            f"{submission.path}: not one of its {len(answers)} answers belongs to a reference, "
            f"e.g. that of sample {extra[0]}"
        )
    missing = [key[0] for key in truth if key not in answers]
    empty = [r["sample_token"] for r in records if not r["text"].strip()]
    counts = answer_counts(
        len(submission.records),
        len(truth),
        len(records),
        missing=missing,
        extra=extra,
        doubled=doubled,
    )
    return records, {**counts, "n_empty": len(empty), "empty": empty}


def _keyed(records: Sequence[Any], path: Path) -> Iterator[tuple[tuple[str, str], Record]]:
    """Records, each with its sample token and its question."""
    for number, record in enumerate(records):
        token = record.get("sample_token") if isinstance(record, Mapping) else None
        if not isinstance(token, str):
            raise UserError(f"record {number} of {path} names no sample_token")
        yield (token, str(record.get("question", ""))), record


def _answer(record: Record) -> str:
    """The text of an answer, "" where there is none; the reference writes a list of one text."""
    for name in ("prediction", "pred", "text", "answer"):
        if name in record:
            value = unwrapped(record[name])
            return "" if value is None or value == [] else str(value)
    return ""


def _of_nux(record: Record) -> str:
    """Narration and reasoning as one text that `split_nux` takes apart again; else the answer."""
    if not {"narration", "reasoning"} & set(record):
        return _answer(record)
    narration, reasoning = (record.get(name) or "" for name in ("narration", "reasoning"))
    return f"{narration} Reasoning: {reasoning}" if narration or reasoning else ""


def _bert(folder: Path, records: list[Record]) -> tuple[ResultTable, dict[str, Any]]:
    from odvla.metrics.bertscore import bert_score

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    layers = int(config.get("num_hidden_layers", 12))
    layer = BERT_LAYERS.get(folder.name, layers)
    captions = [record for record in records if record["kind"] != "qa"] or records
    scores = bert_score(
        [record["text"] for record in captions],
        [record["reference"] for record in captions],
        folder,
        layer,
    )
    table = ResultTable(
        title="BERTScore",
        columns=("precision", "recall", "F1"),
        rows=((scores.model, (scores.precision, scores.recall, scores.f1)),),
        note=f"{len(captions)} texts, layer {scores.layer}, not rescaled, x 100.",
        digits=1,
    )
    return table, asdict(scores)
