"""Runs in MLflow: a parent run an experiment, a child run a stage.

The default store is a SQLite file in the runs folder; MLFLOW_TRACKING_URI names another one. Where
that is a server which does not answer, or stops answering while a run goes on, runs go to the file
with a tag that says so: `runs push` brings them to the server later (see run_copies.py).
Metrics are sent in batches, so that tracking costs next to nothing. What the machine does meanwhile
is sampled by MLflow's own monitor, under names that begin with system/.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from experiments.tracking_store import (
    CONTINUES,
    EXPERIMENT,
    MEANT_FOR,
    answers,
    local_store,
    shown,
    store_uri,
)
from odvla.weights import write_atomically

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
BATCH = 200  # metrics sent at once
EVERY_S = 30.0  # or what there is, so that a slow run is seen while it goes on
MAX_PARAMS = 100  # MLflow takes so many at once
MAX_PARAM_LENGTH = 500


class StageLogger(Logger):
    """Lightning logger that writes into one of a tracker's runs.

    Args:
        tracker: that has opened the run.
        stage: whose run it is.
    """

    def __init__(self, tracker: Tracker, stage: str) -> None:
        super().__init__()
        self._tracker = tracker
        self._stage = stage
        self._pending: list[tuple[str, float, int, int]] = []
        self._sent_s = time.monotonic()

    @property
    def name(self) -> str:
        """Name of the MLflow experiment."""
        return EXPERIMENT

    @property
    def version(self) -> str:
        """Id of the MLflow run; "" on processes other than the first."""
        return self._tracker.id_of(self._stage)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The tracker has logged the config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue metrics."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            if name != "epoch":
                self._pending.append((name, float(value), now, step or 0))
        if len(self._pending) >= BATCH or time.monotonic() - self._sent_s >= EVERY_S:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Send what is queued."""
        if self._pending:
            from mlflow.entities import Metric

            self._tracker.log_metrics(self._stage, [Metric(*entry) for entry in self._pending])
        self._pending = []
        self._sent_s = time.monotonic()

    def finalize(self, status: str) -> None:
        """Send what is left."""
        self.flush()


@dataclass(frozen=True)
class RunRecord:
    """What a run begins with, in whichever store."""

    name: str
    config: Mapping[str, Any]
    tags: Mapping[str, Any]


