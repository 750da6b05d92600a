"""Two processes (gloo): one model, the same evaluation as one process, to the last bit."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from callbacks.freeze import FreezeByName
from callbacks.predictions import WritePredictions
from stages.alignment import AlignmentStageConfig
from stages.base import gather
from stages.optimisation import LearningRates, OptimiserConfig
from stages.planning import PlanningStageConfig


class CompareRanks(FreezeByName):
    """Freezes, and checks at the end that all processes hold the same weights."""

    def on_train_end(self, trainer, pl_module):
        tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        one, other = gather(tensors)
        assert all(one[name].equal(other[name]) for name in one)
        assert any(
            not tensor.equal(self.started[name]) for name, tensor in self.model.state_dict().items()
        )

    def on_train_start(self, trainer, pl_module):
        self.started = {name: t.clone() for name, t in self.model.state_dict().items()}


@pytest.fixture
def two_processes():
    return {
        "devices": 2,
        "strategy": DDPStrategy(
            find_unused_parameters=True, start_method="fork", process_group_backend="gloo"
        ),
    }


def test_processes_stay_one_model_though_batches_use_different_parts(
    make_vla, make_data, make_trainer, two_processes
):
    # Each process has conversations about other streams; some projectors get no gradient there.
    vla, config = make_vla(), AlignmentStageConfig()
    data = make_data("caption_map", "caption_scene", frames=6, rows=1)
    batch = data.batch
    data.batch = lambda requests: one_kind(batch(requests), requests[0].frame % 2)
    trainer = make_trainer(CompareRanks(vla, config.freeze), max_steps=3, **two_processes)
    trainer.fit(config.build(vla, 3), data)


def one_kind(batch, kind):
    talk = batch.talk
    rows = torch.tensor([kind])
    chosen = {
        name: getattr(talk, name)[rows]
        for name in ("input_ids", "labels", "mask", "prompt_length", "frame_index", "object_boxes")
    }
    return replace(batch, talk=replace(talk, conversations=(talk.conversations[kind],), **chosen))


def test_evaluation_is_the_same_at_any_number_of_processes(
    make_vla, make_data, make_trainer, two_processes, tmp_path
):
    config = PlanningStageConfig(max_new_tokens=120)
    results = {}
    for name, settings in (("two", two_processes), ("one", {})):
        path = tmp_path / f"{name}.jsonl"
        data, vla = make_data("plan"), make_vla()
        trainer = make_trainer(WritePredictions(path), limit_val_batches=1.0, **settings)
        losses = trainer.validate(config.build(vla), data, verbose=False)
        trainer.test(config.build(vla), data, verbose=False)
        results[name] = (losses, path.read_bytes())
    assert results["one"] == results["two"]
    assert len(results["one"][1].splitlines()) == 14
    assert all(json.loads(line)["waypoints"] for line in results["one"][1].splitlines())


def test_two_processes_learn_what_one_learns_from_batches_twice_as_large(
    make_vla, make_data, make_trainer, two_processes
):
    def loss(vla):
        trainer = make_trainer(limit_val_batches=1.0)
        return trainer.validate(config.build(vla), make_data("plan"), verbose=False)[0]["val/loss"]

    config = PlanningStageConfig(
        optimiser=OptimiserConfig(lr=LearningRates(*[3e-3] * 5), warmup=0.0)
    )
    start, after = loss(make_vla()), {}
    # A step of two processes reads the same two batches as a step of one that accumulates two.
    for name, settings in (("one", {"accumulate_grad_batches": 2}), ("two", two_processes)):
        vla, data = make_vla(), make_data("plan", frames=8, rows=1)
        trainer = make_trainer(FreezeByName(vla, config.freeze), max_steps=20, **settings)
        trainer.fit(config.build(vla, 20), data)
        after[name] = loss(vla)
    learned = start - after["one"]
    assert learned > 0.1 * start
    assert abs(after["two"] - after["one"]) < 0.02 * learned
