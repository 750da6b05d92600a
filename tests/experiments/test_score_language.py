"""Anybody's answers and captions, beside the references of the data set that asked."""

import json
from dataclasses import replace

import pytest

from datamodules.nuscenes import NuScenesDataConfig
from experiments.report_tables import other_tables
from experiments.result_files import read_results
from experiments.score import ScoreRequest, score
from experiments.score_language import join
from experiments.submissions import Submission, read_submission
from odvla.errors import UserError


def test_answers_are_joined_by_sample_and_question():
    truth = {
        ("a", "how many?"): {"answer": 2, "template_type": "count", "num_hop": 0},
        ("a", "moving?"): {"answer": "yes", "template_type": "exist", "num_hop": 1},
    }
    said = [
        {"sample_token": "a", "question": "how many?", "answer": "2"},
        {"sample_token": "a", "question": "how many?", "answer": "3"},
        {"sample_token": "b", "question": "how many?", "answer": "3"},
    ]
    records, counts = join(Submission(__file__, "language", records=said), truth, "qa")
    assert [(r["text"], r["reference"]) for r in records] == [("2", "2")]
    assert (counts["n_missing"], counts["extra"], counts["doubled"]) == (1, ["b"], ["a"])
    with pytest.raises(UserError, match="not one of its 1 answers belongs"):
        join(Submission(__file__, "language", records=said[2:]), truth, "qa")


def test_what_was_asked_is_told_by_the_references_not_by_the_answers(town_root, tmp_path):
    asked = json.loads(
        (town_root / "language/nuscenes_qa/NuScenes_val_questions.json").read_text()
    )["questions"]
    said = [
        {"sample_token": q["sample_token"], "question": q["question"], "answer": [str(q["answer"])]}
        for q in asked
    ]
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(said))
    found = score(ScoreRequest(path, town_root, name="mine"))
    assert found.report.numbers["language"]["question_answering"]["accuracy"] == 100.0
    assert found.report.tables[0].rows[0][0] == found.report.numbers["name"] == "mine"

    # Sentences, and no answers at all, are still answers to NuScenes-QA's questions.
    for record in said:
        record["answer"] = ["As far as I can see, I would say yes."]
    said[0]["answer"], said[1]["answer"] = None, []
    del said[2]["answer"]
    path.write_text(json.dumps(said))
    found = score(ScoreRequest(path, town_root))
    assert found.report.numbers["language"]["question_answering"]["accuracy"] == 0.0
    assert found.report.numbers["counts"]["n_empty"] == 3
    assert any(s.startswith("3 answers are empty, they count as wrong") for s in found.said)

    # One word is a poor answer to nuCaption's questions, and an answer to them.
    scenes = json.loads((town_root / "language/nucaption/val.json").read_text())
    one_word = [{**record, "answer": "car"} for record in scenes]
    path.write_text(json.dumps(one_word))
    found = score(ScoreRequest(path, town_root)).report.numbers
    assert found["language"]["captions"]["caption"]["captions"] == len(
        {(record["sample_token"], record["question"]) for record in scenes}
    )


