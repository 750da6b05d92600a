"""The verbs `data export` and `data diff`: files in other projects' forms."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.verbs.parser import (
    EXIT_FAILED,
    EXIT_OK,
    Verbs,
    add_verb,
    quiet_libraries,
    wide_console,
)
from odvla.errors import UserError

if TYPE_CHECKING:
    from datamodules.exchange.differ import Difference
    from datamodules.exchange.source import Source

# datamodules.exchange.formats.FORMATS knows them; a test holds the two together.
FORMATS = (
    "uniad-infos",
    "gpt-driver-cache",
    "gt-traj",
    "gt-traj-mask",
    "planning-segmentation",
    "vad-segmentation",
)
PREFIX = "./data/nuscenes"
NAMED = 5  # tokens that a report names
Add = Callable[[argparse.ArgumentParser], None]


def add(actions: Verbs, add_root: Add) -> None:
    """Declare the verbs.

    Args:
        actions: those of `data`.
        add_root: adds the data root and its version.
    """
    export = add_verb(
        actions,
        "export",
        "write key-frames in a file of UniAD's, GPT-Driver's or VAD's form",
        "data export data/nuscenes --format gt-traj --split val --out gt/gt_traj.pkl",
        export_file,
    )
    add_root(export)
    export.add_argument("--format", required=True, choices=FORMATS, help="see docs/exchange.md")
    export.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        help="default: all for gpt-driver-cache, val for the others",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    export.add_argument(
        "--prefix",
        default=PREFIX,
        help=f"what stands before samples/... in paths (default {PREFIX})",
    )
    export.add_argument("--force", action="store_true", help="overwrite the file")
    differ = add_verb(
        actions,
        "diff",
        "compare somebody's file with what this program makes of the same key-frames",
        "data diff gt/gt_traj.pkl data/nuscenes",
        diff_file,
    )
    differ.add_argument("file", type=Path, help="the file; its name tells its format, or --format")
    add_root(differ)
    differ.add_argument("--format", default="", choices=FORMATS, help="see docs/exchange.md")
    differ.add_argument(
        "--split",
        default="",
        choices=("train", "val", "test"),
        help="whose key-frames it should have (default: every split it has any of)",
    )
    differ.add_argument(
        "--tolerance", type=float, default=1e-3, help="of numbers, in their units (default 0.001)"
    )
    differ.add_argument("--json", action="store_true", help="print JSON")


def export_file(options: argparse.Namespace) -> None:
    """Write a file."""
    from datamodules.exchange.formats import FORMATS as forms
    from datamodules.exchange.formats import frames_of, write_file
    from experiments.output_places import check_file

    quiet_libraries()
    check_file(options.out)
    if options.out.exists() and not options.force:
        raise UserError(f"{options.out} is there already; --force overwrites it")
    form = forms[options.format]
    with _bar() as (bar, advance):
        source = _source(options, options.prefix, advance)
        frames = frames_of(source.index, options.split or form.split)

        def ticking() -> Iterator[Any]:
            for done, frame in enumerate(frames):
                advance("key-frames", done, len(frames))
                yield frame

        count = write_file(options.out, form, source, ticking())
        bar.stop()
    Console(soft_wrap=True, highlight=False).print(
        f"{options.out}: {count} key-frames, {options.out.stat().st_size / 1e6:.1f} MB",
        markup=False,
    )


def diff_file(options: argparse.Namespace) -> int:
    """Compare, print; 0: equal, 1: not."""
    from datamodules.exchange.differ import compare
    from datamodules.exchange.formats import format_of, read_file

    quiet_libraries(json=options.json)
    if not options.tolerance >= 0 or math.isinf(options.tolerance):
        raise UserError(f"--tolerance must be a number from 0 on, not {options.tolerance}")
    form = format_of(options.file, options.format)
    with _bar() as (_, advance):
        advance(f"reading {options.file.name}", 0, 1)
        file = read_file(options.file, form)
        source = _source(options, PREFIX, advance)
        found = compare(
            file,
            source,
            split=options.split,
            tolerance=options.tolerance,
            tick=lambda done, total: advance("key-frames", done, total),
        )
    if not found.both:
        raise UserError(
            f"{options.file}: none of its {len(found.only_there)} samples is a key-frame of "
            f"{options.root}, e.g. {found.only_there[0]}"
        )
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))  # noqa: T201
    else:
        for line in sentences(found):
            wide_console().print(line, markup=False, highlight=False, soft_wrap=True)
    return EXIT_OK if found.equal else EXIT_FAILED


def sentences(found: Difference) -> Iterator[str]:
    """A report for people."""
    yield f"{found.file} ({found.format}): {found.both} key-frames compared"
    for tokens, where in ((found.only_there, "the file"), (found.only_here, "this data root")):
        if tokens:
            yield f"{len(tokens)} key-frames only in {where}: {_named(tokens)}"
    if found.reordered:
        yield f"{found.reordered} key-frames have their boxes in another order"
    if found.more_fields:
        yield f"fields only in the file, not compared: {', '.join(found.more_fields)}"
    for field in found.fields:
        if not field.differing:
            continue
        line = f"{field.name}: {field.differing} of {field.compared} key-frames differ"
        if field.other_shape:
            line += f", {field.other_shape} in the number of rows"
        if field.largest is not None and field.differing > field.other_shape:
            line += f", by up to {field.largest:.4g} (median of all {field.median:.4g})"
        yield f"{line}; worst: {field.worst_token}"
    raster = found.rasters
    if raster is not None and raster.cells:
        yield (
            f"{raster.differing} of {raster.compared} rasters differ, in {raster.cells} cells "
            f"({raster.filled_there} are filled there, {raster.filled_here} here); worst: "
            f"{raster.worst_token} with {raster.worst_cells}"
        )
        if raster.explained_by:
            left = raster.flipped[raster.explained_by]
            yield f"flipped along {raster.explained_by}, the file differs in {left} cells alone"
    if found.equal:
        yield f"equal within {found.tolerance:g}"


def _named(tokens: Iterable[str]) -> str:
    tokens = list(tokens)
    return ", ".join(tokens[:NAMED]) + (", ..." if len(tokens) > NAMED else "")


def _source(
    options: argparse.Namespace, prefix: str, advance: Callable[[str, int, int], None]
) -> Source:
    """The root's index and tables."""
    from datamodules.exchange.source import Source
    from datamodules.index_file import ensure_index, map_index
    from experiments.verbs.data import version_of

    version = version_of(options)
    index = map_index(ensure_index(options.root, version, advance), options.root)
    return Source(index, prefix, advance)


@contextmanager
def _bar() -> Iterator[tuple[Progress, Callable[[str, int, int], None]]]:
    """A progress bar on the error stream: the report may go into a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield bar, advance