class Tracker:
    """The MLflow runs of one experiment.

    Args:
        folder: the experiment's run folder; the runs' ids are kept there, so that an interrupted
            experiment goes on in the same runs.
        store: the runs folder, where the default store lies.
        name: of the experiment.
        active: False on processes other than the first.
        parent_id: run that the experiment's own run is a child of, e.g. a sweep's.
    """

    def __init__(
        self, folder: Path, store: Path, name: str, active: bool, parent_id: str | None = None
    ) -> None:
        self._parent_id = parent_id
        self._file = folder / "mlflow.json"
        self._store = store
        self._name = name
        self._client: MlflowClient | None = None
        self._ids: dict[str, str] = {}
        self._records: dict[str, RunRecord] = {}  # of the runs that this process has open
        self._left: dict[str, str] = {}  # runs at a server that has gone since
        self._monitors: dict[str, SystemMetricsMonitor] = {}
        if not active:
            return
        _hush()
        store.mkdir(parents=True, exist_ok=True)
        self._meant = ""  # the server that did not answer
        uri = store_uri(store)
        if not answers(uri):
            self._meant = shown(uri)
            log.warning(
                "the MLflow server %s does not answer: this run is logged to %s; later, "
                "`lightning_app.py runs push %s` brings it there",
                self._meant,
                local_store(store),
                self._meant,
            )
            uri = local_store(store)
        self._connect(uri)
        if self._file.is_file():
            kept = json.loads(self._file.read_text())
            if kept.get("uri") == self.uri and kept.get("experiment") == self._experiment:
                self._ids = kept["runs"]

    def _connect(self, uri: str) -> None:
        """Write to a store from now on."""
        from mlflow.tracking import MlflowClient

        self.uri = uri
        # Two that begin at once would both make the tables of a new store, and the experiment.
        with FileLock(self._store / ".mlflow.lock"):
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                self._experiment = found.experiment_id
                return
            # Without a location, the artifacts of a SQLite store go to the working directory.
            is_local = uri == local_store(self._store)
            artifacts = (self._store / "mlartifacts").resolve().as_uri() if is_local else None
            self._experiment = self._client.create_experiment(EXPERIMENT, artifacts)

    def start(self, config: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Open the parent run, the one kept from before or a new one."""
        self._begin("", RunRecord(self._name, config, tags), resumed=True)

    @property
    def run_id(self) -> str:
        """Id of the parent run, once it is open."""
        return self._ids[""]

    def id_of(self, stage: str) -> str:
        """Id of a stage's run; "": there is none, or another process writes it."""
        return self._ids.get(stage, "")

    def stage(
        self, stage: str, resumed: bool, config: Mapping[str, Any], tags: Mapping[str, Any]
    ) -> StageLogger:
        """Open a stage's child run, and watch the machine until it is closed.

        Args:
            stage: its name.
            resumed: go on in the run kept from before.
            config: what is logged as parameters.
            tags: seed, git commit, parent card.
        """
        record = RunRecord(f"{self._name}/{stage}", config, {**tags, "stage": stage})
        self._begin(stage, record, resumed)
        self._watch_machine(stage)
        return StageLogger(self, stage)

    def log_metrics(self, stage: str, metrics: list[Metric]) -> None:
        """Log metrics of a stage's run ("": the parent's)."""

        def send(client: MlflowClient, run: str) -> None:
            for start in range(0, len(metrics), BATCH):
                client.log_batch(run, metrics=metrics[start : start + BATCH])

        self._write(stage, send)

    def log_numbers(self, stage: str, numbers: Any, model_id: str | None = None) -> None:
        """Log every number of a nested dict as a metric of a stage's run ("": the parent's).

        Args:
            stage: whose run.
            numbers: the dict.
            model_id: the logged model that they are about.
        """
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, 0, model_id=model_id) for name, value in _numbers(numbers, "")
        ]
        self.log_metrics(stage, metrics)

    def tag(self, stage: str, name: str, value: str) -> None:
        """Set a tag of a stage's run ("": the parent's) that was not known when it began."""
        self._write(stage, lambda client, run: client.set_tag(run, name, value))

    def log_files(self, stage: str, *paths: Path) -> None:
        """Log files, or folders, as artifacts of a stage's run ("": the parent's)."""

        def send(client: MlflowClient, run: str) -> None:
            for path in paths:
                if path.is_dir():
                    client.log_artifacts(run, str(path), path.name)
                else:
                    client.log_artifact(run, str(path))

        self._write(stage, send)

    def log_model(self, stage: str, folder: Path, card: str) -> str | None:
        """Log a finished stage as a model with a signature, once.

        Args:
            stage: its name, which becomes the model's.
            folder: of the stage.
            card: its card's SHA-256, a tag of the model.

        Returns:
            Id of the logged model; None: this process writes nothing.
        """
        made: list[str] = []

        def send(client: MlflowClient, run: str) -> None:
            from mlflow.entities import LoggedModelOutput

            from experiments.logged_model import write_model

            _hush()
            where = f"tags.card = '{card}' AND source_run_id = '{run}'"
            found = client.search_logged_models([self._experiment], where)
            ready = [model.model_id for model in found if model.status == "READY"]
            if ready:
                made.append(ready[0])
                return
            model = client.create_logged_model(
                self._experiment, stage, run, tags={"card": card, "experiment": self._name}
            )
            # Beside the runs: /tmp may be smaller than weights are.
            with tempfile.TemporaryDirectory(dir=self._store, prefix=".model-") as place:
                write_model(Path(place) / "model", folder, model.model_id, run)
                client.log_model_artifacts(model.model_id, str(Path(place) / "model"))
            client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])
            made.append(model.model_id)

        self._write("", send)
        return made[-1] if made else None

    def close(self, stage: str, error: BaseException | None = None) -> None:
        """End a run ("": the parent's), well or by an error."""
        status = "FINISHED"
        if error is not None:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "KILLED" if stopped else "FAILED"
        if stage in self._monitors:
            self._monitors.pop(stage).finish()
        self._write(stage, lambda client, run: client.set_terminated(run, status))
        self._records.pop(stage, None)

    def _begin(self, key: str, record: RunRecord, resumed: bool) -> None:
        """Open a run, or go on in the one kept from before."""
        from mlflow.exceptions import MlflowException

        if self._client is None:
            return
        self._records[key] = record
        try:
            if not resumed or not self._is_alive(key):
                self._create(key)
        except MlflowException as error:
            self._leave_server(error)

    def _is_alive(self, key: str) -> bool:
        """Whether a run kept from before still exists; it is running again."""
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        if key not in self._ids:
            return False
        try:
            self._client.update_run(self._ids[key], status="RUNNING")
        except MlflowException:
            if not answers(self.uri):
                raise
            log.warning("MLflow run %s is gone, a new one is made", self._ids[key])
            return False
        return True

    def _create(self, key: str) -> None:
        from mlflow.entities import Param

        assert self._client is not None
        record = self._records[key]
        tags = {tag: str(value) for tag, value in record.tags.items()}
        parent = self._ids[""] if key else self._parent_id
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        if self._meant:
            tags[MEANT_FOR] = self._meant
        if key in self._left:
            tags[CONTINUES] = self._left[key]
        run = self._client.create_run(self._experiment, tags=tags, run_name=record.name)
        self._ids[key] = run.info.run_id
        kept = {"uri": self.uri, "experiment": self._experiment, "runs": self._ids}
        write_atomically(self._file, json.dumps(kept, indent=1).encode())
        params = [
            Param(name, str(value)[:MAX_PARAM_LENGTH]) for name, value in record.config.items()
        ]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._ids[key], params=params[start : start + MAX_PARAMS])

    def _write(self, key: str, operation: Callable[[MlflowClient, str], object]) -> None:
        """Write to a run; where its server has gone, to one of the local store in its place."""
        from mlflow.exceptions import MlflowException

        if self._client is None or (key not in self._ids and key not in self._left):
            return
        try:
            operation(self._client, self._run_of(key))
        except (MlflowException, OSError) as error:  # requests' errors are OSErrors
            self._leave_server(error)
            operation(self._client, self._run_of(key))

    def _run_of(self, key: str) -> str:
        """Id of a run; one that had ended at a server that is gone has a continuation now."""
        if key not in self._ids:
            assert self._client is not None
            self._records[key] = RunRecord(f"{self._name}/{key}", {}, {"stage": key})
            self._create(key)
            self._client.set_terminated(self._ids[key], "FINISHED")
            del self._records[key]
        return self._ids[key]

    def _leave_server(self, error: BaseException) -> None:
        """Write to the local store from now on, in runs that continue the server's.

        Raises:
            BaseException: the error, where the store still answers and something else is wrong.
        """
        if answers(self.uri):
            raise error
        server, local = shown(self.uri), local_store(self._store)
        log.warning(
            "the MLflow server %s does not answer any more: what comes is logged to %s; later, "
            "`lightning_app.py runs push %s` brings it there",
            server,
            local,
            server,
        )
        self._meant, self._left, self._ids = server, self._ids, {}
        self._connect(local)
        watched = list(self._monitors)
        self._monitors.clear()  # their threads end by themselves: their run cannot be reached
        for key in self._records:  # the parent first, it was opened first
            self._create(key)
        for stage in watched:
            self._watch_machine(stage)

    def _watch_machine(self, stage: str) -> None:
        """Sample processors, memory, disk, network and GPUs while a stage's run goes on."""
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as WANTED
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # MLflow's own switch; unset, it means no to MLflow and yes here.
        if self._client is None or (WANTED.is_set() and not WANTED.get()):
            return
        _hush()
        monitor = SystemMetricsMonitor(self._ids[stage], resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        self._monitors[stage] = monitor


def _hush() -> None:
    """Keep from the console what MLflow and its database say of their own doings.

    Each part of MLflow sets its level anew when it is imported; copying a model's files shows bars.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _numbers(tree: Any, key: str) -> list[tuple[str, float]]:
    """Leaves that are numbers, by a path that MLflow takes as a name."""
    if isinstance(tree, bool) or tree is None:
        return []
    if isinstance(tree, int | float):
        return [(key, float(tree))]
    if isinstance(tree, Mapping):
        items = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return []
    found = []
    for name, value in items:
        safe = "".join(c if c.isalnum() or c in "_-. " else "_" for c in name)
        found += _numbers(value, f"{key}/{safe}" if key else safe)
    return found
