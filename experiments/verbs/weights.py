"""The verbs about weights of other projects: `weights convert`, `weights inspect`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.verbs.parser import Verbs, add_verb
from odvla.errors import UserError

if TYPE_CHECKING:
    from odvla.checkpoints.contents import Contents
    from odvla.checkpoints.convert import Report

OURS = "odvla"
THEIRS = ("uniad", "opendrivevla")
GIGABYTE = 10**9


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    weights = verbs.add_parser(
        "weights",
        help="convert and inspect released weights",
        description="Convert and inspect the weights of UniAD and OpenDriveVLA.",
    )
    actions = weights.add_subparsers(dest="action", required=True, metavar="ACTION")
    convert = add_verb(
        actions,
        "convert",
        "convert UniAD's or OpenDriveVLA's weights into ours, or ours back",
        "weights convert uniad_base_track_map.pth --from uniad --to odvla --out weights/uniad",
        convert_weights,
    )
    convert.add_argument(
        "source", type=Path, help="a .pth, .bin or .safetensors file, a folder, or an index"
    )
    layouts = (OURS, *THEIRS)
    convert.add_argument("--from", dest="origin", choices=layouts, required=True)
    convert.add_argument("--to", dest="target", choices=layouts, required=True)
    convert.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to make; on the way back also a .pth, .bin or .safetensors file",
    )
    convert.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="way back: the converted weights that training started from; what our model never "
        "reads, the old spelling and config.json are taken from there",
    )
    convert.add_argument(
        "--format",
        dest="file_format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="way back: of the files in a folder (default safetensors)",
    )
    convert.add_argument(
        "--shard-gb", type=float, default=5.0, help="size of a file in a folder (default 5)"
    )
    convert.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="a checkout of the authors' code: its prompts become dialect.yaml beside the weights",
    )
    look = add_verb(
        actions,
        "inspect",
        "tell what a checkpoint holds and which experiment it fits",
        "weights inspect weights/uniad",
        inspect_weights,
    )
    look.add_argument("source", type=Path, help="a file, folder or index, converted or not")
    look.add_argument("--json", action="store_true", help="print JSON")


def convert_weights(options: argparse.Namespace) -> None:
    """There or back."""
    from experiments.output_places import check_folder
    from odvla.checkpoints.convert import import_weights
    from odvla.checkpoints.export import export_weights
    from odvla.weight_names import LAYOUTS

    if (options.origin == OURS) == (options.target == OURS):
        raise UserError(
            f"one of --from and --to is odvla, the other one of {', '.join(THEIRS)}; not "
            f"{options.origin} and {options.target}"
        )
    if not 1 <= options.shard_gb * GIGABYTE < math.inf:
        raise UserError(f"--shard-gb must be a number above 0, not {options.shard_gb:g}")
    check_folder(options.out.parent)
    limit = int(options.shard_gb * GIGABYTE)
    console = Console(soft_wrap=True, highlight=False)
    there = options.target == OURS
    if there and (options.like is not None or options.file_format != "safetensors"):
        raise UserError("--like and --format belong to the way back (--from odvla)")
    if options.reference is not None and options.origin != "opendrivevla":
        raise UserError("--reference goes with --from opendrivevla: other weights read no prompts")
    if there:
        extra: dict[str, Callable[[Path], None]] = {}
        if options.reference is not None:
            from experiments.released_dialect import DIALECT, read_released_dialect
            from odvla.language.dialect_file import write_dialect

            # Before the conversion, which takes minutes: a wrong checkout shows at once.
            content = read_released_dialect(options.reference, options.source)
            extra[DIALECT] = lambda path: write_dialect(content, path)
        with console.status("converting"):
            report = import_weights(
                options.source, LAYOUTS[options.origin], options.out, limit=limit, extra=extra
            )
    else:
        with console.status("converting"):
            report = export_weights(
                options.source,
                LAYOUTS[options.target],
                options.out,
                like=options.like,
                pickled=options.file_format == "bin",
                limit=limit,
            )
    _print_report(console, report)


def _print_report(console: Console, report: Report) -> None:
    console.print(_table(report.components))
    for name, reason in report.unused.items():
        console.print(f"set aside: {name} ({reason})", markup=False)
    for component, number in report.left_out.items():
        console.print(f"left out: {component}, {number} tensors: it has no place there")
    if report.absent:
        console.print(
            f"missing: {', '.join(report.absent)}: odvla never reads them; --like DIR takes them "
            "from the weights that training started from",
            markup=False,
        )
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"written: {report.out}", markup=False)


def inspect_weights(options: argparse.Namespace) -> None:
    """What a file holds."""
    from experiments.fitting import fits
    from odvla.checkpoints.contents import contents_of

    found = contents_of(options.source)
    experiments = fits(found.ours) if found.ours else {}
    console = Console(soft_wrap=True, highlight=False)
    if options.json:
        console.print_json(data=as_tree(found, experiments))
    else:
        _print_contents(console, found, experiments)


def as_tree(found: Contents, experiments: dict[str, dict[str, str]]) -> dict[str, object]:
    """The findings as JSON can hold them."""
    from odvla.config import to_tree

    sizes = found.sizes
    return {
        "path": str(found.path),
        "format": found.format,
        "files": found.files,
        "layout": found.layout,
        "tensors": found.tensors,
        "parameters": found.parameters,
        "dtypes": found.dtypes,
        "components": {
            name: {"tensors": number, "parameters": values}
            for name, (number, values) in found.components.items()
        },
        "unused": found.unused,
        "unknown": list(found.unknown),
        "problem": found.problem,
        "recognised": list(found.recognised),
        "quirks": list(found.quirks),
        "sizes": {
            "encoder": to_tree(sizes.encoder),
            "track": to_tree(sizes.track),
            "map": to_tree(sizes.map),
            "language": to_tree(sizes.language),
            "projectors": {stream: config.kind for stream, config in sizes.projectors.items()},
            "vocabulary": sizes.vocab_rows,
        }
        if sizes
        else None,
        "experiments": experiments,
    }


def _print_contents(
    console: Console, found: Contents, experiments: dict[str, dict[str, str]]
) -> None:
    size = sum(found.files.values())
    whose = found.layout or "nobody's that is known here"
    console.print(f"{found.path}: {len(found.files)} file(s), {size / 1e6:,.1f} MB", markup=False)
    dtypes = ", ".join(f"{number} {name}" for name, number in found.dtypes.items())
    console.print(f"format: {found.format}; names: {whose}")
    console.print(f"{found.tensors:,} tensors, {found.parameters:,} parameters ({dtypes})")
    console.print(_table(found.components))
    for name, reason in found.unused.items():
        console.print(f"set aside by a conversion: {name} ({reason})", markup=False)
    if found.recognised:
        console.print(f"sizes: {', '.join(found.recognised)}")
    for quirk in found.quirks:
        console.print(quirk, markup=False)
    if found.problem:
        console.print(f"problem: {found.problem}", markup=False, style="yellow")
    for experiment, parts in experiments.items():
        wrong = {part: why for part, why in parts.items() if why}
        fitting = [part for part in parts if part not in wrong]
        if not wrong:
            console.print(f"fits {experiment}", style="green")
        elif fitting:
            part, why = next(iter(wrong.items()))
            console.print(
                f"fits {experiment} in {', '.join(fitting)}; not in {part}: {why}", markup=False
            )
    if experiments and all(all(parts.values()) for parts in experiments.values()):
        console.print("fits no listed experiment in any part")


def _table(components: dict[str, tuple[int, int]]) -> object:
    from rich.table import Table

    table = Table(box=None)
    table.add_column("component")
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for name, (number, values) in components.items():
        table.add_row(name, f"{number:,}", f"{values:,}")
    return table
