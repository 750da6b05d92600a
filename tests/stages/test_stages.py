"""Each stage on noise: what it trains, what it predicts, and that runs can be repeated."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from callbacks.freeze import FreezeByName
from callbacks.predictions import WritePredictions
from odvla.errors import UserError
from odvla.fake_batch import fake_batch
from odvla.language.waypoints import parse_future
from stages.alignment import AlignmentStageConfig
from stages.base import StageConfig, WeightedMeans
from stages.instruction import InstructionStageConfig
from stages.interaction import InteractionStageConfig
from stages.language import LanguageStageConfig
from stages.perception import PerceptionStageConfig
from stages.planning import PlanningStageConfig

STAGES = {
    "language": (LanguageStageConfig(max_new_tokens=4), ("text",), ("language",)),
    "perception": (PerceptionStageConfig(min_score=0.0), ("plan",), ("encoder", "queries")),
    "alignment": (
        AlignmentStageConfig(max_new_tokens=4),
        ("caption_object", "caption_map", "caption_scene"),
        ("projectors",),
    ),
    "instruction": (
        InstructionStageConfig(max_new_tokens=4),
        ("qa", "narration"),
        ("projectors", "language"),
    ),
    "interaction": (
        InteractionStageConfig(max_new_tokens=120),
        ("agent",),
        ("projectors", "language"),
    ),
    "planning": (
        PlanningStageConfig(max_new_tokens=120),
        ("plan",),
        ("encoder", "queries", "projectors", "language"),
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_its_parts_and_no_others(name, make_vla, make_data, make_trainer):
    config, kinds, parts = STAGES[name]
    vla = make_vla()
    before = {key: value.clone() for key, value in vla.state_dict().items()}
    freeze = FreezeByName(vla, config.freeze)
    trainer = make_trainer(freeze, max_steps=2)
    trainer.fit(config.build(vla, 2), make_data(*kinds))
    freeze.compare()
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    changed = {key for key, value in vla.state_dict().items() if not value.equal(before[key])}
    assert {key.split(".")[0] for key in changed} == set(parts)
    backbone = [key for key in changed if key.startswith("encoder.backbone.")]
    assert bool(backbone) == (name == "perception")
    assert freeze.before == freeze.after
    assert not set(freeze.before) & changed


def test_freezing_that_did_not_hold_is_found(make_vla, make_data, make_trainer):
    vla = make_vla()
    config = AlignmentStageConfig()
    freeze = FreezeByName(vla, config.freeze)
    make_trainer(freeze, max_steps=1).fit(config.build(vla), make_data("caption_map"))
    with torch.no_grad():
        next(vla.encoder.parameters()).add_(1)
    with pytest.raises(RuntimeError, match=r"'encoder\..*is frozen but has changed"):
        freeze.compare()


@pytest.mark.parametrize("name", ["perception", "instruction", "interaction", "planning"])
def test_a_stage_predicts_every_sample_once(name, make_vla, make_data, make_trainer, tmp_path):
    config, kinds, _ = STAGES[name]
    path = tmp_path / "predictions.jsonl"
    make_trainer(WritePredictions(path)).test(
        config.build(make_vla()), make_data(*kinds), verbose=False
    )
    records = [json.loads(line) for line in path.read_text().splitlines()]
    said = [(r["sample_token"], r["kind"]) for r in records]
    assert said == sorted(said, key=lambda pair: pair[0])
    expected = {
        "perception": ("detection", "map"),
        "instruction": ("qa", "narration"),
        "interaction": ("agent",),
        "planning": ("plan", "plan_blind"),
    }[name]
    assert sorted(said) == sorted((f"sample-{k}", kind) for k in range(7) for kind in expected)
    first = records[0]
    if name == "perception":
        assert len(first["boxes"]) == len(first["labels"]) == len(first["scores"]) > 0
        assert first["scores"] == sorted(first["scores"], reverse=True)
    elif name == "instruction":
        assert first["reference"] == "There is a car ahead."
        assert {r["question"] for r in records} == {"What is ahead?"}
    else:  # the grammar makes every text readable, however little was learned
        assert all(len(r["waypoints"]) == 6 and r["failure"] is None for r in records)
        assert len(first["mask"]) == len(first["target" if name == "interaction" else "reference"])
    if name == "interaction":  # where it went, not what the text makes of it
        decimals = int(first["meta"]["decimals"])
        off = np.abs(np.array(first["target"]) - parse_future(first["reference"], decimals).xy)
        assert 0 < off.max() <= 0.5 * 10**-decimals + 1e-3
        assert "driven" not in first["meta"]


def test_one_look_gives_the_loss_and_the_records(make_vla, make_data, make_trainer, tmp_path):
    stage, data = STAGES["perception"][0].build(make_vla()), make_data("plan", rows=2)
    assert stage.predicts_in_validation
    tested, judged = (tmp_path / f"{name}.jsonl" for name in ("test", "validation"))
    make_trainer(WritePredictions(tested)).test(stage, data, verbose=False)
    looks = []
    stage.vla.encoder.register_forward_hook(lambda *_: looks.append(1))
    trainer = make_trainer(WritePredictions(judged, "validate"), limit_val_batches=1.0)
    (metrics,) = trainer.validate(stage, data, verbose=False)
    assert judged.read_bytes() == tested.read_bytes() != b""
    assert len(looks) == len(data.val_dataloader())
    assert math.isfinite(metrics["val/loss"])


def test_evaluation_carries_the_state_and_forgets_it_at_a_scene_start(make_vla, make_data):
    vla = make_vla().eval()
    stage = STAGES["perception"][0].build(vla)
    batches = list(make_data("plan").val_dataloader())
    stage.on_test_epoch_start()
    with torch.inference_mode():
        streamed = [stage.predict_rows(batch)[0] for batch in batches]
        expected, state = [], None
        for batch in batches:
            state = None if bool(batch.clip[-1].scene_start) else state
            seen, state = vla.perceive(batch.clip, state)
            expected.append(seen.agent_steps[-1].scores.max())
    assert [r["sample_token"] for r in streamed] == [f"sample-{k}" for k in range(7)]
    assert [r["scores"][0] for r in streamed] == pytest.approx([float(e) for e in expected], 1e-3)


def test_a_row_that_only_fills_the_batch_teaches_nothing(make_vla, make_data):
    stage = STAGES["perception"][0].build(make_vla().eval())
    (batch, *_) = make_data("plan", rows=2).train_dataloader()
    alone = replace(batch, valid=torch.tensor([True, False]))
    both, first = stage.loss_of(batch, None), stage.loss_of(alone, None)
    assert (both.weight, first.weight) == (2, 1)
    assert both.loss != first.loss
    nothing = stage.loss_of(replace(batch, valid=torch.zeros(2, dtype=torch.bool)), None)
    assert nothing.weight == 0


def test_a_mean_over_batches_does_not_depend_on_their_order():
    generator = random.Random(0)
    values = [(10 ** generator.uniform(-8, 8), generator.randint(0, 9)) for _ in range(200)]

    def mean(pairs):
        means = WeightedMeans()
        for value, weight in pairs:
            means.add({"x": torch.tensor(value)}, weight)
        return means.compute()["x"]

    expected = mean(values)
    assert all(mean(generator.sample(values, 200)) == expected for _ in range(20))
    assert mean([(1.0, 1), (4.0, 2), (float("nan"), 0)]) == 3.0


def test_settings_are_checked_and_counted():
    assert StageConfig(epochs=2, accumulate=3).total_steps(10) == 7
    assert StageConfig(steps=5).total_steps(10) == 5
    with pytest.raises(UserError, match="steps or epochs"):
        StageConfig(epochs=0)
    with pytest.raises(UserError, match="accumulate"):
        StageConfig(accumulate=0)


def test_perception_needs_something_to_detect(make_vla):
    vla = make_vla()
    del vla.queries["track"], vla.queries["map"]
    with pytest.raises(UserError, match="agent or map queries"):
        PerceptionStageConfig().build(vla)


def test_switches_for_precision_and_memory_work(make_vla, make_data, make_trainer):
    vla = make_vla()
    vla.language.model.gradient_checkpointing_enable({"use_reentrant": False})
    for name in ("perception", "planning"):
        config, kinds, _ = STAGES[name]
        trainer = make_trainer(
            FreezeByName(vla, config.freeze), max_steps=1, precision="bf16-mixed"
        )
        trainer.fit(config.build(vla), make_data(*kinds))
        assert math.isfinite(trainer.callback_metrics["train/loss"])


def test_a_plan_is_scored_against_the_poses_not_the_text(make_vla, tokenizer):
    batch = fake_batch(tokenizer, rows=1, image_size=(48, 32))
    stage = STAGES["planning"][0].build(make_vla().eval())
    moved = replace(batch, plan=replace(batch.plan, waypoints=batch.plan.waypoints + 1))
    (record, _) = stage.predict_rows(moved)
    assert record["reference"] == moved.plan.waypoints[0].tolist()
