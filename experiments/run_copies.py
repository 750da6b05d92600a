"""Runs that were logged to the local store, copied to a tracking server later.

A copied run carries a tag on both sides: the local one says where its copy is, the copy says what
it is a copy of and that it is whole. A second push finds the first and does nothing; a copy that
was interrupted is deleted and made again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from experiments.tracking_store import CONTINUES, EXPERIMENT, MEANT_FOR, answers, shown
from odvla.errors import UserError

PUSHED, SOURCE, WHOLE = "odvla.pushed", "odvla.pushed_from", "odvla.pushed_whole"
PARENT = "mlflow.parentRunId"
AT_ONCE = 100  # params or tags in a request
METRICS_AT_ONCE = 1000


@dataclass
class Push:
    """What a push has done."""

    copied: dict[str, str] = field(default_factory=dict)  # local id -> the copy's
    skipped: list[str] = field(default_factory=list)  # copied before
    running: list[str] = field(default_factory=list)  # left for when they have ended


def all_runs(client: MlflowClient) -> list[Run]:
    """Every run of the toolkit's experiment, the oldest first."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    found: list[Run] = []
    token: str | None = None
    while token is None or token:
        page = client.search_runs(
            [experiment.experiment_id], order_by=["start_time ASC"], page_token=token
        )
        found += page
        token = page.token or ""
    return found


def push(store: str, target: str, run_id: str = "") -> Push:
    """Copy runs with params, metrics at all their steps, tags and artifacts.

    Args:
        store: URI of the store they are in.
        target: URI of the tracking server.
        run_id: this run and those below it, ended or not; "": all that began while a server did
            not answer and have ended.

    Raises:
        UserError: the server does not answer or refuses, or there is no such run.
    """
    if not answers(target):
        raise UserError(f"the MLflow server {shown(target)} does not answer; nothing was pushed")
    source, sink = MlflowClient(tracking_uri=store), MlflowClient(tracking_uri=target)
    runs = all_runs(source)
    if run_id:
        chosen = _family(runs, run_id)
        if not chosen:
            raise UserError(f"there is no run {run_id} in {store}")
    else:
        chosen = [run for run in runs if MEANT_FOR in run.data.tags]
    done = Push()
    if not run_id:
        done.running = [run.info.run_id for run in chosen if run.info.status == "RUNNING"]
        chosen = [run for run in chosen if run.info.status != "RUNNING"]
    try:
        experiment = _experiment(sink)
        before = _copies(sink)
        places = {run.info.run_id: _place(run, target) for run in runs}
        for run in _parents_first(chosen):
            own = run.info.run_id
            copy = before.get(own)
            stale = copy is not None and _is_stale(copy, run)
            if places[own] and not stale:
                done.skipped.append(own)
                continue
            if copy is not None and stale:
                sink.delete_run(copy.info.run_id)
                copy = None
            parent = run.data.tags.get(PARENT, "")
            done.copied[own] = places[own] = (
                copy.info.run_id
                if copy is not None  # whole, but the note here was not written
                else _copy(run, source, sink, experiment, places.get(parent) or parent)
            )
            _note(source, run, target, places[own])
        _adopt(sink, done.copied, before)
    except MlflowException as error:
        raise UserError(
            f"pushing to {shown(target)} stopped after {len(done.copied)} runs: {error.message}"
        ) from error
    return done


def _family(runs: list[Run], run_id: str) -> list[Run]:
    """A run and all runs below it."""
    inside = {run_id}
    size = 0
    while size < len(inside):
        size = len(inside)
        inside |= {run.info.run_id for run in runs if run.data.tags.get(PARENT) in inside}
    return [run for run in runs if run.info.run_id in inside]


def _parents_first(runs: list[Run]) -> Iterator[Run]:
    """Runs in an order in which a parent's copy exists before it is named."""
    waiting = {run.info.run_id: run for run in runs}
    while waiting:
        ready = [run for run in waiting.values() if run.data.tags.get(PARENT) not in waiting]
        for run in ready or list(waiting.values()):
            del waiting[run.info.run_id]
            yield run


def _experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    return client.create_experiment(EXPERIMENT) if found is None else found.experiment_id


def _copies(client: MlflowClient) -> dict[str, Run]:
    """Runs of the server that are copies, by the run they were copied from."""
    return {run.data.tags[SOURCE]: run for run in all_runs(client) if SOURCE in run.data.tags}


