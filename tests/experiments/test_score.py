"""Anybody's plans: formats, and everything that can be wrong with them."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.nuscenes import EvaluationFrame, NuScenesDataConfig
from experiments.cli import main
from experiments.plan_submission import FRAMES, plan_set
from experiments.planning_scores import (
    PlanSet,
    paired_scores,
    planning_tables,
    sample_records,
    score_planners,
)
from experiments.planning_truth import GroundTruthCheck, PlanningTruth
from experiments.report import without_nan
from experiments.report_plots import all_plots
from experiments.result_files import compare, read_results
from experiments.result_files import planning_tables as result_tables
from experiments.score import ScoreRequest, score
from experiments.submissions import read_submission
from odvla.errors import UserError
from odvla.language.waypoints import format_waypoints
from odvla.metrics.collisions import Traffic
from odvla.metrics.protocol import PRESETS
from odvla.types import EgoState, PlanTargets

TOKENS = [f"{number:032x}" for number in range(12)]


class Bends:
    """A data module's stand-in: twelve cars in three scenes that drive bends on an empty road."""

    config = NuScenesDataConfig(root="/nowhere")

    def evaluation_frames(self, split, *, height_m=0.0):
        for number, token in enumerate(TOKENS):
            angle = torch.linspace(0.05, 0.3, 6) * (1 + number % 3)
            way = 3.0 * torch.arange(1, 7)
            path = torch.stack([way * angle.sin(), way * angle.cos()], -1)[None].float()
            mask = torch.arange(6)[None] < (6 if number % 4 else 3)
            zero = torch.zeros(1)
            ego = EgoState(
                velocity=torch.zeros(1, 2),
                yaw_rate=zero,
                acceleration=torch.zeros(1, 2),
                can_accel=torch.zeros(1, 2),
                heading_speed=zero,
                steering=zero,
                history=torch.zeros(1, 4, 2),
                command=torch.tensor([2]),
            )
            plan = PlanTargets(path, mask)
            yield EvaluationFrame(token, f"scene-{number // 4}", number % 4, plan, ego)

    def occupancy(self, sample_token, *, pedestrians=False):
        return torch.zeros(6, 200, 200, dtype=torch.bool)


@pytest.fixture
def truth():
    return PlanningTruth.of(Bends())


def write_pickle(path, plans):
    path.write_bytes(pickle.dumps(plans))
    return path


def driven(truth):
    return dict(zip(TOKENS, truth.split.waypoints.double().numpy(), strict=True))


def test_every_format_of_plans_is_read_alike(truth, tmp_path):
    plans = driven(truth)
    lines = tmp_path / "predictions.jsonl"
    lines.write_text(
        "".join(
            json.dumps({"sample_token": t, "kind": "plan", "waypoints": p.tolist()}) + "\n"
            for t, p in plans.items()
        )
        + json.dumps({"sample_token": TOKENS[0], "kind": "plan_blind", "waypoints": None})
    )
    conversations = tmp_path / "plan_conv.json"
    answers = [
        {"id": f"{t}_trajectory", "question": "?", "answer": [format_waypoints(p)]}
        for t, p in plans.items()
    ]
    conversations.write_text("\n".join(map(json.dumps, answers)))
    as_list = tmp_path / "list.json"
    as_list.write_text(json.dumps(answers))
    as_dict = tmp_path / "dict.json"
    as_dict.write_text(json.dumps({a["id"]: a["answer"][0] for a in answers}))
    pickled = write_pickle(tmp_path / "plans.pkl", plans)
    for path in (lines, conversations, as_list, as_dict, pickled):
        submission = read_submission(path)
        assert submission.kind == "plans"
        found, counts = plan_set(submission, truth, repair=False)
        error = (found.points - truth.split.waypoints).abs().max()
        assert error <= (0.0051 if path in (conversations, as_list, as_dict) else 0)
        assert counts.used == 12
        assert counts.sentences() == []