def test_answers_whose_reference_is_empty_are_left_out(town_root, tmp_path):
    """Neither the accuracy nor its floor counts what nobody answered."""
    asked = json.loads(
        (town_root / "language/nuscenes_qa/NuScenes_val_questions.json").read_text()
    )["questions"]
    fields = ("sample_token", "question", "answer")
    path, references = tmp_path / "answers.json", tmp_path / "references.json"
    path.write_text(json.dumps([{name: one[name] for name in fields} for one in asked]))
    half = [one if number % 2 else one | {"answer": None} for number, one in enumerate(asked)]
    references.write_text(json.dumps({"questions": half}))
    found = score(ScoreRequest(path, town_root, references=references))
    numbers = found.report.numbers["language"]["question_answering"]
    assert (numbers["accuracy"], numbers["questions"]) == (100.0, len(asked) // 2)
    references.write_text(json.dumps({"questions": half[1::2]}))
    same = score(ScoreRequest(path, town_root, references=references)).report.tables
    assert found.report.tables == same
    references.write_text(json.dumps({"questions": half[::2]}))
    with pytest.raises(UserError, match="neither answers nor captions that can be scored"):
        score(ScoreRequest(path, town_root, references=references))


QA = {
    "sample_token": "a",
    "kind": "qa",
    "text": "yes",
    "reference": "yes",
    "meta": {"template_type": "exist", "num_hop": "0"},
}
DRIVELM = {
    "id": "scene_a_0",
    "sample_token": "a",
    "kind": "drivelm",
    "text": "yes",
    "reference": "yes",
    "meta": {"question": "?", "number": "0", "tags": "0"},
}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "reference": "a"}, "so its 'kind' must be one of qa, .*, not None"),
        ({**QA, "kind": "nonsense"}, "so its 'kind' must be one of qa, .*, not 'nonsense'"),
        ({**QA, "meta": {}}, r"field 'meta\.template_type' must be a text, not None"),
        ({k: v for k, v in QA.items() if k != "meta"}, r"field 'meta\.template_type' must be a"),
        ({**QA, "meta": None}, "field 'meta' must be an object, not None"),
        ({**QA, "meta": {**QA["meta"], "num_hop": "a"}}, r"'meta\.num_hop' must be of digits, not"),
        ({**QA, "sample_token": 3}, "field 'sample_token' must be a text, not 3"),
        ({**QA, "kind": "caption", "text": None}, "field 'text' must be a text, not None"),
        (
            {**QA, "kind": "caption", "reference": ["a"]},
            r"field 'reference' must be a text, not \[",
        ),
        ({**DRIVELM, "meta": {"tags": "0"}}, r"field 'meta\.question' must be a text, not None"),
        ({**DRIVELM, "meta": {**DRIVELM["meta"], "tags": [0]}}, r"'meta\.tags' must be a text"),
        ({**DRIVELM, "meta": {**DRIVELM["meta"], "tags": "x"}}, r"'meta\.tags' must be of digits"),
        (
            {"sample_token": "a", "kind": "omnidrive", "text": "a"},
            "field 'question' must be a text",
        ),
        ({"sample_token": "a", "kind": "omnidrive_plan"}, "field 'text' must be a text, not None"),
    ],
)
def test_a_record_of_ours_that_lacks_what_it_is_scored_by_is_named(tmp_path, record, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(map(json.dumps, [{**QA, "sample_token": "b"}, record])))
    with pytest.raises(UserError, match=rf"record 1 of {path}.*{message}"):
        read_submission(path)


def test_a_record_of_ours_that_comes_twice_is_named(tmp_path):
    path = tmp_path / "predictions.jsonl"
    # Several questions of a sample are none; nor is a question that was asked twice.
    fine = [{**QA, "question": "a?"}, QA, {**QA, "id": "1"}, {**QA, "id": "2"}, DRIVELM]
    path.write_text("\n".join(map(json.dumps, fine)))
    assert read_submission(path).records == fine
    path.write_text("\n".join(map(json.dumps, [*fine, {**fine[0], "text": "no"}])))
    message = rf"record 5 of {path} answers what record 0 does: sample a, question 'a\?' \(qa\)"
    with pytest.raises(UserError, match=message):
        read_submission(path)


