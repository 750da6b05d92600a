"""Runs in MLflow: a parent run an experiment, a child run a stage.

The default store is a SQLite file in the runs folder; MLFLOW_TRACKING_URI names another one. Where
that is a server which does not answer, runs go to the file with a tag that says so: `runs push`
brings them to the server later (see run_copies.py).
Metrics are sent in batches, so that tracking costs next to nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from experiments.tracking_store import EXPERIMENT, MEANT_FOR, answers, local_store, shown, store_uri
from odvla.weights import write_atomically

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
BATCH = 200  # metrics sent at once
EVERY_S = 30.0  # or what there is, so that a slow run is seen while it goes on
MAX_PARAMS = 100  # MLflow takes so many at once
MAX_PARAM_LENGTH = 500


class StageLogger(Logger):
    """Lightning logger that writes into one MLflow run.

    Args:
        client: None on processes other than the first: nothing is written.
        run_id: of the stage's child run.
    """

    def __init__(self, client: MlflowClient | None, run_id: str) -> None:
        super().__init__()
        self._client = client
        self._run_id = run_id
        self._pending: list[tuple[str, float, int, int]] = []
        self._sent_s = time.monotonic()

    @property
    def name(self) -> str:
        """Name of the MLflow experiment."""
        return EXPERIMENT

    @property
    def version(self) -> str:
        """Id of the MLflow run."""
        return self._run_id

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
        if self._client is not None and self._pending:
            from mlflow.entities import Metric

            metrics = [Metric(*entry) for entry in self._pending]
            self._client.log_batch(self._run_id, metrics=metrics)
        self._pending = []
        self._sent_s = time.monotonic()

    def finalize(self, status: str) -> None:
        """Send what is left."""
        self.flush()


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
        self._name = name
        self._client: MlflowClient | None = None
        self._ids: dict[str, str] = {}
        if not active:
            return
        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        store.mkdir(parents=True, exist_ok=True)
        local = local_store(store)
        self.uri = store_uri(store)
        self._meant = ""  # the server that did not answer
        if not answers(self.uri):
            log.warning(
                "the MLflow server %s does not answer: this run is logged to %s; later, "
                "`lightning_app.py runs push %s` brings it there",
                shown(self.uri),
                local,
                shown(self.uri),
            )
            self._meant, self.uri = shown(self.uri), local
        self._client = MlflowClient(tracking_uri=self.uri)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            # Without a location, the artifacts of a SQLite store go to the working directory.
            artifacts = (store / "mlartifacts").resolve().as_uri() if self.uri == local else None
            self._experiment = self._client.create_experiment(EXPERIMENT, artifacts)
        else:
            self._experiment = found.experiment_id
        if self._file.is_file():
            kept = json.loads(self._file.read_text())
            if kept.get("uri") == self.uri and kept.get("experiment") == self._experiment:
                self._ids = kept["runs"]

    def start(self, config: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Open the parent run, the one kept from before or a new one."""
        if self._client is None:
            return
        if self._alive("") is None:
            if self._parent_id is not None:
                tags = {**tags, "mlflow.parentRunId": self._parent_id}
            self._open("", self._name, tags)
            self._params(self._ids[""], config)

    @property
    def run_id(self) -> str:
        """Id of the parent run, once it is open."""
        return self._ids[""]

    def stage(
        self, stage: str, resumed: bool, config: Mapping[str, Any], tags: Mapping[str, Any]
    ) -> StageLogger:
        """Open a stage's child run.

        Args:
            stage: its name.
            resumed: go on in the run kept from before.
            config: what is logged as parameters.
            tags: seed, git commit, parent card.
        """
        if self._client is None:
            return StageLogger(None, "")
        if not resumed or self._alive(stage) is None:
            tags = {**tags, "mlflow.parentRunId": self._ids[""], "stage": stage}
            self._open(stage, f"{self._name}/{stage}", tags)
            self._params(self._ids[stage], config)
        return StageLogger(self._client, self._ids[stage])

    def log_numbers(self, stage: str, numbers: Any) -> None:
        """Log every number of a nested dict as a metric of a stage's run ("": the parent's)."""
        if self._client is None or stage not in self._ids:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, 0) for name, value in _numbers(numbers, "")]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self._ids[stage], metrics=metrics[start : start + BATCH])

    def tag(self, stage: str, name: str, value: str) -> None:
        """Set a tag of a stage's run ("": the parent's) that was not known when it began."""
        if self._client is not None and stage in self._ids:
            self._client.set_tag(self._ids[stage], name, value)

    def log_files(self, stage: str, *paths: Path) -> None:
        """Log files, or folders, as artifacts of a stage's run ("": the parent's)."""
        if self._client is None or stage not in self._ids:
            return
        for path in paths:
            if path.is_dir():
                self._client.log_artifacts(self._ids[stage], str(path), path.name)
            else:
                self._client.log_artifact(self._ids[stage], str(path))

    def close(self, stage: str, error: BaseException | None = None) -> None:
        """End a run ("": the parent's), well or by an error."""
        status = "FINISHED"
        if error is not None:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "KILLED" if stopped else "FAILED"
        if self._client is not None and stage in self._ids:
            self._client.set_terminated(self._ids[stage], status)

    def _alive(self, key: str) -> str | None:
        """Id of a run kept from before that still exists; it is running again."""
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        if key not in self._ids:
            return None
        try:
            self._client.update_run(self._ids[key], status="RUNNING")
        except MlflowException:
            log.warning("MLflow run %s is gone, a new one is made", self._ids[key])
            return None
        return self._ids[key]

    def _open(self, key: str, name: str, tags: Mapping[str, Any]) -> None:
        assert self._client is not None
        texts = {tag: str(value) for tag, value in tags.items()}
        if self._meant:
            texts[MEANT_FOR] = self._meant
        run = self._client.create_run(self._experiment, tags=texts, run_name=name)
        self._ids[key] = run.info.run_id
        kept = {"uri": self.uri, "experiment": self._experiment, "runs": self._ids}
        write_atomically(self._file, json.dumps(kept, indent=1).encode())

    def _params(self, run_id: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        assert self._client is not None
        params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in config.items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MAX_PARAMS])


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
