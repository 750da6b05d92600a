"""OmniDrive's plans and answers, from our predictions and from its own folder of results."""

import json

import numpy as np
import pytest

from datamodules.omnidrive import PLAN_QUESTION, OmniDriveConfig
from datamodules.rear_axle import rear_axle_future
from experiments.evaluation import evaluate_language
from experiments.score import ScoreRequest, score
from experiments.score_omnidrive import evaluate_omnidrive_plans
from odvla.errors import UserError
from odvla.language.omnidrive_plan import format_rear_axle_plan
from odvla.language.prompts import Dialect


@pytest.fixture(scope="module")
def data(town_root):
    config = OmniDriveConfig(str(town_root), "v1.0-trainval", image_size=(16, 9))
    return config.build(dialect=Dialect("compact"))


def predictions(data, change=lambda conversation: conversation.reference):
    return [
        {
            "id": c.id,
            "sample_token": c.sample_token,
            "kind": c.kind,
            "question": c.meta["question"],
            "text": change(c),
            "reference": c.reference,
            "meta": c.meta,
        }
        for c in data.conversations("val")
    ]


def off_by(data, ahead_m, left_m):
    """Plans that miss the driven way by so much at every step."""

    def text(conversation):
        if conversation.kind != "omnidrive_plan":
            return conversation.reference
        points, _ = rear_axle_future(data.index, data.index.frame(conversation.sample_token))
        return (
            f"Drive [PT, {format_rear_axle_plan(points + np.array([ahead_m, left_m]))[5:]}, please."
        )

    return text


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def request(path, town_root, **changes):
    return ScoreRequest(predictions=path, data=town_root, beyond=False, **changes)


def test_an_error_of_the_rear_axle_is_that_error_in_the_table(data, town_root, tmp_path):
    """3 m ahead and 4 m to the left are 5 m at every second, whatever way the car turned."""
    path = write_lines(tmp_path / "p.jsonl", predictions(data, off_by(data, 3.0, 4.0)))
    found = score(request(path, town_root))
    planning = found.report.numbers["planning"]
    assert list(planning) == ["omnidrive"]
    # Texts have two decimals, and what rounds to a centimetre is 0.
    np.testing.assert_allclose(planning["omnidrive"]["l2_steps_m"], 5.0, atol=0.012)
    whole = sum(frame.kind == "omnidrive_plan" for frame in data.conversations("val"))
    assert planning["omnidrive"]["n_samples"] == whole
    card = planning["omnidrive"]["card"]
    assert (card["samples"], card["unreadable"]) == ("complete_only", "left_out")
    # The texts beside the plans are scored, too.
    assert found.report.numbers["language"]["captions"]["omnidrive"]["rouge_l"] == pytest.approx(
        100
    )
    titles = [table.title for table in found.report.tables]
    assert titles[0].startswith("Planning, omnidrive")
    assert "Captions" in titles[-1]


def test_the_pipeline_has_the_same_numbers(data, town_root, tmp_path):
    records = predictions(data, off_by(data, 0.0, 1.0))
    path = write_lines(tmp_path / "p.jsonl", records)
    tables, numbers = evaluate_omnidrive_plans(data, records, path)
    scored = score(request(path, town_root)).report.numbers["planning"]["omnidrive"]
    assert numbers["omnidrive_plan"]["omnidrive"]["l2_steps_m"] == scored["l2_steps_m"]
    assert len(tables) == 2  # the plans, and how often they leave the road
    _, told = evaluate_language(records, "instruction")
    assert list(told["captions"]) == ["omnidrive"]
    only_texts = [record for record in records if record["kind"] == "omnidrive"]
    assert evaluate_omnidrive_plans(data, only_texts, path) == ((), {})
    mute = [{**record, "text": "I slow down."} for record in records]
    tables, numbers = evaluate_omnidrive_plans(data, mute, path)
    assert "not one of 34 plans can be read (34: no [PT" in tables[0].note
    assert sum(numbers["omnidrive_plan"]["unreadable"].values()) > 0


def write_folder(folder, records):
    """What OmniDrive's test writes: a file a sample, named by its token."""
    folder.mkdir()
    by_token = {}
    for record in records:
        by_token.setdefault(record["sample_token"], []).append(
            {"Q": record["question"], "A": [record["text"]]}
        )
    for token, content in by_token.items():
        (folder / token).write_text(json.dumps(content))
    return folder