def _is_stale(copy: Run, run: Run) -> bool:
    """Whether a copy was interrupted, or its run has gone on since."""
    return WHOLE not in copy.data.tags or copy.info.end_time != run.info.end_time


def _adopt(sink: MlflowClient, copied: dict[str, str], before: dict[str, Run]) -> None:
    """Name new copies as parents where the server's runs name what they replace.

    A child may have reached the server before its parent did: it names the parent's local id.
    """
    moved = dict(copied)
    moved |= {before[own].info.run_id: new for own, new in copied.items() if own in before}
    for run in all_runs(sink) if moved else ():
        parent = run.data.tags.get(PARENT, "")
        if moved.get(parent, parent) != parent:
            sink.set_tag(run.info.run_id, PARENT, moved[parent])


def _place(run: Run, target: str) -> str:
    """Id of a run's copy at the server; "": there is none."""
    return json.loads(run.data.tags.get(PUSHED, "{}")).get(shown(target).rstrip("/"), "")


def _note(source: MlflowClient, run: Run, target: str, copy: str) -> None:
    places = json.loads(run.data.tags.get(PUSHED, "{}")) | {shown(target).rstrip("/"): copy}
    source.set_tag(run.info.run_id, PUSHED, json.dumps(places))


def _copy(run: Run, source: MlflowClient, sink: MlflowClient, experiment: str, parent: str) -> str:
    """Copy one run; the tag that it is whole comes last.

    Returns:
        The copy's id.
    """
    own = run.info.run_id
    left = (PUSHED, MEANT_FOR, PARENT)
    tags = {name: value for name, value in run.data.tags.items() if name not in left}
    if parent:
        tags[PARENT] = parent
    made = sink.create_run(
        experiment,
        start_time=run.info.start_time,
        tags={SOURCE: own},
        run_name=run.info.run_name,
    ).info.run_id
    params = [Param(name, value) for name, value in run.data.params.items()]
    for start in range(0, len(params), AT_ONCE):
        sink.log_batch(made, params=params[start : start + AT_ONCE])
    labels = [RunTag(name, value) for name, value in tags.items()]
    for start in range(0, len(labels), AT_ONCE):
        sink.log_batch(made, tags=labels[start : start + AT_ONCE])
    for name in run.data.metrics:
        history = [
            Metric(name, m.value, m.timestamp, m.step) for m in source.get_metric_history(own, name)
        ]
        for start in range(0, len(history), METRICS_AT_ONCE):
            sink.log_batch(made, metrics=history[start : start + METRICS_AT_ONCE])
    for logged in run.outputs.model_outputs if run.outputs else ():
        _copy_model(logged.model_id, made, source, sink, experiment)
    if source.list_artifacts(own):
        with tempfile.TemporaryDirectory() as folder:
            source.download_artifacts(own, "", folder)
            sink.log_artifacts(made, str(Path(folder)))
    _end_continued(run, sink)
    if run.info.status != "RUNNING":
        sink.set_terminated(made, run.info.status, run.info.end_time)
    sink.set_tag(made, WHOLE, "yes")
    return made


def _copy_model(
    model_id: str, made: str, source: MlflowClient, sink: MlflowClient, experiment: str
) -> None:
    """Copy a logged model, whose file names its own id, to a run's copy."""
    logged = source.get_logged_model(model_id)
    copy = sink.create_logged_model(experiment, logged.name, made, logged.tags, logged.params)
    with tempfile.TemporaryDirectory() as folder:
        download_artifacts(
            artifact_uri=logged.artifact_location, dst_path=folder, tracking_uri=source.tracking_uri
        )
        (file,) = Path(folder).rglob("MLmodel")
        model = Model.load(file)
        model.model_id, model.run_id = copy.model_id, made
        model.save(file)
        sink.log_model_artifacts(copy.model_id, str(file.parent))
    sink.finalize_logged_model(copy.model_id, logged.status)
    sink.log_outputs(made, [LoggedModelOutput(copy.model_id, 0)])


def _end_continued(run: Run, sink: MlflowClient) -> None:
    """End the server's run that went on in a local one when the server had gone."""
    began = run.data.tags.get(CONTINUES)
    if began is None:
        return
    try:
        if sink.get_run(began).info.status == "RUNNING":
            sink.set_terminated(began, "KILLED")
    except MlflowException:
        return  # another server, or the run was deleted
