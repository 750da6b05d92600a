"""Budgets: memory as a real step takes it, parameters as they are, and bad input named."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from experiments.activations import vision_bytes
from experiments.budget import budgets, memory_of
from experiments.cli import main
from experiments.find import experiments, find_experiment
from experiments.throughput import random_model, trial
from experiments.verbs.parser import EXIT_USER_ERROR
from odvla.config import apply_overrides

SMALLER = [f"data.{stage}.batch_size=4" for stage in ("perception", "instruction", "planning")]


def allocated(ready, vla):
    """Bytes held before a step, and the most that the allocator gives out during it."""
    ready.step()  # the optimiser's state is there from now on
    states = [v for s in ready.optimiser.state.values() for v in s.values() if torch.is_tensor(v)]
    held = sum(t.numel() * t.element_size() for t in [*vla.parameters(), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        ready.step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return held + most


@pytest.mark.parametrize(
    "changes",
    [
        ["run=[perception,instruction,planning]"],
        [
            "run=[instruction]",
            "model.language.lora.rank=4",
            "stages.instruction.freeze.train=[projectors.*, language.*lora_*]",
        ],
    ],
    ids=("all weights", "adapters"),
)
def test_a_step_takes_the_memory_that_was_predicted(changes):
    config = apply_overrides(find_experiment("tiny"), [*SMALLER, *changes])
    for budget in budgets(config):
        vla, tokenizer = random_model(config)
        measured = allocated(trial(config, budget.stage, vla, tokenizer), vla)
        assert budget.memory.peak == pytest.approx(measured, rel=0.2), budget.stage


def test_images_of_full_size_are_probed_small_and_what_they_keep_grows_with_their_area():
    # Images smaller than the coarsest features' stride are none that the tower takes.
    small = find_experiment("uniad_town_smoke")
    kept = {}
    for factor in (1, 2):
        size = (1600 // factor, 900 // factor)
        rows = 200 // factor
        encoder = replace(small.model.encoder, rows=rows, columns=rows)
        config = replace(
            small,
            model=replace(small.model, encoder=encoder),
            data=replace(small.data, image_size=size),
        )
        kept[factor] = vision_bytes(config, "perception", rows=1, steps=1)
    assert 3 < kept[1] / kept[2] < 5


def test_strategies_share_what_they_say():
    config = find_experiment("smoke")
    vla, _ = random_model(config)
    numbers = sum(p.numel() for p in vla.parameters())
    alone = memory_of(vla, "auto", 1, 10, ())
    assert (alone.weights, alone.gradients, alone.optimiser) == (
        4 * numbers,
        4 * numbers,
        8 * numbers,
    )
    assert alone.exchange == 0
    ddp = memory_of(vla, "ddp", 4, 10, ())
    assert (ddp.weights, ddp.exchange) == (4 * numbers, 4 * numbers)
    parts = memory_of(vla, "fsdp2", 4, 10, ())
    assert (parts.weights, parts.gradients, parts.optimiser) == (numbers, numbers, 2 * numbers)
    zero = memory_of(vla, "deepspeed_2", 4, 10, ())
    assert (zero.weights, zero.gradients, zero.optimiser) == (4 * numbers, numbers, 2 * numbers)
    for parameter in vla.language.parameters():
        parameter.requires_grad_(False)
    less = memory_of(vla, "auto", 1, 10, ())
    assert less.weights == alone.weights
    assert less.optimiser < alone.optimiser


def test_the_verb_prints_what_is_needed(capsys):
    changes = ["run=[alignment,planning]", "town=null", "stages.planning.steps=0"]
    assert main(["plan", "smoke", *changes, "--samples-per-second", "10"]) == 0
    said = capsys.readouterr().out
    for text in ("parameters that train", "Memory of a device", "28,130", "0.8", "handoffs take"):
        assert text in said
    assert main(["plan", "smoke", "--samples-per-second", "-1"]) == EXIT_USER_ERROR
    assert "must be positive, not -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [n for n, (module, _) in experiments().items() if module != "experiments.opendrivevla"]
)
def test_every_small_experiment_can_be_planned(name):
    config = find_experiment(name)
    (budget,) = budgets(replace(config, run=config.run[:1]))
    assert budget.memory.activations > 0


@pytest.mark.parametrize(
    "changes",
    [["smoke", "run=[alignment]"], ["lidar_llm_style", "run=[alignment]"]],
    ids=("cameras", "lidar"),
)
def test_throughput_can_be_measured(capsys, changes):
    assert main(["plan", *changes, "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rate, hours = [t for t in lines if t.strip().startswith("alignment")][-1].split()[-2:]
    assert float(rate) > 0
    assert float(hours) >= 0
