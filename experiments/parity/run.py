"""Every recorded case of a directory through our modules, one line a case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.parity import (
    clips,
    glue,
    labels,
    maps,
    planning,
    plans,
    prompts,
    tracks,
    vision,
    whole,
)
from experiments.parity.golden import Check, Golden
from odvla.errors import UserError

Case = Callable[[Golden, str], Iterator[Check]]
# By the start of a case's name; the longest that fits counts.
CASES: dict[str, Case] = {
    "a_resnet_fpn": vision.backbone,
    "b_bev_encoder": vision.bev_encoder,
    "b_rotate": vision.rotation,
    "c_track_decoder": tracks.decoder,
    "d_track_memory": tracks.track_life,
    "e_clip_matcher": clips.matcher,
    "f_msda": vision.attention_unit,
    "f_panseg": maps.head,
    "g_glue": glue.glue,
    "h_planning": planning.planning_metric,
    "i_retrieve_traj": plans.retrieve_traj,
    "j_label_mask": prompts.label_mask,
    "j_prompts": prompts.prompts,
    "k_e2e": whole.whole,
    "l_panseg_loss": maps.losses,
    "m_sdc": labels.planning_labels,
    "n_track_train": clips.training_clip,
}
# Cases that compare gradients; all others run without.
WITH_GRADIENTS = {"e_clip_matcher", "l_panseg_loss", "n_track_train"}
# What cases read besides their own files, or nothing reads here: by the start of a name.
NO_CASES = ("state_dict_keys", "uniad_small_weights", "g_img_feat_2D", "index")
SUFFIXES = (".json", ".npz", ".safetensors")
# Cases whose modules are not there yet: they are named, so that nobody takes them for passed.
NOT_YET: dict[str, str] = {}


@dataclass(frozen=True)
class Outcome:
    """One case."""

    stem: str
    checks: tuple[Check, ...]
    failure: str  # why it could not be run to its end; "" if it could

    @property
    def passed(self) -> bool:
        """Everything was compared and lies within its tolerance."""
        return not self.failure and bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def absolute(self) -> float:
        """Largest absolute difference."""
        return max((check.absolute for check in self.checks), default=float("nan"))

    @property
    def relative(self) -> float:
        """Largest relative difference."""
        return max((check.relative for check in self.checks), default=float("nan"))


def cases(folder: Path) -> list[str]:
    """Names of the recorded cases.

    A case is a .json with settings; a clip's frames and a case's further results are no cases.
    """
    stems = {path.stem for path in _recordings(folder)}
    known = {stem for stem in stems if _start(stem, CASES) or _start(stem, NOT_YET)}
    return sorted(
        stem
        for stem in known
        if not any(stem.startswith(f"{other}_") and _owns(other, stem) for other in known)
    )


def unknown(folder: Path) -> list[str]:
    """Names of the recordings that belong to no case that is known here."""
    known = (*CASES, *NOT_YET, *NO_CASES)
    return sorted(path.name for path in _recordings(folder) if not _start(path.stem, known))


def _recordings(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]


def _owns(case: str, stem: str) -> bool:
    """Whether a longer name is a part of the case: a frame, or results of other settings."""
    rest = stem.removeprefix(f"{case}_")
    return rest.startswith("frame") or rest.endswith("losses")


def _start(stem: str, table: Iterable[str]) -> str | None:
    return max((start for start in table if stem.startswith(start)), key=len, default=None)


def run_case(golden: Golden, stem: str) -> Outcome:
    """One case; whatever stops it is part of the outcome."""
    start = _start(stem, CASES)
    assert start is not None
    found: list[Check] = []
    torch.manual_seed(0)
    try:
        with torch.set_grad_enabled(start in WITH_GRADIENTS):
            found.extend(CASES[start](golden, stem))
    except (
        ValueError,  # among them UserError
        KeyError,
        RuntimeError,
        AssertionError,
        IndexError,
        TypeError,  # a file of another form
        AttributeError,
    ) as error:
        reason = str(error).strip().splitlines()
        return Outcome(stem, tuple(found), f"{type(error).__name__}: {reason[0] if reason else ''}")
    return Outcome(stem, tuple(found), "")


def run_parity(folder: Path, console: Console, *, every: bool = False) -> bool:
    """Run all cases and print one line each.

    Args:
        folder: a golden directory.
        console: where it is printed.
        every: print every comparison, not only those that fail.

    Returns:
        Whether all passed and every file that index.json lists is there.

    Raises:
        UserError: the directory holds no recordings, or its index.json cannot be read.
    """
    golden = Golden(folder)
    names, absent, others = cases(folder), golden.absent(), unknown(folder)
    if not names and not absent:
        raise UserError(f"{folder} holds no recorded case")
    for name in absent:
        console.print(f"[red]FAIL[/]  {escape(name)}: index.json lists it, but it is not there")
    for name in others:
        console.print(f"[yellow]SKIP[/]  {escape(name)}: it belongs to no case that is known here")
    passed = not absent
    run, missing = 0, 0
    for stem in names:
        start = _start(stem, CASES)
        if start is None:
            missing += 1
            reason = NOT_YET[_start(stem, NOT_YET) or ""]
            console.print(f"[yellow]SKIP[/]  {stem:24s} not implemented yet: {reason}")
            continue
        run += 1
        outcome = run_case(golden, stem)
        passed &= outcome.passed
        _print(outcome, console)
        shown = [check for check in outcome.checks if every or not check.passed]
        if shown:
            console.print(_table(shown))
    verdict = "all pass" if passed else "NOT all pass"
    console.print(
        f"{run} cases run: {verdict}; {missing} not implemented yet; "
        f"{len(absent)} listed files absent; {len(others)} of no known case"
    )
    return passed


def _print(outcome: Outcome, console: Console) -> None:
    verdict = "[green]PASS[/]" if outcome.passed else "[red]FAIL[/]"
    numbers = (
        f"{len(outcome.checks):4d} arrays  abs {outcome.absolute:.1e}  rel {outcome.relative:.1e}"
    )
    console.print(f"{verdict}  {outcome.stem:24s} {numbers}  {escape(outcome.failure)}")


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in ("", "array", "shape", "kind", "absolute", "relative"):
        table.add_column(column)
    for check in checks:
        table.add_row(
            "ok" if check.passed else "[red]FAIL[/]",
            check.name,
            str(tuple(check.theirs.shape)),
            check.kind,
            f"{check.absolute:.1e}",
            f"{check.relative:.1e}",
        )
    return table