def test_missing_extra_doubled_and_unusable_plans_are_counted_and_named(truth, tmp_path):
    plans = driven(truth)
    records = [
        {"sample_token": t, "kind": "plan", "waypoints": p.tolist()} for t, p in plans.items()
    ]
    del records[0]
    records[0]["waypoints"][2][1] = float("nan")
    records[1]["waypoints"].pop()
    records[2]["waypoints"] = None
    records.append(records[5] | {"waypoints": [[9.0, 9.0]] * 6})
    records.append(records[6])
    records.append({"sample_token": "nobody", "kind": "plan", "waypoints": [[0.0, 0.0]] * 6})
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    found, counts = plan_set(read_submission(path), truth, repair=False)
    said = counts.as_dict()
    assert (said["n_missing"], said["missing"]) == (1, [TOKENS[0]])
    assert (said["n_extra"], said["extra"]) == (1, ["nobody"])
    assert said["doubled"] == [TOKENS[6], TOKENS[7]]
    assert said["conflicting"] == [TOKENS[6]]
    assert said["n_unusable"] == 3
    assert said["unusable"]["not finite (NaN or infinite)"] == [TOKENS[1]]
    assert said["unusable"]["5 points instead of 6"] == [TOKENS[2]]
    assert said["used"] == 8
    text = "\n".join(counts.sentences())
    for word in (TOKENS[0], "nobody", "1 with different plans", "NaN", "5 points instead of 6"):
        assert word in text
    # The first of two plans counts.
    assert torch.equal(found.points[6], truth.split.waypoints[6].double())
    # Standing still for the three; the missing one is left out.
    scores = score_planners(truth, [found], {"uniad": PRESETS["uniad"]})[found.name]["uniad"]
    assert scores.scores.samples == 11
    strict = {"opendrivevla_uniad": PRESETS["opendrivevla_uniad"]}
    with pytest.raises(UserError, match="4 plans are missing or cannot be read"):
        score_planners(truth, [found], strict)
    mended, counts = plan_set(read_submission(path), truth, repair=True)
    assert counts.repaired == (TOKENS[2],)
    assert torch.equal(mended.points[2, 5], mended.points[2, 4])


def test_records_that_are_no_plans_are_counted_by_kind_or_refused(truth, tmp_path):
    plans = [{"sample_token": t, "waypoints": p.tolist()} for t, p in driven(truth).items()]
    others = [
        {"sample_token": TOKENS[0], "kind": "caption", "text": "a", "reference": "b"},
        {"sample_token": TOKENS[0], "kind": "plan_blind", "waypoints": None},
        {"id": "1", "question": "?", "answer": "a"},
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(map(json.dumps, others + plans + others[:1])))
    submission = read_submission(path)
    assert submission.beside == {"caption": 2, "plan_blind": 1, "answer": 1}
    assert len(submission.plans) == 12
    for odd, told in (
        ({"sample_token": TOKENS[0], "waypoint": []}, "it has sample_token, waypoint"),
        ({"sample_token": TOKENS[0], "kind": "plans", "text": ""}, "it has kind 'plans'"),
        ({}, "it has no field"),
    ):
        path.write_text("\n".join(map(json.dumps, [*plans, odd])))
        message = f"record 12 of .* is neither a plan nor of another known kind: {told}"
        with pytest.raises(UserError, match=message):
            read_submission(path)


@pytest.mark.parametrize("frame", ["ego", "swapped", "mirrored", "offsets"])
def test_a_wrong_frame_is_found_by_the_ground_truth(truth, tmp_path, frame):
    rng = np.random.default_rng(0)
    undo = {
        "ego": lambda p: np.stack([p[:, 1], -p[:, 0]], -1),
        "swapped": lambda p: p[:, ::-1],
        "mirrored": lambda p: p * [-1.0, 1.0],
        "offsets": lambda p: np.diff(p, axis=0, prepend=np.zeros((1, 2))),
    }[frame]
    noisy = {t: p + rng.normal(0, 0.2, p.shape) for t, p in driven(truth).items()}
    assert np.allclose(FRAMES[frame](undo(noisy[TOKENS[0]])), noisy[TOKENS[0]])
    path = write_pickle(tmp_path / "plans.pkl", {t: undo(p).copy() for t, p in noisy.items()})
    with pytest.raises(UserError, match=f"say --frame {frame}"):
        plan_set(read_submission(path), truth, repair=False)
    found, _ = plan_set(read_submission(path), truth, repair=False, frame=frame)
    assert (found.points - truth.split.waypoints).abs().max() < 1.0


