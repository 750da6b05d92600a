"""All checks in order, printed as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from experiments.doctor.data_root import check_data
from experiments.doctor.environment import check_environment
from experiments.doctor.experiment import check_language, check_models, data_place
from experiments.doctor.findings import Finding, red
from experiments.schema import ExperimentConfig

STYLES = {"green": "green", "yellow": "yellow", "red": "bold red"}


def findings(
    root: Path, version: str, runs: Path, config: ExperimentConfig | None = None
) -> Iterator[Finding]:
    """Every check.

    Args:
        root: the data root, if there is no experiment.
        version: of its tables.
        runs: folder of runs.
        config: an experiment, whose data and files are checked then.
    """
    yield from check_environment(runs)
    if config is None:
        yield from check_data(root, version)
        return
    place, problem = data_place(config)
    if problem is not None:
        yield problem
    else:
        broken = False
        for finding in check_data(place, config.data.version):
            broken |= finding.level == "red"
            yield finding
        found = replace(config, data=replace(config.data, root=str(place)))
        if broken:
            advice = "repair the data root first"
            yield red("texts", "not read, because the data root is broken", advice)
        else:
            yield from check_language(found)
    yield from check_models(config)


def run_doctor(found: Iterator[Finding], console: Console, *, as_json: bool = False) -> bool:
    """Print one line a check.

    Args:
        found: the checks.
        console: where they are printed.
        as_json: as one JSON list instead.

    Returns:
        Whether no check is red.
    """
    listed = []
    for finding in found:
        listed.append(finding)
        if not as_json:
            advice = f" -> {finding.advice}" if finding.advice else ""
            style = STYLES[finding.level]
            line = f"{finding.level:6s}  {finding.check:18s}  {finding.found}{advice}"
            console.print(line, style=style, markup=False)
    reds = sum(finding.level == "red" for finding in listed)
    yellows = sum(finding.level == "yellow" for finding in listed)
    if as_json:
        console.print(json.dumps([asdict(finding) for finding in listed], indent=1), markup=False)
    else:
        console.print(f"{len(listed)} checks: {reds} red, {yellows} yellow")
    return not reds
