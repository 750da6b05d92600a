"""Which task runs when: those whose predecessors are done, as many at once as there is room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Literal, Protocol

from experiments.sweeps.graph import Task
from odvla.errors import UserError

Outcome = Literal["waiting", "running", "done", "kept", "failed", "left out"]
LOOK_EVERY_S = 0.5


class Engine(Protocol):
    """Something that does tasks: this process, others, other machines."""

    capacity: int  # tasks at once

    def submit(self, task: Task) -> Future[None]:
        """Begin a task; its future fails with what stopped it."""

    def close(self) -> None:
        """Stop what is still running."""


@dataclass
class TaskState:
    """How it stands with one task."""

    task: Task
    outcome: Outcome = "waiting"
    attempts: int = 0
    error: str = ""
    started: float = 0.0
    seconds: float = 0.0


@dataclass
class Board:
    """How it stands with all tasks."""

    states: dict[str, TaskState] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Tasks by outcome."""
        found: dict[str, int] = {}
        for state in self.states.values():
            found[state.outcome] = found.get(state.outcome, 0) + 1
        return found

    @property
    def failed(self) -> list[TaskState]:
        """Tasks that failed, not those left out because of them."""
        return [state for state in self.states.values() if state.outcome == "failed"]


def run_tasks(
    tasks: Sequence[Task],
    is_done: Callable[[Task], bool],
    engine: Engine,
    *,
    retries: int = 0,
    watch: Callable[[Board], None] = lambda board: None,
) -> Board:
    """Do all tasks that can be done; a failed one stops those behind it and no others.

    Args:
        tasks: in an order that may be followed.
        is_done: whether a task's result is there from before.
        engine: does them.
        retries: attempts after the first; a mistake of the user's is not tried again.
        watch: called now and then.
    """
    board = Board({task.id: TaskState(task) for task in tasks})
    for state in board.states.values():
        if is_done(state.task):
            state.outcome = "kept"
    running: dict[Future[None], TaskState] = {}
    while True:
        _leave_out(board)
        for state in _ready(board):
            if len(running) >= engine.capacity:
                break
            state.outcome, state.started = "running", time.monotonic()
            state.attempts += 1
            running[engine.submit(state.task)] = state
            watch(board)
        if not running:
            break
        finished, _ = wait(running, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
        for future in finished:
            _settle(running.pop(future), future, is_done, retries)
        watch(board)
    watch(board)
    return board


def _ready(board: Board) -> list[TaskState]:
    """Waiting tasks whose predecessors are done.

    Those that come late in a pipeline go first, so that points are finished one after the other.
    """
    return [
        state
        for state in reversed(board.states.values())
        if state.outcome == "waiting"
        and all(board.states[name].outcome in ("done", "kept") for name in state.task.after)
    ]


def _leave_out(board: Board) -> None:
    """Tasks behind a failed one cannot be done."""
    for state in board.states.values():  # predecessors stand before those that need them
        broken = [
            name
            for name in state.task.after
            if board.states[name].outcome in ("failed", "left out")
        ]
        if state.outcome == "waiting" and broken:
            state.outcome, state.error = "left out", f"{broken[0]} failed"


def _settle(
    state: TaskState, future: Future[None], is_done: Callable[[Task], bool], retries: int
) -> None:
    """Take note of a task that has ended."""
    state.seconds = time.monotonic() - state.started
    try:
        future.result()
        if not is_done(state.task):
            raise RuntimeError("the task ended without an error, but left no result")
    except (KeyboardInterrupt, CancelledError):
        raise
    except UserError as error:
        state.outcome, state.error = "failed", str(error)
    except Exception as error:
        state.error = str(error) or type(error).__name__
        state.outcome = "failed" if state.attempts > retries else "waiting"
    else:
        state.outcome, state.error = "done", ""