def test_poor_plans_are_not_taken_for_another_frame(truth, tmp_path):
    still = {token: np.zeros((6, 2)) for token in TOKENS}
    path = write_pickle(tmp_path / "plans.pkl", still)
    found, _ = plan_set(read_submission(path), truth, repair=False)
    assert not found.points.any()


def test_keys_that_come_again_are_counted_and_the_first_counts(truth, tmp_path):
    """JSON objects may hold a key twice; what Python's reader would drop is counted."""
    here, other = (json.dumps(plan.tolist()) for plan in list(driven(truth).values())[:2])
    token = TOKENS[0]
    path = tmp_path / "plans.json"
    path.write_text(f'{{"{token}": {here}, "{token}_trajectory": {other}, "{token}": {here}}}')
    found, counts = plan_set(read_submission(path), truth, repair=False)
    assert counts.doubled == counts.conflicting == (token,)
    assert torch.equal(found.points[0], truth.split.waypoints[0].double())
    path.write_text('{"meta": {}, "results": {"a": [], "a": [{}], "b": []}}')
    boxes = read_submission(path)
    assert (boxes.doubled, boxes.results) == (("a",), {"a": [], "b": []})
    answers = tmp_path / "answers.json"
    answers.write_text('{"a": {"narration": "it waits"}, "a": {"narration": "it goes"}}')
    assert [record["narration"] for record in read_submission(answers).records] == [
        "it waits",
        "it goes",
    ]
    pickled = write_pickle(tmp_path / "p.pkl", {f"{token}_trajectory": np.zeros((6, 2))})
    assert list(read_submission(pickled).plans) == [token]


def test_paths_that_are_cut_say_nothing_about_axes(truth, tmp_path):
    fine = {token: np.repeat(plan, 10, axis=0) for token, plan in driven(truth).items()}
    submission = read_submission(write_pickle(tmp_path / "fine.pkl", fine))
    _, counts = plan_set(submission, truth, repair=True)
    assert (len(counts.repaired), counts.used) == (12, 12)


