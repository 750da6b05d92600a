"""The machine and the packages on it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from experiments.doctor.findings import Finding, green, red, summed, yellow

LOW_GB, EMPTY_GB = 20.0, 1.0


def check_environment(runs: Path) -> Iterator[Finding]:
    """Python, packages, GPU, backends of the operations, disk space.

    Args:
        runs: folder that runs are written to.
    """
    yield _python()
    yield _packages()
    yield _device()
    yield _operations()
    yield disk_space("disk for runs", runs)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return green("python", f"Python {version}, {os.cpu_count()} processors")


def _packages() -> Finding:
    """Every dependency that the project names, against what is installed."""
    try:
        named = metadata.requires("odvla") or []
    except metadata.PackageNotFoundError:
        advice = "install the project: pip install -c constraints.txt -e ."
        return yellow("packages", "the project is not installed in this environment", advice)
    wanted = [Requirement(text) for text in named]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate()]
    problems = []
    for need in wanted:
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{need.name} is not installed")
            continue
        if not need.specifier.contains(version, prereleases=True):
            problems.append(f"{need.name} is {version}, {need.specifier} is needed")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
    fine = f"{len(wanted)} packages as required ({shown})"
    return summed("packages", problems, fine, "pip install -c constraints.txt -e .")


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        memory = facts.total_memory / 2**30
        return green("gpu", f"{count} x {facts.name}, {memory:.0f} GB, CUDA {torch.version.cuda}")
    if torch.version.cuda:
        found = f"torch is built for CUDA {torch.version.cuda}, but sees no GPU"
        return yellow("gpu", found, "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES")
    advice = "fine for tiny experiments; install a CUDA build of torch for larger ones"
    return yellow("gpu", f"torch {torch.__version__} has no CUDA", advice)


def _operations() -> Finding:
    """Which implementations of deformable attention there are."""
    if importlib.util.find_spec("odvla.ops.backends") is None:
        return green("operations", "deformable attention in plain torch")
    from importlib import import_module

    names = import_module("odvla.ops.backends").available_backends()
    return green("operations", f"backends of deformable attention: {', '.join(names)}")


def disk_space(check: str, folder: Path) -> Finding:
    """Free space where a folder lies or will lie."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    if free < EMPTY_GB:
        return red(check, f"{free:.1f} GB free at {place}", "make room; checkpoints will not fit")
    if free < LOW_GB:
        return yellow(check, f"{free:.1f} GB free at {place}", "long runs need more")
    return green(check, f"{free:.0f} GB free at {place}")