def test_omnidrive_s_own_folder_is_read(data, town_root, tmp_path):
    records = predictions(data, off_by(data, 3.0, 4.0))
    records = [r for r in records if r["meta"]["part"] in ("planning", "vqa", "conv")]
    folder = write_folder(tmp_path / "results", records)
    found = score(request(folder, town_root))
    np.testing.assert_allclose(
        found.report.numbers["planning"]["omnidrive"]["l2_steps_m"], 5.0, atol=0.012
    )
    captions = found.report.numbers["language"]["captions"]["omnidrive"]
    assert captions["rouge_l"] == pytest.approx(100)
    assert captions["captions"] == sum(r["kind"] == "omnidrive" for r in records)


def test_what_does_not_fit_is_counted_and_named(data, town_root, tmp_path):
    plans = [r for r in predictions(data) if r["kind"] == "omnidrive_plan"]
    plans[0]["text"] = "I slow down."
    plans[1]["text"] = "[PT, (+1.00, 0.0)]"
    plans.append(plans[2])
    plans.append({**plans[2], "sample_token": "nobody"})
    found = score(request(write_lines(tmp_path / "p.jsonl", plans), town_root))
    counts = found.report.numbers["counts"]
    assert (counts["n_unusable"], counts["n_doubled"], counts["n_extra"]) == (2, 1, 1)
    assert any("1 texts hold no plan: no [PT" in sentence for sentence in found.said)
    assert any("1 points instead of 6" in sentence for sentence in found.said)
    answers = [r for r in predictions(data) if r["kind"] == "omnidrive"]
    found = score(request(write_lines(tmp_path / "mute.jsonl", [plans[0], *answers]), town_root))
    assert found.said == (
        f"its 1 plans are not scored: {tmp_path / 'mute.jsonl'}: not one of its 1 plans can be "
        "used; the commonest reason: its own text could not be read",
    )
    assert "captions" in found.report.numbers["language"]
    folder = write_folder(tmp_path / "results", [{**r, "question": "Why?"} for r in answers])
    with pytest.raises(UserError, match=r"not one of its \d+ answers belongs to a question of"):
        score(request(folder, town_root))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other is empty"):
        score(request(tmp_path / "other", town_root))
    (tmp_path / "other" / "token").write_text("{}")
    with pytest.raises(UserError, match=r'token must hold a list of \{"Q"'):
        score(request(tmp_path / "other", town_root))
    lines = write_lines(tmp_path / "q.jsonl", plans[2:4])
    with pytest.raises(UserError, match="--frame ego is for plans of numbers alone"):
        score(request(lines, town_root, frame="ego"))


def test_other_protocols_may_be_asked_for(data, town_root, tmp_path):
    plans = [r for r in predictions(data) if r["kind"] == "omnidrive_plan"]
    assert {r["question"] for r in plans} == {PLAN_QUESTION}
    path = write_lines(tmp_path / "p.jsonl", plans)
    found = score(request(path, town_root, protocols=("vad", "omnidrive")))
    planning = found.report.numbers["planning"]
    assert set(planning) == {"vad", "omnidrive"}
    for numbers in planning.values():
        assert max(numbers["l2_steps_m"]) < 0.012


def test_leaving_the_road_is_counted_as_omnidrive_does(data, town_root, tmp_path):
    """Plans 30 m to the left of the way are off most roads; the way itself is not."""
    path = write_lines(tmp_path / "p.jsonl", predictions(data, off_by(data, 0.0, 30.0)))
    found = score(request(path, town_root))
    boundary = found.report.numbers["boundary"]
    count = found.report.numbers["planning"]["omnidrive"]["n_samples"]
    assert boundary["samples"] + boundary["without_map"] == count
    planned, driven = boundary[path.name], boundary["driven path"]
    assert planned["boundary_1s"] > 0.5
    assert planned["boundary_1s"] <= planned["boundary_2s"] <= planned["boundary_3s"] <= 1
    assert driven["boundary_3s"] < 0.1
    table = next(t for t in found.report.tables if t.title.startswith("Off the drivable"))
    assert table.rows[0][1][0] == pytest.approx(100 * planned["boundary_1s"])
    plain = write_lines(tmp_path / "plain.jsonl", predictions(data))
    same = score(request(plain, town_root)).report.numbers["boundary"]
    assert same[plain.name] == pytest.approx(same["driven path"], abs=0.05)
    _, told = evaluate_omnidrive_plans(data, predictions(data), tmp_path)
    assert told["omnidrive_plan"]["boundary"]["driven path"] == driven
