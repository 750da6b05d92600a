"""A sweep's progress in the terminal: what runs and how far it is, and the counts of the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.sweeps.graph import SweepPlan, Task
from experiments.sweeps.schedule import Board, TaskState
from experiments.sweeps.work import STATUS

ORDER = ("done", "kept", "running", "waiting", "failed", "left out")
STYLES = {"done": "green", "kept": "green", "failed": "red", "left out": "yellow"}


class SweepView:
    """Live lines on a terminal; in a file or pipe one line for each task that ends.

    Args:
        console: where to.
        plan: the sweep.
        live: False where tasks draw bars of their own.
    """

    def __init__(self, console: Console, plan: SweepPlan, *, live: bool) -> None:
        self._console, self._plan = console, plan
        self._live = Live(console=console, refresh_per_second=2) if live else None
        self._told: set[str] = set()
        self._started = time.monotonic()

    def __enter__(self) -> Callable[[Board], None]:
        """Begin; the result is to be called whenever something may have changed."""
        if self._live is not None and self._console.is_terminal:
            self._live.start()
        return self._show

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal in order."""
        if self._live is not None:
            self._live.stop()

    def _show(self, board: Board) -> None:
        for state in board.states.values():
            if state.outcome in ("done", "failed", "left out") and state.task.id not in self._told:
                self._told.add(state.task.id)
                self._console.print(self._sentence(state), soft_wrap=True)
        if self._live is not None and self._live.is_started:
            self._live.update(Group(self._running(board), self._counts(board)))

    def _sentence(self, state: TaskState) -> Text:
        text = Text(f"{state.outcome:<9}", STYLES[state.outcome])
        text.append(f"{state.task.id:<26} {_who(self._plan, state.task)}", "default")
        if state.outcome == "done":
            text.append(f"  {state.seconds:.0f} s", "dim")
        elif state.error:
            text.append(f"  {state.error}", "dim")
        return text

    def _running(self, board: Board) -> Table:
        table = Table(box=None, padding=(0, 2))
        for column in ("running", "", "step", "loss", "s"):
            table.add_column(column)
        for state in board.states.values():
            if state.outcome == "running":
                seen = _status(self._plan.task_folder(state.task) / STATUS)
                steps = f"{seen['step']}/{seen['steps']}" if "step" in seen else ""
                loss = f"{seen['loss']:.3f}" if seen.get("loss") is not None else ""
                seconds = f"{time.monotonic() - state.started:.0f}"
                who = _who(self._plan, state.task)
                table.add_row(state.task.id, who, steps, loss, seconds)
        return table

    def _counts(self, board: Board) -> Text:
        counts = board.counts()
        parts = [f"{counts[name]} {name}" for name in ORDER if name in counts]
        return Text(f"{', '.join(parts)}; {time.monotonic() - self._started:.0f} s", "bold")


def _who(plan: SweepPlan, task: Task) -> str:
    """Which points a task is done for."""
    users = [point for point in plan.points if task in plan.chain(point)]
    return users[0].title if len(users) == 1 else f"{len(users)} points"


def _status(path: Path) -> dict[str, float]:
    """What the task says of itself; nothing while it says nothing."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
