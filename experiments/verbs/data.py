"""The verbs about data: `data make`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.verbs.parser import Verbs, add_verb
from odvla.errors import UserError


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    data = verbs.add_parser("data", help="make data", description="Make data.")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = add_verb(
        actions,
        "make",
        "generate a town in nuScenes' format",
        "data make data/town --scenes 10 --image-size 320x180 --seed 0",
        make_data,
    )
    make.add_argument("out", type=Path, help="folder to make; it must not hold anything yet")
    make.add_argument("--scenes", type=int, default=10, help="10 makes a v1.0-mini (default 10)")
    make.add_argument("--image-size", default="320x180", help="width x height (default 320x180)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--workers", type=int, default=2, help="processes (default 2)")


def make_data(options: argparse.Namespace) -> None:
    """A town."""
    from experiments.prepare import make_town_at
    from experiments.schema import TownSettings

    width, cross, height = options.image_size.partition("x")
    if not cross or not width.isdigit() or not height.isdigit():
        raise UserError(f"--image-size is width x height, e.g. 320x180, not {options.image_size!r}")
    town = TownSettings(options.scenes, (int(width), int(height)), options.seed, options.workers)
    made = make_town_at(options.out, town)
    Console(soft_wrap=True).print(f"{options.scenes} scenes ({town.version}) in {made}")
