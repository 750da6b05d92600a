"""OmniDrive's answers: plans under its protocol or any other one, texts beside its files.

Plans are told for the rear axle in the ego frame. As plans for LIDAR_TOP, with the headings that
were driven, they are as far from the driven path as OmniDrive's own evaluation has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.joining import Join
from datamodules.nuscenes import NuScenesDataModule
from datamodules.omnidrive import read_part
from datamodules.rear_axle import lidar_plan
from experiments.plan_submission import plan_set
from experiments.planning_scores import planning_tables, score_planners
from experiments.planning_truth import PlanningTruth
from experiments.report import ResultTable
from experiments.road_boundary import score_boundary
from experiments.submissions import Submission, answer_counts
from odvla.errors import UserError
from odvla.language.omnidrive_plan import parse_rear_axle_plan
from odvla.language.waypoints import ParseFailure
from odvla.metrics.protocol import protocols_of

if TYPE_CHECKING:
    from experiments.score import Found, ScoreRequest

Record = dict[str, Any]
KIND, TEXT_KIND = "omnidrive_plan", "omnidrive"
PROTOCOL = "omnidrive"
MODEL = "OpenDriveVLA"


def lidar_submission(
    records: Sequence[Record], path: Path, data: NuScenesDataModule
) -> tuple[Submission, dict[str, int]]:
    """Plans for LIDAR_TOP of records with a sample_token and a text.

    Returns:
        The plans, None where a text is none, the first where a sample comes twice; how many texts
        could not be read, by reason.
    """
    plans: dict[str, Any] = {}
    doubled: list[str] = []
    failures: dict[str, int] = {}
    index = data.index
    for record in records:
        token = record["sample_token"]
        if token in plans:
            doubled.append(token)
            continue
        points = parse_rear_axle_plan(str(record["text"]))
        if isinstance(points, ParseFailure):
            failures[points.reason] = failures.get(points.reason, 0) + 1
            plans[token] = None
        elif token in index.number_of_token:
            plans[token] = lidar_plan(index, index.frame(token), points)
        else:
            plans[token] = points  # of another root: it is counted as that, and not scored
    return Submission(path, "plans", plans, doubled=tuple(doubled)), failures


def evaluate_omnidrive_plans(
    data: NuScenesDataModule, records: Sequence[Record], path: Path
) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """The model's own plans under OmniDrive's protocol; nothing where none was asked for."""
    answers = [record for record in records if record["kind"] == KIND]
    if not answers:
        return (), {}
    submission, failures = lidar_submission(answers, path, data)
    if all(plan is None for plan in submission.plans.values()):
        told = "; ".join(f"{count}: {reason}" for reason, count in failures.items())
        table = ResultTable(
            title=f"Planning, {PROTOCOL}",
            columns=("parsed",),
            rows=((MODEL, (0.0,)),),
            note=f"not one of {len(submission.plans)} plans can be read ({told})",
        )
        return (table,), {KIND: {"unreadable": failures}}
    truth = PlanningTruth.of(data)
    plans, counts = plan_set(submission, truth, repair=False, name=MODEL)
    found = score_planners(truth, [plans], protocols_of([PROTOCOL]))
    tables = planning_tables(found, {plans.name: plans.readable_percent})
    scores = {name: scored.as_dict() for name, scored in found[plans.name].items()}
    boundary, off_road = score_boundary(truth, plans)
    if boundary is not None:
        tables = (*tables, boundary)
    beside = {"boundary": off_road, "unreadable": failures, "counts": counts.as_dict()}
    return tables, {KIND: {**scores, **beside}}


def score_omnidrive_plans(
    request: ScoreRequest, submission: Submission, records: Sequence[Record]
) -> Found:
    """Plans of a file, and answers that are no plans counted.

    Raises:
        UserError: no plan can be read or belongs to the split.
    """
    from experiments.score import open_data, score_plans

    if request.frame != "lidar":
        raise UserError(
            f"{submission.path}: --frame {request.frame} is for plans of numbers alone; what "
            "OmniDrive's texts mean is known"
        )
    data = open_data(request.data, request.version)
    plans, failures = lidar_submission(records, submission.path, data)
    found = score_plans(replace(request, protocols=request.protocols or (PROTOCOL,)), plans)
    said = [f"{count} texts hold no plan: {reason}" for reason, count in failures.items()]
    return replace(found, said=(*found.said, *said))


def with_references(
    request: ScoreRequest, records: Sequence[Record], path: Path
) -> tuple[list[Record], dict[str, Any]]:
    """Answers to OmniDrive's questions beside what its vqa and conv files answer.

    Args:
        request: names the root; `references` may name another folder of OmniDrive's.
        records: with sample_token, question and text.
        path: what the records are called in messages.

    Returns:
        The records that have a reference, and what did not fit.

    Raises:
        UserError: the files are missing, or no answer has a reference.
    """
    from experiments.score import open_data

    data = open_data(request.data, request.version)
    folder = request.references or Path(request.data) / "language" / "omnidrive"
    truth: dict[tuple[str, str], str] = {}
    for part in ("vqa", "conv"):
        join = Join.whole(folder / part / request.split, data.index)
        for frame, asked in read_part(part, join):
            truth[data.index.frames[frame].token, asked.question] = asked.answer
    found: dict[tuple[str, str], Record] = {}
    doubled, extra = [], []
    for record in records:
        key = (record["sample_token"], str(record["question"]).strip())
        if key not in truth:
            extra.append(key[0])
        elif key in found:
            doubled.append(key[0])
        else:
            found[key] = {**record, "kind": TEXT_KIND, "reference": truth[key], "meta": {}}
    if not found:
        raise UserError(
            f"{path}: not one of its {len(records)} answers belongs to a question of {folder}, "
            f"e.g. that of sample {extra[0]}"
        )
    missing = [token for token, question in truth if (token, question) not in found]
    counts = answer_counts(
        len(records), len(truth), len(found), missing=missing, extra=extra, doubled=doubled
    )
    return list(found.values()), counts