class Evil:
    """Would print when unpickled."""

    def __reduce__(self):
        return print, ("owned",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "is empty"),
        ("p.jsonl", b" \n", "is empty"),
        ("p.json", b"[]", "is empty"),
        ("p.json", b"{}", "is empty"),
        ("p.json", b'{"meta": {}, "results": {"a": null}}', "sample a: expected a list of boxes"),
        ("p.pkl", pickle.dumps({}), "is empty"),
        ("p.pkl", pickle.dumps([1]), "must hold a dict"),
        ("p.pkl", pickle.dumps({"a": Evil()}), r"is refused: it names .*print"),
        ("p.pkl", b"\x80garbage", "not a whole pickle"),
        ("p.json", b"\xff\xfe\x00", "is no text file"),
        ("p.json", b"3", "no predictions"),
        ("p.json", b'[{"a": 1}, 2]', "record 1 of .* is no JSON object"),
        ("p.jsonl", b'{"kind": "plan"}\n{"kind"', "line 2 is not JSON"),
        ("p.jsonl", b'{"kind": "plan"}\n{"kind": "plan"}', "plan 0 of .* names no sample"),
        ("p.json", b'{"meta": {}, "results": {}}', "hold no sample"),
        ("p.json", b"[" * 100_000, r"p\.json is not JSON: maximum recursion depth"),
        ("p.json", b"[1" + b"0" * 5000 + b"]", r"p\.json is not JSON: Exceeds the limit"),
        ("p.jsonl", b'{"kind": "plan"}\n' + b"[" * 100_000, "line 2 is not JSON: maximum"),
    ],
)
def test_broken_files_are_refused_with_a_sentence(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_submission(path)
    assert "owned" not in capsys.readouterr().out


def test_plans_of_other_samples_are_refused(truth, tmp_path):
    path = write_pickle(tmp_path / "plans.pkl", {"x": np.zeros((6, 2))})
    with pytest.raises(UserError, match="none of its 1 samples is a key-frame of the val split"):
        plan_set(read_submission(path), truth, repair=False)
    path = write_pickle(tmp_path / "plans.pkl", {TOKENS[0]: np.zeros((5, 2))})
    with pytest.raises(UserError, match=r"not one of its 1 plans can be used.*5 points instead"):
        plan_set(read_submission(path), truth, repair=False)
    path = tmp_path / "plans.json"
    path.write_text(json.dumps({TOKENS[0]: [[10**400, 0]] * 6}))
    with pytest.raises(UserError, match=r"not one of its 1 plans can be used.*no list of points"):
        plan_set(read_submission(path), truth, repair=False)
    with pytest.raises(UserError, match="no file of predictions"):
        read_submission(tmp_path / "none.json")


def test_the_ground_truth_is_checked_before_anything_is_scored(truth, monkeypatch):
    plans = PlanSet.complete("driven", truth.split.waypoints)
    scores = score_planners(truth, [plans], {"uniad": PRESETS["uniad"]})["driven"]["uniad"].scores
    assert (max(scores.l2_steps_m), max(scores.collision_steps)) == (0.0, 0.0)
    import odvla.metrics.planning as planning

    monkeypatch.setattr(planning, "l2_per_step", lambda p, d: (p - d).abs().sum(-1) + 1e-3)
    with pytest.raises(UserError, match="the evaluation is broken, nothing was scored"):
        score_planners(truth, [plans], {"uniad": PRESETS["uniad"]})
    monkeypatch.undo()
    check = GroundTruthCheck({"uniad": PRESETS["uniad"]})
    everywhere = Traffic(raster=torch.ones(12, 6, 200, 200, dtype=torch.bool))
    mask = truth.split.mask
    check.add("uniad", truth.split.tokens, truth.split.waypoints, mask, everywhere)


@pytest.mark.parametrize(("recorded", "known"), [(3, 1), (1, 0)])
def test_numbers_without_a_recorded_step_are_dashes_everywhere(truth, tmp_path, recorded, known):
    """Three plans 1 m off, whose futures end early; the plans of all others are left out."""
    rows = (0, 4, 8)
    truth.split.mask[list(rows), recorded:] = False
    card = replace(PRESETS["odvla_uniad"], missing="left_out")
    missing = {row: "missing" for row in range(12) if row not in rows}
    points = truth.split.waypoints.double() + torch.tensor([1.0, 0.0])
    plans = [PlanSet("a.pkl", points, missing), PlanSet("b.pkl", points, missing)]
    found = score_planners(truth, plans, {"odvla_uniad": card})
    (table,) = planning_tables(found, {})
    texts = [table.text(cell) for cell in table.rows[0][1]]
    ends = [*["1.00"] * known, *["-"] * (3 - known), "1.00" if known else "-"]
    assert texts[:4] == ends
    assert texts[4:8] == [text.replace("1", "0") for text in ends]
    assert [test.other for test in paired_scores(found, "a.pkl", "odvla_uniad")] == (
        ["b.pkl"] if known else []
    )
    paths = []
    for plan in plans:
        samples = sample_records(truth, plan, found[plan.name])
        assert samples[0]["l2_avg_m"] == ({"odvla_uniad": pytest.approx(1.0)} if known else {})
        planning = {name: scored.as_dict() for name, scored in found[plan.name].items()}
        content = {"predictions": plan.name, "planning": planning, "samples": samples}
        paths.append(tmp_path / f"{plan.name}.json")
        paths[-1].write_text(json.dumps(without_nan(content), allow_nan=False))
    results = read_results(paths)
    own = next(t for t in result_tables(results) if t.title == "Planning, odvla_uniad")
    again = [own.text(cell) for cell in own.rows[0][1]]
    assert again[:8] == texts[:8]
    assert again[8] == ("1.00 to 1.00" if known else "-")
    assert len(compare(results)) == known
    assert len(all_plots(results)) == 4


def test_the_verb_scores_a_town(town_root, tmp_path, capsys):
    data = NuScenesDataConfig(root=str(town_root), version="v1.0-trainval").build()
    truth = PlanningTruth.of(data)
    offset = np.array([0.3, 0.4])
    points = truth.split.waypoints.double().numpy() + offset
    path = write_pickle(tmp_path / "plans.pkl", dict(zip(truth.split.tokens, points, strict=True)))
    out = tmp_path / "out"
    names = ("uniad", "stp3", "opendrivevla", "omnidrive", "sparsedrive", "vad")
    chosen = [word for name in names for word in ("--protocol", name)]
    command = ["score", str(path), "--data", str(town_root), *chosen, "--out", str(out)]
    assert main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["planning"]) == {*names, "opendrivevla_uniad", "opendrivevla_stp3"} - {
        "opendrivevla"
    }
    frames = len(truth.split.tokens)
    uniad = results["planning"]["uniad"]
    shares = truth.split.mask.double().mean(0)  # masked steps count as 0
    assert uniad["l2_3s_m"] == pytest.approx(0.5 * float(shares[5]))
    assert uniad["n_samples"] == frames
    assert uniad["card"] == PRESETS["uniad"].as_dict()
    for protocol in results["planning"].values():
        for end in ("1s", "2s", "3s", "avg"):
            assert 0 <= protocol[f"box_collision_{end}"] <= 1
    assert results["planning"]["vad"]["l2_avg_m"] == pytest.approx(0.5)
    assert len(results["samples"]) == frames
    driving = results["driving"]
    assert driving["driven path"]["no_fault_collision"] == 1.0
    assert driving["driven path"]["progress"] == pytest.approx(1.0)
    assert "| plans.pkl |" in (out / "table.md").read_text()
    # Planners that see nothing stand beside the plans, in every table and in the report.
    assert len(results["baselines"]) == 4
    for beside in results["baselines"].values():
        assert set(beside) == set(results["planning"])
    assert "| ego-state MLP |" in (out / "table.md").read_text()
    assert [r.name for r in read_results([out])] == ["plans.pkl", *results["baselines"]]
    assert set(results["counts_by_reading"]) == {"strict", "repair"}
    assert main(["score", str(path), "--data", str(tmp_path)]) == 2
    assert "holds none of v1.0-mini" in capsys.readouterr().err


