"""Answers to DriveLM's questions: the challenge's files and ours, and all that can be wrong."""

import json
from itertools import pairwise

import pytest

from datamodules.drivelm import DriveLMConfig
from experiments.cli import main
from experiments.evaluation import evaluate_language
from experiments.score import ScoreRequest, score
from experiments.submissions import read_submission
from odvla.errors import UserError
from odvla.language.prompts import Dialect

TOPICS = ("perception", "prediction", "planning", "behavior")


@pytest.fixture(scope="module")
def references(town_root):
    return json.loads((town_root / "language/drivelm/test_eval.json").read_text())


def answers(content, change=lambda asked: asked["A"]):
    """The challenge's output.json."""
    found = []
    for scene, value in content.items():
        for sample, record in value["key_frames"].items():
            asked = [q for topic in TOPICS for q in record["QA"][topic]]
            found += [
                {
                    "id": f"{scene}_{sample}_{number}",
                    "question": f"<image>\n{one['Q']}",
                    "gt_answer": one["A"],
                    "answer": change(one),
                }
                for number, one in enumerate(asked)
            ]
    return found


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def request(path, town_root, **changes):
    return ScoreRequest(predictions=path, data=town_root, **changes)


def test_right_answers_are_perfect_and_the_score_is_not_called_complete(
    town_root, references, tmp_path
):
    path = write(tmp_path / "output.json", answers(references))
    found = score(request(path, town_root))
    numbers = found.report.numbers["language"]["drivelm"]
    assert numbers["accuracy"] == 100
    assert numbers["match_f1"] == pytest.approx(100, abs=1e-5)
    assert numbers["final"] is None
    assert numbers["protocol"]["chatgpt"] == "missing"
    assert (numbers["out_of_graph"], numbers["unanswered"]) == (0, 0)
    frames = len(next(iter(references.values()))["key_frames"])
    assert numbers["counted"] == {
        "accuracy": 3 * frames, "chatgpt": 3 * frames, "language": frames, "match": frames,
    }  # fmt: skip
    table, _ = found.report.tables
    cells = dict(zip(table.columns, table.rows[0][1], strict=True))
    assert (cells["ChatGPT"], cells["final"]) == ("missing", "missing")
    assert cells["known part"].endswith("of 0.5")
    assert "ChatGPT is missing" in table.note
    assert found.said == ()
    # A submission to the challenge holds the same list.
    submission = write(
        tmp_path / "submission.json", {"method": "a", "results": answers(references)}
    )
    assert score(request(submission, town_root)).report.numbers["language"] == {"drivelm": numbers}


def test_answers_that_name_no_object_lose_the_questions_about_them(town_root, references, tmp_path):
    path = write(tmp_path / "output.json", answers(references, lambda asked: "A car."))
    numbers = score(request(path, town_root)).report.numbers["language"]["drivelm"]
    frames = len(next(iter(references.values()))["key_frames"])
    # Moving status, way, action and collision ask about an object; match, safety, behavior do not.
    assert numbers["out_of_graph"] == 4 * frames
    assert numbers["accuracy"] == 0
    assert numbers["match_f1"] == 0


def test_what_does_not_fit_is_counted_and_named(town_root, references, tmp_path):
    records = answers(references)
    missing = records.pop(3)
    records.append({**records[0], "answer": "another"})
    records.append({"id": "scene_sample_0", "question": "?", "answer": "x"})
    found = score(request(write(tmp_path / "output.json", records), town_root))
    counts = found.report.numbers["counts"]
    assert counts["missing"] == [missing["id"]]
    assert counts["extra"] == ["scene_sample_0"]
    assert counts["doubled"] == [records[0]["id"]]
    assert found.report.numbers["language"]["drivelm"]["unanswered"] == 1
    assert len(found.said) == 3
    assert missing["id"] in found.said[0]
    # Key-frames without a single answer are left out.
    one = records[:3]
    found = score(request(write(tmp_path / "one.json", one), town_root))
    counts = found.report.numbers["counts"]
    assert counts["n_key_frames_unanswered"] == counts["key_frames"] - 1


def test_files_that_cannot_be_used_are_named(town_root, references, tmp_path):
    foreign = write(tmp_path / "foreign.json", [{"id": "a_b_0", "question": "?", "answer": "x"}])
    with pytest.raises(UserError, match="not one of its 1 answers belongs to a question"):
        score(request(foreign, town_root))
    path = write(tmp_path / "output.json", answers(references))
    with pytest.raises(UserError, match=r"the references are missing: there is no .*nowhere"):
        score(request(path, town_root, references=tmp_path / "nowhere.json"))
    questions = town_root / "language/drivelm/v1_1_val_nus_q_only.json"
    with pytest.raises(UserError, match="no answer to compare with; DriveLM keeps those of val"):
        score(request(path, town_root, references=questions))
    untagged = town_root / "language/drivelm/v1_1_train_nus.json"
    train = write(tmp_path / "train.json", answers(json.loads(untagged.read_text())))
    with pytest.raises(UserError, match="its tags must be some of 0, 1, 2, 3"):
        score(request(train, town_root, references=untagged))
    scene = next(iter(references))
    sample = next(iter(references[scene]["key_frames"]))
    for change, message in (
        ({"QA": None}, "field 'QA' must be an object of perception, .*, not None"),
        ({"QA": []}, r"field 'QA' must be an object of perception, .*, not \[\]"),
        ({"QA": {"Perception": []}}, r"field 'QA' must be an object of .*, not \['Perception'\]"),
        ({"QA": {"planning": None}}, r"field 'QA\.planning' must be a list of questions"),
        ({"QA": {"planning": {"a": 1}}}, r"field 'QA\.planning' must be a list of questions"),
        ({"QA": {"planning": [{"Q": "?", "A": "a", "tag": 3}]}}, "field 'tag' must be a list of 0"),
        ({"QA": {"planning": [{"A": "a", "tag": [0]}]}}, "field 'Q' must be a text, not None"),
    ):
        odd = {scene: {"key_frames": {sample: change}}}
        with pytest.raises(UserError, match=message) as told:
            score(request(path, town_root, references=write(tmp_path / "odd.json", odd)))
        assert sample in str(told.value)
    twice = write(tmp_path / "twice.json", {**references, "other": references[scene]})
    with pytest.raises(UserError, match=rf"scene other, sample {sample}: another scene has the"):
        score(request(path, town_root, references=twice))
    broken = write(tmp_path / "broken.json", [{"id": "a_b_0", "answer": 3}])
    with pytest.raises(UserError, match=r"record 0 of .* must have an id and an answer"):
        score(request(broken, town_root))


