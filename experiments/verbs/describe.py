"""The verb `data describe`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from experiments.verbs.parser import Verbs, add_verb, quiet_libraries, wide_console


def add(actions: Verbs) -> None:
    """Declare the verb."""
    describe = add_verb(
        actions,
        "describe",
        "say what a language data set holds on a root: joins, counts, text lengths, examples",
        "data describe nuscenes_qa --root data/nuscenes --split train sampling=first:10%",
        describe_data_set,
    )
    describe.add_argument(
        "name",
        help="tod3cap, nucaption, nuscenes_qa, nux, drivelm, omnidrive, gpt_driver, "
        "gpt_driver_thoughts, mixture, alignment or agent_trajectories",
    )
    describe.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the data set, e.g. language_root=/texts or nux_files=[a.json,b.json]",
    )
    describe.add_argument(
        "--root", type=Path, help="a nuScenes root, or a town (default: $ODVLA_DATA, or data)"
    )
    describe.add_argument("--version", help="e.g. v1.0-trainval (default: the only one there is)")
    describe.add_argument("--split", default="train", choices=("train", "val"))
    describe.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="count tokens with its tokenizer.json"
    )
    describe.add_argument("--examples", type=int, default=3, metavar="N", help="default: 3")
    describe.add_argument("--json", action="store_true", help="print JSON instead of tables")


def describe_data_set(options: argparse.Namespace) -> None:
    """A description."""
    import json

    from experiments.describe import describe_data, show
    from experiments.verbs.data import version_of

    quiet_libraries(json=options.json)
    options.root = options.root or Path(os.environ.get("ODVLA_DATA", "data")).expanduser()
    found = describe_data(
        options.name,
        options.root,
        version_of(options),
        options.split,
        options.overrides,
        tokenizer=options.tokenizer,
        examples=max(0, options.examples),
        progress=not options.json,
    )
    if options.json:
        print(json.dumps(found.as_tree(), indent=2, ensure_ascii=False))  # noqa: T201
    else:
        show(found, wide_console())
