"""Every recorded case of a directory through our modules, one line a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.parity import clip_matching, map_head, tracks, training, vision, whole
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
    "e_clip_matcher": clip_matching.clip_matcher,
    "f_msda": vision.attention_unit,
    "f_panseg": map_head.panoptic_map,
    "k_e2e": whole.whole,
    "l_panseg_loss": map_head.panoptic_losses,
    "n_track_train": training.clip,
}
# Files that are no cases of the vision tower: what they are instead.
OTHERS = {
    "uniad_small_weights": "weights",
    "g_": "language side",
    "h_": "planning metric",
    "i_": "reading of plans",
    "j_": "prompts",
    "m_": "labels",
    "state_dict_keys": "key lists",
    "index": "list of files",
}
# Gradients are what these compare; the others need none.
LEARNING = ("e_clip_matcher", "l_panseg_loss", "n_track_train")


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
    """Names of the recorded cases: every .json and .safetensors that belongs to one."""
    stems = {path.stem for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
    found = set()
    for stem in stems:
        if _start(stem, CASES) is None:
            continue
        # Frames of a clip and second files belong to the case whose settings they share.
        owners = [other for other in stems if (folder / f"{other}.json").is_file()]
        longer = [o for o in owners if stem.startswith(f"{o}_") and _start(o, CASES)]
        found.add(min(longer, key=len) if longer and not _stands_alone(folder, stem) else stem)
    return sorted(found)


def _stands_alone(folder: Path, stem: str) -> bool:
    """Whether a case has settings of its own, not only results."""
    import json

    path = folder / f"{stem}.json"
    if not path.is_file():
        return False
    content = json.loads(path.read_text())
    return not all(name.startswith("out/") for name in content)


def _start(stem: str, table: dict[str, Case] | dict[str, str]) -> str | None:
    fits = [start for start in table if stem.startswith(start)]
    return max(fits, key=len, default=None)


def run_case(golden: Golden, stem: str) -> Outcome:
    """One case; whatever stops it is part of the outcome."""
    start = _start(stem, CASES)
    assert start is not None
    found: list[Check] = []
    torch.manual_seed(0)
    try:
        with torch.set_grad_enabled(start in LEARNING):
            for check in CASES[start](golden, stem):
                found.append(_kept(check))
    except (UserError, ValueError, KeyError, RuntimeError, AssertionError, IndexError) as error:
        reason = str(error).strip().splitlines()
        return Outcome(stem, tuple(found), f"{type(error).__name__}: {reason[0] if reason else ''}")
    return Outcome(stem, tuple(found), "")


def _kept(check: Check) -> Check:
    """A check without its graph."""
    return Check(check.name, check.ours.detach(), check.theirs.detach(), check.kind)


def run_parity(folder: Path, console: Console, *, every: bool = False) -> bool:
    """Run all cases and print one line each.

    Args:
        folder: a golden directory.
        console: where it is printed.
        every: print every comparison, not only those that fail.

    Returns:
        Whether all passed.

    Raises:
        UserError: the directory holds no recordings.
    """
    golden = Golden(folder)
    names = cases(folder)
    if not names:
        raise UserError(f"{folder} holds no recorded case of the vision tower")
    passed = True
    for stem in names:
        outcome = run_case(golden, stem)
        passed &= outcome.passed
        _print(outcome, console)
        shown = [check for check in outcome.checks if every or not check.passed]
        if shown:
            console.print(_table(shown))
    console.print(f"{len(names)} cases: {'all pass' if passed else 'NOT all pass'}")
    return passed


def _print(outcome: Outcome, console: Console) -> None:
    verdict = "[green]PASS[/]" if outcome.passed else "[red]FAIL[/]"
    numbers = (
        f"{len(outcome.checks):4d} arrays  abs {outcome.absolute:.1e}  rel {outcome.relative:.1e}"
    )
    console.print(f"{verdict}  {outcome.stem:24s} {numbers}  {outcome.failure}")


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