def test_answers_to_other_questions_are_refused(town_root, references, tmp_path):
    records = answers(references)
    first, later = records[0], records[3]
    said = [*records[:3], {**later, "question": first["question"]}, *records[4:]]
    path = write(tmp_path / "output.json", said)
    with pytest.raises(UserError, match=rf"1 answers are to other questions .*: {later['id']}; "):
        score(request(path, town_root))
    # Ids that are one off.
    shifted = [{**one, "id": two["id"]} for one, two in pairwise(records)]
    with pytest.raises(UserError, match=rf"answers are to other questions .*: {records[1]['id']}"):
        score(request(write(path, shifted), town_root))


def test_empty_answers_count_as_wrong_and_are_named(town_root, references, tmp_path):
    records = answers(references)
    records[0]["answer"], records[5]["answer"] = "", " "
    found = score(request(write(tmp_path / "output.json", records), town_root))
    names = [records[0]["id"], records[5]["id"]]
    assert found.said == (f"2 answers are empty, they count as wrong: {', '.join(names)}",)
    assert found.report.numbers["counts"]["empty"] == names


def ours(town_root, file, text):
    """predictions.jsonl of the instruction stage."""
    files = ("drivelm/v1_1_train_nus.json", file)
    config = DriveLMConfig(str(town_root), "v1.0-trainval", drivelm_files=files)
    return [
        {
            "id": c.id,
            "sample_token": c.sample_token,
            "kind": c.kind,
            "question": c.meta["question"],
            "text": text(c),
            "reference": c.reference,
            "meta": c.meta,
        }
        for c in config.build(dialect=Dialect("compact")).conversations("val")
    ]


def test_our_own_predictions_are_scored_the_same(town_root, references, tmp_path):
    """With answers in the file, by the stage's evaluation; without, beside the references."""

    def said(conversation):
        return f"I see {conversation.meta['question'][-40:]}"

    records = ours(town_root, "drivelm/test_eval.json", said)
    by_id = {record["id"]: record["text"] for record in records}
    theirs = answers(references)
    for record in theirs:
        record["answer"] = by_id[record["id"]]
    path = write(tmp_path / "output.json", theirs)
    expected = score(request(path, town_root)).report.numbers["language"]["drivelm"]
    tables, numbers = evaluate_language(records, "instruction")
    assert numbers["drivelm"] == expected
    titles = [table.title for table in tables]
    assert titles == ["DriveLM", "DriveLM, language", "Captions after instruction"]
    held_back = ours(town_root, "drivelm/v1_1_val_nus_q_only.json", said)
    lines = tmp_path / "predictions.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in held_back))
    assert read_submission(lines).kind == "language"
    assert score(request(lines, town_root)).report.numbers["language"]["drivelm"] == expected
    (table,), numbers = evaluate_language(held_back, "instruction")
    assert numbers == {}
    assert f"{len(held_back)} answers; the file of questions holds" in table.note


def test_a_key_frame_that_was_not_asked_its_first_question_found_nothing(town_root):
    records = ours(town_root, "drivelm/test_eval.json", lambda c: c.reference)
    later = [record for record in records if record["meta"]["number"] != "0"]
    _, numbers = evaluate_language(later, "instruction")
    frames = len({record["sample_token"] for record in records})
    assert numbers["drivelm"]["unanswered"] == frames
    assert numbers["drivelm"]["out_of_graph"] == 4 * frames


def test_answers_beside_others_that_cannot_be_scored_are_named(town_root, tmp_path):
    held_back = ours(town_root, "drivelm/v1_1_val_nus_q_only.json", lambda c: "Yes.")
    told = {**held_back[0], "kind": "caption", "reference": "A road.", "meta": {}}
    lines = tmp_path / "predictions.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in [*held_back, told]))
    found = score(request(lines, town_root))
    assert f"{len(held_back)} answers have an empty reference" in found.said[0]


def test_the_command_line_prints_the_terms(town_root, references, tmp_path, capsys):
    path = write(tmp_path / "output.json", answers(references))
    out = tmp_path / "scores"
    assert main(["score", str(path), "--data", str(town_root), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "DriveLM" in printed
    assert "missing" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["language"]["drivelm"]["final"] is None
    assert len(results["samples"]) == len(answers(references))
    # The page of results takes it.
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| output.json | 100.0 | 100.0 |" in page
