"""Score anybody's predictions on a data root: the verb `score`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datamodules.nuscenes import NuScenesDataConfig, NuScenesDataModule
from datamodules.records import SPLITS
from experiments.driving_scores import score_driving
from experiments.plan_submission import plan_set
from experiments.planning_scores import PlanSet, planning_tables, sample_records, score_planners
from experiments.planning_truth import PlanningTruth
from experiments.report import Report, ResultTable, without_nan
from experiments.road_boundary import BOUNDARY_OF, score_boundary
from experiments.submissions import Submission, read_submission
from experiments.truth_files import TruthFiles, truth_of_files
from odvla.errors import UserError
from odvla.metrics.protocol import ProtocolCard, protocols_of
from odvla.weights import write_atomically

DEFAULT_PROTOCOLS = ("uniad", "stp3")
RESULTS, TABLE = "results.json", "table.md"


@dataclass(frozen=True)
class ScoreRequest:
    """What `score` was asked for."""

    predictions: Path
    data: Path
    version: str = ""  # "": the only one that the root holds
    split: str = "val"
    protocols: tuple[str, ...] = ()  # (): DEFAULT_PROTOCOLS, or OmniDrive's for its own plans
    frame: str = "lidar"
    missing: str = ""  # "": as the protocol has it
    name: str = ""
    references: Path | None = None  # of captions and answers that bring none
    bert: Path | None = None  # local model for BERTScore
    truth: TruthFiles = field(default_factory=TruthFiles)  # instead of the root's
    broken_captions: int = 0  # so many of TOD3Cap's records may not fit
    beyond: bool = True  # with the open-loop approximations of closed-loop scores
    baselines: bool = False  # with planners that see nothing beside the plans

    @property
    def planner(self) -> str:
        """Whose predictions these are: a name, or else the file's."""
        return self.name or self.predictions.name


