"""The verb `plan`: what an experiment will need."""

from __future__ import annotations

import argparse

from experiments.verbs.parser import (
    Verbs,
    add_experiment,
    add_verb,
    experiment_of,
    quiet_libraries,
    wide_console,
)


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    plan = add_verb(
        verbs,
        "plan",
        "say what an experiment will need: parameters, memory, disk, hours",
        "plan opendrivevla_7b trainer.devices=8 --samples-per-second 20",
        plan_experiment,
    )
    add_experiment(plan)
    plan.add_argument(
        "--samples-per-second",
        type=float,
        metavar="N",
        help="throughput of all devices together, for the hours",
    )
    plan.add_argument(
        "--measure",
        action="store_true",
        help="measure the throughput of each stage here, with noise and random weights",
    )


def plan_experiment(options: argparse.Namespace) -> None:
    """Count and print."""
    from experiments.budget import budgets
    from experiments.budget_table import print_budgets
    from experiments.throughput import measured_throughput
    from odvla.errors import UserError

    quiet_libraries()
    if options.samples_per_second is not None and options.samples_per_second <= 0:
        raise UserError(f"--samples-per-second must be positive, not {options.samples_per_second}")
    config = experiment_of(options)
    found = budgets(config)
    rates = {stage.stage: options.samples_per_second for stage in found}
    if options.measure:
        rates = {stage.stage: measured_throughput(config, stage.stage) for stage in found}
    print_budgets(config, found, rates, wide_console())
