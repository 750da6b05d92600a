"""Tasks in this process, or in processes of their own on this machine."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from experiments.sweeps.definition import Resources
from experiments.sweeps.graph import Task
from experiments.verbs.parser import EXIT_OK, EXIT_USER_ERROR
from odvla.errors import UserError

LOG = "log.txt"
LAST_LINES = 2000  # characters of a log that are looked at for the reason of a failure


class InProcess:
    """One task after the other, here.

    Args:
        do: does a task.
    """

    capacity = 1

    def __init__(self, do: Callable[[Task], None]) -> None:
        self._do = do

    def submit(self, task: Task) -> Future[None]:
        """Do it now; the future is finished."""
        future: Future[None] = Future()
        try:
            self._do(task)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        return future

    def close(self) -> None:
        """Nothing runs on."""


class Processes:
    """Several tasks at once, each in a process with its own log and its share of the machine.

    Args:
        command: that does a task, less the task's name.
        folder: of a task: where its log goes.
        workers: tasks at once.
        resources: of one task: threads, and graphics cards, which are dealt out in turn.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Callable[[Task], Path],
        workers: int,
        resources: Resources,
    ) -> None:
        self.capacity = workers
        self._command, self._folder, self._resources = tuple(command), folder, resources
        self._pool = ThreadPoolExecutor(workers)
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(workers):
            self._places.put(place)

    def submit(self, task: Task) -> Future[None]:
        """Start a process."""
        return self._pool.submit(self._run, task)

    def close(self) -> None:
        """Stop the processes; what they did so far is kept in their checkpoints."""
        with self._lock:
            for process in self._alive:
                process.send_signal(signal.SIGTERM)
        self._pool.shutdown(cancel_futures=True)

    def _run(self, task: Task) -> None:
        place = self._places.get()
        try:
            code, log = self._wait(task, place)
        finally:
            self._places.put(place)
        if code == EXIT_OK:
            return
        said = _last_line(log)
        if code == EXIT_USER_ERROR:
            raise UserError(said.removeprefix("error: "))
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RuntimeError(f"{how}: {said} (see {log})")

    def _wait(self, task: Task, place: int) -> tuple[int, Path]:
        folder = self._folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / LOG
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self._command, task.id], stdout=out, stderr=out, env=self._environment(place)
            )
        with self._lock:
            self._alive.add(process)
        try:
            return process.wait(), log
        finally:
            with self._lock:
                self._alive.discard(process)

    def _environment(self, place: int) -> dict[str, str]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._resources.cpus)}
        count = int(self._resources.gpus)
        if count:
            cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            first = place * count
            numbers = [str(number) for number in range(first, first + count)]
            if cards != [""]:
                numbers = cards[first : first + count]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(numbers)
        return environment


def task_command(arguments: Sequence[str]) -> list[str]:
    """The command line that does a task in another process, less the task's name."""
    return [sys.executable, "-m", "experiments", *arguments]


def _last_line(log: Path) -> str:
    text = log.read_text(errors="replace")[-LAST_LINES:].strip()
    return text.splitlines()[-1].strip() if text else "nothing was printed"
