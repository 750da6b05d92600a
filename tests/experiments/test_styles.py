"""Other systems' ideas as experiments: each trains and plans, a few steps on a small town."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from datamodules.lidar import read_sweep
from datamodules.nuscenes import NuScenesDataConfig
from experiments.pipeline import open_pipeline
from experiments.predict import predict
from experiments.styles import (
    drivevlm_style,
    emma_style,
    lidar_llm_style,
    lift_splat,
    openvla_oft_style,
    openvla_style,
    uniad_style,
)
from odvla.errors import UserError
from odvla.language.causal_lm import LanguageConfig
from odvla.language.decisions import all_decisions
from odvla.losses.collision import CollisionLossConfig
from stages.regression import RegressionLossConfig

LINES = "gpt_driver/train.json"
NEW_FORMS = (uniad_style, openvla_style, openvla_oft_style, drivevlm_style)
STYLES = (emma_style, lidar_llm_style, lift_splat, *NEW_FORMS)


def smaller(experiment, town_root):
    """An experiment of a few steps: its first stage and planning."""
    base = experiment()
    small = LanguageConfig(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64)
    # Of those whose plans are of another form, planning alone: it need not start from anything.
    run = ("planning",) if experiment in NEW_FORMS else (base.run[0], "planning")
    stages = {name: replace(base.stages.of(name), steps=2, checkpoint_every=2) for name in run}
    # A plan without what is left out takes as long as another plan: two experiments make them.
    left_out = {openvla_oft_style: ("no_ego",), lift_splat: ("no_vision",)}.get(experiment, ())
    stages["planning"] = replace(stages["planning"], max_thought_tokens=8, ablations=left_out)
    return replace(
        base,
        town=None,
        run=run,
        pictures=1,
        model=replace(base.model, language=small),
        data=replace(
            base.data,
            root=str(town_root),
            image_size=(64, 36),
            train_scenes=1,
            planning=replace(base.data.planning, batch_size=4, eval_frames_stride=4),
        ),
        stages=replace(base.stages, **stages),
    )


def in_traffic(config):
    """With a loss for collisions."""
    loss = RegressionLossConfig(collision=CollisionLossConfig(weight=2.5))
    planning = replace(config.stages.planning, regression=loss)
    return replace(config, stages=replace(config.stages, planning=planning))


@pytest.mark.parametrize("experiment", STYLES)
def test_each_trains_its_first_stage_and_plans(experiment, town_root, tmp_path):
    config = smaller(experiment, town_root)
    if experiment is uniad_style:
        config = in_traffic(config)
    pipeline = open_pipeline(config, tmp_path, progress=False)
    pipeline.fit()
    pipeline.report(Console(quiet=True))
    assert pipeline.finished() == list(config.run)
    text = (tmp_path / config.name / "table.md").read_text()
    assert ("OpenDriveVLA, vision zeroed" in text) == (experiment is lift_splat)
    run = tmp_path / config.name
    if experiment is openvla_style:
        weights_bring_their_bins(config, run)
    if experiment is openvla_oft_style:
        requests_are_heard(run)
    if experiment is uniad_style:
        metrics = json.loads((run / "planning" / "card.json").read_text())["metrics"]
        total = metrics["val/distance"] + 2.5 * metrics["val/collision"]
        assert metrics["val/loss"] == pytest.approx(total, rel=1e-5)


def requests_are_heard(run):
    """What a request does not tell at the test, the plan does not know."""
    records = map(json.loads, (run / "planning" / "predictions.jsonl").read_text().splitlines())
    plans = {(record["sample_token"], record["kind"]): record["waypoints"] for record in records}
    told = {token: plan for (token, kind), plan in plans.items() if kind == "plan"}
    assert len(plans) == 2 * len(told) > 0
    assert any(plans[token, "plan_no_ego"] != plan for token, plan in told.items())


def test_plans_are_thought_over_as_gpt_driver_does(town_root, tmp_path):
    """Trained on its lines, the model answers with one of its meta-actions before it plans."""
    base = smaller(drivevlm_style, town_root)
    planning = replace(base.data.planning, thoughts=False, conversations_file=LINES)
    config = replace(base, pictures=0, data=replace(base.data, planning=planning))
    pipeline = open_pipeline(config, tmp_path, progress=False)
    pipeline.fit()
    run = tmp_path / config.name
    lines = (run / "planning" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    known = all_decisions("gpt_driver")
    for record in records:
        assert record["decision"] in known
        assert record["meta"]["decision"] in known
        assert record["failure"] is None
    metrics = json.loads((run / "planning" / "card.json").read_text())["metrics"]
    right = [r["decision"] == r["meta"]["decision"] for r in records if r["kind"] == "plan"]
    assert metrics["test/decision_accuracy"] == pytest.approx(sum(right) / len(right))
    said = predict(config, run, records[0]["sample_token"])
    assert records[0]["decision"] in said.text


def weights_bring_their_bins(config, run):
    """What is predicted anew reads as the test's record does; another form is refused."""
    record = json.loads((run / "planning" / "predictions.jsonl").read_text().splitlines()[0])
    said = predict(config, run, record["sample_token"])
    assert said.text == record["text"]
    assert said.text.count("<action_") == said.cost.tokens == 12
    torch.testing.assert_close(
        torch.tensor(said.waypoints), torch.tensor(record["waypoints"]), atol=1e-4, rtol=0
    )
    card = json.loads((run / "planning" / "card.json").read_text())
    assert card["dialect"]["plan"]["form"] == "tokens"
    assert 0 < card["metrics"]["test/quantisation_m"] < 1
    text = replace(config.stages.planning, actions="points")
    other = replace(config, stages=replace(config.stages, planning=text))
    with pytest.raises(UserError, match=r"learned to write plans as action tokens, and .* points"):
        predict(other, run, record["sample_token"])


def test_sweeps_come_with_the_frames_where_an_encoder_asks(town_root):
    settings = {"root": str(town_root), "version": "v1.0-trainval", "batch_size": 2}
    data = NuScenesDataConfig(**settings, lidar=True).build()
    data.setup("fit")
    frames = next(iter(data.train_dataloader())).clip[-1]
    token = frames.sample_tokens[0]
    frame = next(f for f in data.index.frames if f.token == token)
    points = torch.from_numpy(read_sweep(town_root / frame.lidar_file).copy())
    assert frames.lidar.points[0][frames.lidar.mask[0]].equal(points)
    # Most of what a level lidar sees is the road, a little under 2 m below it.
    assert points[:, 2].median() == pytest.approx(-1.84, abs=0.4)
    plain = NuScenesDataConfig(**settings).build()
    plain.setup("fit")
    assert next(iter(plain.train_dataloader())).clip[-1].lidar is None


def test_broken_sweeps_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.bin cannot be read: No such file"):
        read_sweep(tmp_path / "none.bin")
    (tmp_path / "short.bin").write_bytes(b"\0" * 33)
    with pytest.raises(UserError, match=r"short\.bin is cut short: 33 bytes, 20 a point"):
        read_sweep(tmp_path / "short.bin")