@dataclass(frozen=True)
class Found:
    """Tables, numbers, and what the user should know."""

    report: Report
    said: tuple[str, ...]
    samples: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """results.json, with every sample, and table.md."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {**self.report.numbers, "samples": self.samples}
        write_atomically(
            folder / RESULTS, (json.dumps(without_nan(content), indent=1) + "\n").encode()
        )
        lines = [f"## {self.report.experiment}", ""]
        lines += [table.markdown() for table in self.report.tables]
        lines += [f"- {sentence}" for sentence in self.said]
        write_atomically(folder / TABLE, ("\n".join(lines) + "\n").encode())


def score(request: ScoreRequest) -> Found:
    """Score a file of predictions.

    Raises:
        UserError: the file or the root is not usable; the sentence says why.
    """
    if request.broken_captions < 0:
        raise UserError(f"--broken-captions must be 0 or more, not {request.broken_captions}")
    submission = read_submission(request.predictions)
    if submission.kind == "plans":
        return score_plans(request, submission)
    if request.truth and not _talks_of_plans(submission):
        raise UserError(f"--truth is for plans, and {submission.path} holds none")
    if submission.kind == "language":
        from experiments.score_language import score_language

        return score_language(request, submission)
    if submission.kind == "object_captions":
        from experiments.score_object_captions import score_captioned_objects

        return score_captioned_objects(request, submission)
    from experiments.score_boxes import score_boxes

    return score_boxes(request, submission)


def open_data(root: Path, version: str = "", **settings: Any) -> NuScenesDataModule:
    """The data module of a root.

    Raises:
        UserError: the root holds no version of nuScenes, or several and none was named.
    """
    if not root.is_dir():
        raise UserError(f"the data root {root} does not exist")
    there = [name for name in SPLITS if (root / name).is_dir()]
    if not version and len(there) != 1:
        held = ", ".join(there) or "none of " + ", ".join(SPLITS)
        raise UserError(f"{root} holds {held}; name one with --version")
    return NuScenesDataConfig(root=str(root), version=version or there[0], **settings).build()


def score_plans(request: ScoreRequest, submission: Submission) -> Found:
    """Plans under every protocol asked for."""
    protocols = _protocols(request)
    data = open_data(request.data, request.version)
    truth = PlanningTruth.of(data, request.split)
    truth, of_files = truth_of_files(truth, request.truth)
    protocols = {name: truth.card(card) for name, card in protocols.items()}
    _refuse_unused(truth, request.truth, protocols)
    tables: list[ResultTable] = []
    planning: dict[str, Any] = {}
    samples: dict[str, dict[str, Any]] = {}
    said = [
        f"{count} records of kind {kind!r} are no plans, and are not scored beside them"
        for kind, count in submission.beside.items()
    ]
    said += [sentence for counts in of_files for sentence in counts.sentences()]
    numbers: dict[str, Any] = {
        "name": request.planner,
        "predictions": str(submission.path),
        "data": str(request.data),
        "version": data.config.version,
        "split": request.split,
        "frame": request.frame,
        "planning": planning,
    }
    if of_files:
        numbers["truth"] = [counts.as_dict() for counts in of_files]
    if submission.beside:
        numbers["not_scored"] = dict(submission.beside)
    blind: list[PlanSet] = []
    if request.baselines:
        blind, missing = _blind(data, truth)
        said += missing
        numbers["baselines"] = {planner.name: {} for planner in blind}
    # Texts and lengths read strictly and with repairs are two sets of plans.
    for repair in sorted({card.parse == "repair" for card in protocols.values()}):
        cards = {n: card for n, card in protocols.items() if (card.parse == "repair") == repair}
        plans, counts = plan_set(
            submission, truth, repair=repair, frame=request.frame, name=request.name
        )
        # Who sees nothing is scored on the same samples.
        blind = [replace(planner, failures=plans.failures) for planner in blind]
        found = score_planners(truth, [plans, *blind], cards)
        tables += planning_tables(found, {plans.name: plans.readable_percent})
        for planner in blind:
            numbers["baselines"][planner.name] |= {
                name: scored.as_dict() for name, scored in found[planner.name].items()
            }
        planning |= {name: scored.as_dict() for name, scored in found[plans.name].items()}
        if BOUNDARY_OF in cards:
            table, numbers["boundary"] = score_boundary(truth, plans)
            tables += [] if table is None else [table]
        for record in sample_records(truth, plans, found[plans.name]):
            _merge(samples.setdefault(record["sample_token"], {}), record)
        numbers.setdefault("counts", counts.as_dict())
        numbers.setdefault("counts_by_reading", {})["repair" if repair else "strict"] = (
            counts.as_dict()
        )
        said += [sentence for sentence in counts.sentences() if sentence not in said]
    if request.beyond:
        table, driving, by_sample = score_driving(truth, [plans, *blind])
        tables.append(table)
        numbers["driving"] = driving
        for token, values in by_sample[plans.name].items():
            samples[token]["driving"] = values
    report = Report(request.planner, tuple(tables), numbers)
    return Found(report, tuple(said), list(samples.values()))


def _blind(data: NuScenesDataModule, truth: PlanningTruth) -> tuple[list[PlanSet], list[str]]:
    """Planners that see nothing, and why one of them is not there."""
    from experiments.baselines import EgoMLPConfig
    from experiments.planning_evaluation import blind_planners, extrapolations

    try:
        return blind_planners(data, truth, EgoMLPConfig()), []
    except UserError as error:
        why = f"there is no ego-state MLP beside the plans, for it cannot be trained: {error}"
        return extrapolations(truth), [why]


def _talks_of_plans(submission: Submission) -> bool:
    """Whether some of its answers are OmniDrive's plans."""
    from experiments.score_omnidrive import KIND

    return any(record.get("kind") == KIND for record in submission.records)


def _protocols(request: ScoreRequest) -> Mapping[str, ProtocolCard]:
    cards = protocols_of(request.protocols or DEFAULT_PROTOCOLS)
    if not request.missing:
        return cards
    changed: dict[str, Any] = {"missing": request.missing}
    return {name: replace(card, **changed) for name, card in cards.items()}


def _refuse_unused(
    truth: PlanningTruth, files: TruthFiles, protocols: Mapping[str, ProtocolCard]
) -> None:
    """Stop where a file of rasters would change nothing.

    Raises:
        UserError: no protocol asks for those whom it shows.
    """
    used = {card.traffic for card in protocols.values()}
    for others, rasters in truth.rasters.items():
        if rasters.source not in used:
            raise UserError(
                f"no protocol asked for ({', '.join(protocols)}) uses rasters of {others}, which "
                f"{' and '.join(map(str, files.rasters))} would give"
            )


def _merge(into: dict[str, Any], record: dict[str, Any]) -> None:
    """Add a sample's numbers under further protocols; what is there already stays."""
    for key, value in record.items():
        if isinstance(value, dict):
            into[key] = {**value, **into.get(key, {})}
        else:
            into.setdefault(key, value)
