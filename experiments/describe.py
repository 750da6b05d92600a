"""A data set on a root, described on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from datamodules.agent_trajectories import AgentTrajectoriesConfig
from datamodules.alignment import AlignmentConfig
from datamodules.conversations import LanguageDataConfig
from datamodules.description import Description, Lengths, describe
from datamodules.drivelm import DriveLMConfig
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.joining import JoinReport
from datamodules.mixture import MixtureConfig
from datamodules.nucaption import NuCaptionConfig
from datamodules.nuscenes_qa import NuScenesQAConfig
from datamodules.nux import NuXConfig
from datamodules.omnidrive import OmniDriveConfig
from datamodules.tod3cap import TOD3CapConfig
from odvla.config import apply_overrides
from odvla.errors import UserError
from odvla.language.model_folder import model_folder
from odvla.language.prompts import Dialect
from odvla.language.tokenizer import ChatTokenizer

# A data set of one's own is described by adding its config here.
DATA_SETS: dict[str, Callable[[], LanguageDataConfig]] = {
    "tod3cap": TOD3CapConfig,
    "nucaption": NuCaptionConfig,
    "nuscenes_qa": NuScenesQAConfig,
    "nux": NuXConfig,
    "drivelm": DriveLMConfig,
    "omnidrive": OmniDriveConfig,
    "gpt_driver": GPTDriverConfig,
    "gpt_driver_thoughts": partial(GPTDriverConfig, conversations_file="gpt_driver/train.json"),
    "mixture": MixtureConfig,
    "alignment": AlignmentConfig,
    "agent_trajectories": AgentTrajectoriesConfig,
}
TITLES = {
    "kind": "kind",
    "dataset": "data set",
    "template_type": "template",
    "num_hop": "hops",
    "command": "command",
    "known_waypoints": "known waypoints",
    "class": "class",
    "topic": "topic",
    "tags": "scored by tag",
    "part": "part",
    "decision": "decision",
    "view": "view",
}
ROWS = 10  # of a table of counts; the rest is summed up
BAR = 24  # characters of the longest bar


def describe_data(
    name: str,
    root: Path,
    version: str,
    split: str,
    changes: list[str],
    *,
    tokenizer: Path | None = None,
    examples: int = 3,
    progress: bool = True,
) -> Description:
    """Go through a data set, with a progress bar.

    Args:
        name: one of DATA_SETS.
        root: the data root.
        version: of its tables.
        split: train or val.
        changes: settings of the data set, as key=value.
        tokenizer: folder with a tokenizer.json to count tokens with.
        examples: how many to show.
        progress: show the bar.

    Raises:
        UserError: an unknown data set or setting, a missing file, a record that does not fit.
    """
    if name not in DATA_SETS:
        close = get_close_matches(name, DATA_SETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(DATA_SETS)}"
        raise UserError(f"there is no data set {name!r}; {hint}")
    config = replace(DATA_SETS[name](), root=str(root), version=version)
    config = apply_overrides(config, changes)
    thinking = getattr(config, "thinking", None) is not None
    data = config.build(None, Dialect("reasoning" if thinking else "odvla"))
    tokens_of = None
    if tokenizer is not None:
        chat = ChatTokenizer.load(model_folder(str(tokenizer), "--tokenizer", "tokenizer.json"))

        def tokens_of(text: str) -> int:
            return len(chat.text_ids(text))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar:
        task = bar.add_task(f"reading {name}", total=None)
        data.prepare_data()
        return describe(
            data,
            split,
            name=name,
            tokens_of=tokens_of,
            examples=examples,
            told=lambda done, total: bar.update(task, completed=done, total=total),
        )


def show(found: Description, console: Console) -> None:
    """Print a description."""
    title = Text.assemble(
        (found.name, "bold"), f"  {found.split} of {found.version}, {found.root}\n"
    )
    title.append(
        f"{found.conversations:,} conversations about {found.frames_with:,} of {found.frames:,} "
        "key-frames"
    )
    if found.per_frame is not None:
        each = found.per_frame
        title.append(f"; a key-frame has {each.shortest} to {each.longest}, median {each.median:g}")
    console.print(Panel(title, expand=False))
    for report in found.reports:
        console.print(_joins(report))
    for block in (*_counts(found), _lengths(found)):
        console.print(Padding(block, (1, 0, 0, 0)))
    for number, example in enumerate(found.examples, 1):
        text = Text.assemble(
            ("asked     ", "dim"), example.question, "\n", ("answered  ", "dim"), example.answer
        )
        where = f"example {number}: {example.kind}, {example.scene}, sample {example.sample_token}"
        console.print(Padding(Panel(text, title=where, title_align="left"), (1, 0, 0, 0)))


def _joins(report: JoinReport) -> RenderableType:
    table = Table(box=None)
    table.add_column("records", justify="right")
    table.add_column("", justify="right")
    table.add_column("what became of them")
    table.add_column("e.g.", style="dim", overflow="fold")
    table.add_row(f"{report.records:,}", "", "in the file", "")
    joined = ", ".join(filter(None, ("joined", report.how)))
    table.add_row(f"{report.joined:,}", _share(report.joined, report.records), joined, "")
    for left in report.left_out:
        share = _share(left.count, report.records)
        table.add_row(f"{left.count:,}", share, f"left out: {left.reason}", Text(left.example))
    if report.kept is not None:
        table.add_row(f"{report.kept:,}", "", f"conversations kept by {report.sampling}", "")
    return Group("", Text(str(report.file), style="bold"), table)


def _counts(found: Description) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    groups = {TITLES[group]: counts for group, counts in found.counts.items()}
    for kind, answers in found.common_answers.items():
        groups[f"short answers ({kind})"] = answers
    for title, counts in groups.items():
        if title in ("kind", "data set") and len(counts) == 1:
            continue
        table = Table(box=None)
        table.add_column(title)
        table.add_column("conversations", justify="right")
        table.add_column("", justify="right")
        table.add_column("")
        shown = dict(list(counts.items())[:ROWS])
        rest = len(counts) - len(shown)
        if rest:
            shown[f"{rest} others"] = sum(counts.values()) - sum(shown.values())
        most = max(counts.values())
        for value, count in shown.items():
            bar = "█" * round(BAR * min(count, most) / most)
            table.add_row(Text(value), f"{count:,}", _share(count, found.conversations), bar)
        blocks.append(table)
    return blocks


def _lengths(found: Description) -> RenderableType:
    table = Table(box=None, title="text lengths: median, 95 of 100 at most, longest")
    table.title_justify = "left"
    table.add_column("kind")
    table.add_column("text")
    units = ["characters", "words"]
    if any(row.tokens is not None for row in found.lengths):
        units.append("tokens")
    for unit in units:
        table.add_column(unit, justify="right")
    for row in found.lengths:
        values = (getattr(row, unit) for unit in units)
        table.add_row(row.kind, row.text, *(_told(value) for value in values))
    return table


def _told(lengths: Lengths | None) -> str:
    if lengths is None:
        return ""
    return f"{lengths.median:>6,.0f} {lengths.most:>6,.0f} {lengths.longest:>6,}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
