"""The order of tasks, failures and retries, with an engine that only pretends."""

from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.sweeps.graph import Task
from experiments.sweeps.schedule import run_tasks
from odvla.errors import UserError


class Pretend:
    """Finishes tasks at once; fails those it is told to, so often."""

    def __init__(self, failures=(), capacity=2):
        self.capacity = capacity
        self.failures = dict(failures)
        self.order = []
        self.finished = set()

    def submit(self, task):
        self.order.append(task.id)
        future = Future()
        error = self.failures.get(task.id, [])
        if error:
            future.set_exception(error.pop(0))
        else:
            future.set_result(None)
            self.finished.add(task.id)
        return future

    def is_done(self, task):
        return task.id in self.finished

    def close(self):
        pass


def task(name, *after):
    return Task(name, "perception", None, after)


CHAIN = (task("a"), task("b", "a"), task("c", "b"), task("d", "a"), task("e"))


def outcomes(board):
    return {name: state.outcome for name, state in board.states.items()}


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=12), st.integers(1, 4), st.sets(st.integers())
)
def test_nothing_runs_before_what_it_needs_and_all_that_can_does(parents, capacity, kept):
    tasks = [
        task(str(i), *({str(parent % i)} if i and parent % 3 else ()))
        for i, parent in enumerate(parents)
    ]
    engine = Pretend(capacity=capacity)
    board = run_tasks(tasks, lambda t: int(t.id) in kept or engine.is_done(t), engine)
    assert len(engine.order) == len(set(engine.order))
    assert set(engine.order) == {t.id for t in tasks if int(t.id) not in kept}
    for t in tasks:
        for before in t.after:
            if t.id in engine.order and before in engine.order:
                assert engine.order.index(before) < engine.order.index(t.id)
    assert set(outcomes(board).values()) <= {"done", "kept"}


def test_a_failure_stops_what_hangs_on_it_and_nothing_else():
    engine = Pretend({"b": [RuntimeError("broke"), RuntimeError("broke again")]})
    board = run_tasks(CHAIN, engine.is_done, engine, retries=1)
    wanted = {"a": "done", "b": "failed", "c": "left out", "d": "done", "e": "done"}
    assert outcomes(board) == wanted
    assert board.states["b"].error == "broke again"
    assert board.states["b"].attempts == 2
    assert board.states["c"].error == "b failed"


def test_a_crash_is_tried_again_and_a_mistake_of_the_users_is_not():
    engine = Pretend({"a": [RuntimeError("worker died")], "e": [UserError("no such file")]})
    board = run_tasks(CHAIN, engine.is_done, engine, retries=1)
    assert board.states["a"].outcome == "done"
    assert board.states["a"].attempts == 2
    assert board.states["e"].outcome == "failed"
    assert board.states["e"].attempts == 1


def test_an_interruption_is_passed_on():
    with pytest.raises(KeyboardInterrupt):
        run_tasks(CHAIN, lambda t: False, Pretend({"e": [KeyboardInterrupt()]}))


def test_a_task_that_leaves_no_result_is_not_taken_for_done():
    engine = Pretend()
    board = run_tasks(CHAIN, lambda t: False, engine)
    assert board.states["a"].outcome == "failed"
    assert "left no result" in board.states["a"].error