def test_who_sees_nothing_is_scored_on_the_samples_of_the_plans(town_root, tmp_path):
    data = NuScenesDataConfig(root=str(town_root), version="v1.0-trainval").build()
    truth = PlanningTruth.of(data)
    driven = zip(truth.split.tokens[:4], truth.split.waypoints.tolist(), strict=False)
    records = [{"sample_token": token, "waypoints": path} for token, path in driven]
    records[3]["waypoints"] = records[3]["waypoints"][:5]
    records += [{"sample_token": records[0]["sample_token"], "kind": "caption", "text": "a"}] * 2
    path = tmp_path / "plans.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    # "uniad" lets a car stand whose plan cannot be read, "omnidrive" leaves it out.
    request = ScoreRequest(path, town_root, protocols=("uniad", "omnidrive"), baselines=True)
    found = score(request)
    numbers = found.report.numbers
    assert numbers["not_scored"] == {"caption": 2}
    assert "2 records of kind 'caption' are no plans, and are not scored beside them" in found.said
    assert [numbers["planning"][name]["n_samples"] for name in request.protocols] == [4, 3]
    for beside in numbers["baselines"].values():
        assert [beside[name]["n_samples"] for name in request.protocols] == [4, 3]
    driving = {name: scores["n_samples"] for name, scores in numbers["driving"].items()}
    assert {driving[name] for name in numbers["baselines"]} == {driving["plans.jsonl"]}