def test_references_that_cannot_be_used_are_named(tmp_path, caplog):
    path, answers = tmp_path / "references.json", tmp_path / "answers.json"
    answers.write_text(json.dumps([{"sample_token": "a", "question": "?", "answer": "yes"}]))
    asked = {"sample_token": "a", "question": "?", "answer": "no", "template_type": "exist"}
    asked["num_hop"] = 0
    bare = {name: value for name, value in asked.items() if name != "template_type"}
    for content, message in (
        ([3], "record 0 of .* names no sample_token"),
        ({"questions": [asked, 2]}, "record 1 of .* names no sample_token"),
        ({"questions": {"a": 3}}, "record 0 of .* names no sample_token"),
        ({"questions": [bare]}, "record 0 of .*: field 'template_type' must be a text, not None"),
        ({"questions": [asked | {"num_hop": 2}]}, "record 0 of .*: field 'num_hop' must be 0 or 1"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            score(ScoreRequest(answers, tmp_path, references=path))
    path.write_text(json.dumps({"questions": [asked, asked | {"id": "again"}]}))
    found = score(ScoreRequest(answers, tmp_path, references=path)).report.numbers["language"]
    assert found["question_answering"]["questions"] == 1
    # Answered in two ways, nobody knows which one counts.
    twice = {**asked, "question": "!"}
    path.write_text(json.dumps({"questions": [asked, twice, twice | {"answer": "yes"}]}))
    found = score(ScoreRequest(answers, tmp_path, references=path)).report.numbers
    assert found["language"]["question_answering"]["questions"] == 1
    assert found["counts"]["n_missing"] == 0
    assert "answers 1 questions in several ways, and they are not scored: a '!'" in caplog.text


def test_captions_of_boxes_are_scored_against_those_of_the_annotated_boxes(town_root, tmp_path):
    """The annotations described as they are score 100; half of them misdescribed, half."""
    data = NuScenesDataConfig(root=str(town_root), version="v1.0-trainval").build()
    index = data.index
    captions = json.loads((town_root / "language" / "final_caption_bbox_token.json").read_text())
    boxes = {}
    for token, record in captions.items():
        row = index.annotation_rows[token]
        frame = index.frames[int(index.annotations.frame[row])]
        if index.scenes[frame.scene].split == "val":
            size = index.annotations.size[row].tolist()
            box = {"size": size, "caption": record["final_caption"]}
            boxes.setdefault(frame.token, []).append(box)
    one_a_frame = {token: found[:1] for token, found in boxes.items()}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"meta": {}, "results": one_a_frame}))
    found = score(ScoreRequest(path, town_root)).report.numbers
    score(ScoreRequest(path, town_root)).write(tmp_path / "out")
    (table,) = other_tables(read_results([tmp_path / "out"]))
    assert table.title == "Captions of objects"
    assert [name for name, _ in table.rows] == ["captions.json, @0.25", "captions.json, @0.5"]
    best = found["object_captions"]["0.5"]
    assert best["kept"] == best["predictions"] == len(boxes)
    assert best["scores"]["BLEU-4"] == pytest.approx(100, abs=1e-3)
    assert found["counts"]["n_missing"] == 0

    tokens = sorted(one_a_frame)
    huge = [
        {"sample_token": token, "size": [90.0, 90.0, 90.0], "caption": "a house"}
        for token in tokens
    ]
    plain = [
        {"sample_token": token, **box} for token, found in one_a_frame.items() for box in found
    ]
    path.write_text(json.dumps(plain + huge + [{**huge[0], "sample_token": "nowhere"}]))
    found = score(ScoreRequest(path, town_root)).report.numbers
    half = found["object_captions"]["0.5"]
    assert half["kept"] == half["predictions"] / 2 == len(tokens)
    assert half["scores"]["BLEU-4"] == pytest.approx(50, abs=1e-3)
    assert found["counts"]["extra"] == ["nowhere"]

    # A key-frame where nothing is annotated belongs to the split: its boxes count as not kept.
    bare = tmp_path / "bare.json"
    kept = {token: found for token, found in captions.items() if found["sample_token"] != tokens[0]}
    bare.write_text(json.dumps(kept))
    path.write_text(json.dumps(plain))
    found = score(ScoreRequest(path, town_root, references=bare)).report.numbers
    rest = found["object_captions"]["0.5"]
    assert (rest["kept"], rest["predictions"]) == (len(tokens) - 1, len(tokens))
    assert found["counts"]["n_extra"] == 0

    # References that do not fit stop the score, or are left out and named.
    odd = next(iter(captions))
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(captions | {odd: {**captions[odd], "final_caption": ""}}))
    request = ScoreRequest(path, town_root, references=broken)
    with pytest.raises(UserError, match=f"{odd}: field 'final_caption' .*--broken-captions"):
        score(request)
    said = score(replace(request, broken_captions=1)).said
    assert any(f"{odd}: field 'final_caption'" in sentence for sentence in said)
    with pytest.raises(UserError, match=r"--broken-captions must be 0 or more, not -1"):
        score(replace(request, broken_captions=-1))

    for size in ([1.0, 2.0], [1.0, 2.0, float("inf")], [1.0, 2.0, float("nan")]):
        path.write_text(json.dumps([{**plain[0], "size": size}]))
        with pytest.raises(UserError, match=r"box 0: size must be width, length and height"):
            score(ScoreRequest(path, town_root))
