"""The verbs about data: `data make`, `data index`, `data show`; others from describe, exchange."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.verbs import describe, exchange
from experiments.verbs.parser import Verbs, add_verb
from odvla.errors import UserError


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    data = verbs.add_parser(
        "data",
        help="make, index, show, describe, export and compare data",
        description="Make, index, show, describe, export and compare data.",
    )
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
    index = add_verb(
        actions,
        "index",
        "read a root's tables, maps and CAN bus into one file that opens at once",
        "data index data/nuscenes --version v1.0-trainval",
        make_index,
    )
    add_root(index)
    index.add_argument(
        "--out", type=Path, help="file to write (default: in the root, or in ODVLA_CACHE)"
    )
    show = add_verb(
        actions,
        "show",
        "draw a sample: six cameras with boxes and lidar, and the scene from above",
        "data show data/nuscenes --sample ca9a282c9e77460f8360f564131a8af5 --out sample.png",
        show_sample,
    )
    add_root(show)
    show.add_argument("--sample", metavar="TOKEN", help="default: the root's first")
    show.add_argument("--out", type=Path, default=Path("sample.png"), help="picture to write")
    describe.add(actions)
    exchange.add(actions, add_root)


def add_root(parser: argparse.ArgumentParser) -> None:
    """A data root and its version."""
    parser.add_argument("root", type=Path, help="a nuScenes root, or a town")
    parser.add_argument("--version", help="e.g. v1.0-trainval (default: the only one there is)")


def version_of(options: argparse.Namespace) -> str:
    """The chosen version, or the only one of the root.

    Raises:
        UserError: there are none or several to choose from.
    """
    if options.version:
        return options.version
    found = sorted(p.name for p in options.root.glob("v1.0-*") if p.is_dir())
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise UserError(
            f"{options.root} must hold one version of tables, or name one with --version; "
            f"found: {listed}"
        )
    return found[0]


def make_index(options: argparse.Namespace) -> None:
    """An index."""
    from datamodules.index_file import map_index
    from experiments.output_places import check_file
    from experiments.prepare import index_with_bar

    if options.out:
        check_file(options.out)
    version = version_of(options)
    file = index_with_bar(options.root, version, options.out)
    index = map_index(file, options.root)
    Console(soft_wrap=True, highlight=False).print(
        f"{file}: {len(index.scenes)} scenes, {len(index.frames)} key-frames, "
        f"{len(index.annotations.token)} boxes, {len(index.maps)} maps, "
        f"{file.stat().st_size / 1e6:.0f} MB"
    )


def show_sample(options: argparse.Namespace) -> None:
    """A picture."""
    from datamodules.nuscenes import NuScenesDataConfig
    from experiments.cameras_picture import draw_sample, sample_view
    from experiments.output_places import check_file
    from experiments.pictures import PICTURE_ENDINGS, save_picture
    from experiments.prepare import index_with_bar

    check_file(options.out, PICTURE_ENDINGS)
    version = version_of(options)
    index_with_bar(options.root, version)
    data = NuScenesDataConfig(str(options.root), version).build()
    token = options.sample or data.index.frames[0].token
    size = data.index.frame(token).cameras[0].size
    data = NuScenesDataConfig(str(options.root), version, image_size=size).build()
    save_picture(draw_sample(sample_view(data, token), token), options.out)
    Console(soft_wrap=True, highlight=False).print(f"{options.out}")


def make_data(options: argparse.Namespace) -> None:
    """A town."""
    from experiments.output_places import check_folder
    from experiments.prepare import make_town_at
    from experiments.schema import TownSettings

    check_folder(options.out)
    width, cross, height = options.image_size.partition("x")
    if not cross or not width.isdigit() or not height.isdigit():
        raise UserError(f"--image-size is width x height, e.g. 320x180, not {options.image_size!r}")
    town = TownSettings(options.scenes, (int(width), int(height)), options.seed, options.workers)
    made = make_town_at(options.out, town)
    Console(soft_wrap=True).print(f"{options.scenes} scenes ({town.version}) in {made}")
