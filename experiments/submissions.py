"""Anybody's predictions: which kind of file it is, and what is in it.

| file | what it holds |
|---|---|
| .jsonl | our JSON lines: records with sample_token, kind and waypoints or text |
| plan_conv.json | OpenDriveVLA's: JSON lines of {"id": "<token>_trajectory", "answer": [text]} |
| .pkl | GPT-Driver's plans: a pickled dict, sample token -> 6 x 2 numbers |
| .json with "meta" and "results" | a nuScenes detection or tracking submission |
| the same with a "caption" in every box | captions of objects |
| .json, other | NuScenes-QA answers or captions: a list, or an object by sample token |
| ... of records with sample_token, size and caption | captions of objects |
| ... of records with id, question and answer | DriveLM's answers; "results" of an object, too |
| a folder of <sample token> files | OmniDrive's results: lists of {"Q": ..., "A": [text]} |

Nothing is dropped silently: what does not belong, is there twice or cannot be used is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.array_pickles import load_arrays
from datamodules.language_files import NOT_JSON, read_json_lines
from experiments.own_records import Record, check_answers, kind_beside_plans
from odvla.errors import UserError
from odvla.language.omnidrive_plan import MARK as REAR_AXLE_PLAN

Kind = Literal["plans", "language", "detection", "tracking", "object_captions"]
TRAJECTORY = "_trajectory"
PLAN_ASKED = "planning trajectory"  # in OmniDrive's request for a plan
SHOWN = 3  # tokens that a sentence names


@dataclass(frozen=True)
class Submission:
    """What a file of predictions holds, as it stands there."""

    path: Path
    kind: Kind
    # Plans: token -> points as given (any shape) or a text. The first where a token comes twice.
    plans: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)  # language
    results: dict[str, Any] = field(default_factory=dict)  # of boxes: token -> boxes
    doubled: tuple[str, ...] = ()  # tokens that come more than once; the first counts
    conflicting: tuple[str, ...] = ()  # of these, those whose plans differ
    beside: Mapping[str, int] = field(default_factory=dict)  # records that are no plans, by kind


def read_submission(path: Path) -> Submission:
    """Read a file of predictions, whatever its format.

    Raises:
        UserError: the file is missing, empty, broken or of no known format, a record is of no
            known kind, lacks what it is scored by or comes twice, or a pickle names anything but
            arrays.
    """
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise UserError(f"there is no file of predictions at {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: it holds no prediction")
    if path.suffix in (".pkl", ".pickle"):
        return _from_pickle(path)
    text = _text(path)
    content = _whole_json(path, text)
    if content is None:
        return _from_records(path, [record for _, record in read_json_lines(path)])
    if isinstance(content, dict) and {"meta", "results"} <= set(content):
        return _from_nuscenes(path, content["results"])
    if isinstance(content, dict) and isinstance(content.get("results"), list):
        return _from_records(path, content["results"])  # a submission to the DriveLM challenge
    if isinstance(content, dict) and {"id", "answer"} <= set(content):
        return _from_records(path, [content])  # one line of JSON lines
    if isinstance(content, dict) and {"sample_token"} <= set(content):
        return _from_records(path, [content])
    if isinstance(content, dict) and "questions" in content:
        return _from_records(path, content["questions"])
    if isinstance(content, list):
        return _from_records(path, content)
    if isinstance(content, dict):
        return _from_tokens(path, content)
    raise UserError(f"{path} holds a single value, no predictions")


def coverage(submission: Submission, wanted: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Which key-frames of a split a submission of boxes has an entry for.

    Args:
        submission: with `results`.
        wanted: tokens of the split's key-frames.

    Returns:
        Counts and tokens for results.json, and what the user should be told.
    """
    known = set(wanted)
    doubled = list(submission.doubled)
    extra = [token for token in submission.results if token not in known]
    missing = [token for token in wanted if token not in submission.results]
    said = []
    if missing:
        said.append(f"{len(missing)} of {len(wanted)} key-frames have no entry: {named(missing)}")
    if extra:
        said.append(f"{len(extra)} entries belong to no key-frame of the split: {named(extra)}")
    if doubled:
        said.append(
            f"{len(doubled)} samples come more than once, the first counts: {named(doubled)}"
        )
    counts = {
        "in_file": len(submission.results),
        "in_split": len(wanted),
        "used": len(submission.results) - len(extra),
        "n_missing": len(missing),
        "n_extra": len(extra),
        "n_doubled": len(doubled),
        "missing": missing,
        "extra": extra,
        "doubled": doubled,
    }
    return counts, said


def answer_counts(
    in_file: int,
    references: int,
    used: int,
    *,
    missing: Sequence[str],
    extra: Sequence[str],
    doubled: Sequence[str],
) -> dict[str, Any]:
    """For results.json: which questions a file of answers covers.

    Args:
        in_file: records of the file.
        references: questions with a known answer.
        used: answers that are scored.
        missing: questions without an answer.
        extra: answers without a question.
        doubled: answers to a question that was answered before.
    """
    return {
        "in_file": in_file,
        "references": references,
        "used": used,
        "n_missing": len(missing),
        "n_extra": len(extra),
        "n_doubled": len(doubled),
        "missing": list(missing),
        "extra": list(extra),
        "doubled": list(doubled),
    }


def named(tokens: Iterable[str]) -> str:
    """Some tokens for a sentence: the first few, and how many more there are."""
    found = list(tokens)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file: {error}") from error
    if not text.strip():
        raise UserError(f"{path} is empty: it holds no prediction")
    return text


class _Repeating(dict[str, Any]):
    """A JSON object in which keys come more than once; as a dict it holds the first of each."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(reversed(pairs))
        self.pairs = pairs


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else _Repeating(pairs)


def _pairs(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All keys and values of an object, those that come again included."""
    return content.pairs if isinstance(content, _Repeating) else list(content.items())


def _whole_json(path: Path, text: str) -> Any:
    """Content where the file is one JSON value; None where it may be JSON lines."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        return None
    except NOT_JSON as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _from_pickle(path: Path) -> Submission:
    content = load_arrays(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dict, sample token -> 6 x 2 numbers")
    if not content:
        raise UserError(f"{path} is empty: it holds no prediction")
    return _plans(path, [(str(k).removesuffix(TRAJECTORY), plan) for k, plan in content.items()])


def _from_nuscenes(path: Path, results: Any) -> Submission:
    if not isinstance(results, dict) or not results:
        raise UserError(f"{path} is empty: its 'results' hold no sample")
    for token, found in results.items():
        if not isinstance(found, list):
            raise UserError(f"{path}, sample {token}: expected a list of boxes")
    doubled = _again(token for token, _ in _pairs(results))
    boxes = [box for found in results.values() for box in found]
    captioned = [isinstance(box, dict) and "caption" in box for box in boxes]
    if any(captioned):
        if not all(captioned):
            raise UserError(f"{path}: some boxes have a caption and some have none")
        return Submission(path, "object_captions", results=results, doubled=doubled)
    tracked = [isinstance(box, dict) and "tracking_id" in box for box in boxes]
    if any(tracked) and not all(tracked):
        raise UserError(f"{path}: some boxes have a tracking_id and some have none")
    kind: Kind = "tracking" if any(tracked) else "detection"
    return Submission(path, kind, results=results, doubled=doubled)


def _again(tokens: Iterable[str]) -> tuple[str, ...]:
    """Those that come more than once."""
    return tuple(token for token, times in Counter(tokens).items() if times > 1)


def _from_records(path: Path, records: Any) -> Submission:
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} is empty: it holds no prediction")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"record {number} of {path} is no JSON object")
    if all({"sample_token", "size", "caption"} <= set(record) for record in records):
        boxes: dict[str, list[Record]] = {}
        for record in records:
            boxes.setdefault(str(record["sample_token"]), []).append(record)
        return Submission(path, "object_captions", results=boxes)
    plans = [record for record in records if _is_plan(record)]
    if not plans:
        return _language(path, [_told_plan(record) for record in records])
    others = Counter(
        kind_beside_plans(record, f"record {number} of {path}")
        for number, record in enumerate(records)
        if not _is_plan(record)
    )
    pairs = []
    for number, record in enumerate(plans):
        token = _token(record)
        if token is None:
            raise UserError(f"plan {number} of {path} names no sample (id or sample_token)")
        pairs.append((token, _points_or_text(record)))
    return replace(_plans(path, pairs), beside=dict(others))


def _language(path: Path, records: list[Record]) -> Submission:
    """Answers and captions; those that bring their references are whole, and there once."""
    check_answers(records, path)
    return Submission(path, "language", records=records)


def _from_tokens(path: Path, content: Mapping[str, Any]) -> Submission:
    """An object by token: plans as numbers or texts, or captions."""
    if not content:
        raise UserError(f"{path} is empty: it holds no prediction")
    entries = _pairs(content)
    values = [value for _, value in entries]
    if all(isinstance(value, dict) and not _is_plan(value) for value in values):
        return _language(path, [{"sample_token": key, **value} for key, value in entries])
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) == len(values) and not any(key.endswith(TRAJECTORY) for key in content):
        records = [_told_plan({"sample_token": key, "text": value}) for key, value in entries]
        if any("kind" in record for record in records) or not any(
            "(" in text and "," in text for text in texts
        ):
            return _language(path, records)
    pairs = []
    for key, value in entries:
        found = _points_or_text(value) if isinstance(value, dict) else unwrapped(value)
        pairs.append((key.removesuffix(TRAJECTORY), found))
    return _plans(path, pairs)


def _from_folder(folder: Path) -> Submission:
    """OmniDrive's results: a file a sample, named by its token; the plan is one of the answers."""
    records: list[Record] = []
    for path in sorted(folder.iterdir()):
        content = _whole_json(path, _text(path)) if path.is_file() else None
        if not isinstance(content, list) or not all(
            isinstance(one, dict) and {"Q", "A"} <= set(one) for one in content
        ):
            raise UserError(f'{path} must hold a list of {{"Q": question, "A": [answer]}}')
        for one in content:
            question, text = str(one["Q"]), str(unwrapped(one["A"]))
            plan = REAR_AXLE_PLAN in text or PLAN_ASKED in question
            records.append(
                {
                    "sample_token": path.name.removesuffix(".json"),
                    "kind": "omnidrive_plan" if plan else "omnidrive",
                    "question": question,
                    "text": text,
                }
            )
    if not records:
        raise UserError(f"{folder} is empty: it holds no prediction")
    return _language(folder, records)


def _told_plan(record: Record) -> Record:
    """The record, named as OmniDrive's plan where its text is one."""
    text = unwrapped(record.get("text", record.get("answer")))
    if "kind" in record or not isinstance(text, str) or REAR_AXLE_PLAN not in text:
        return record
    return {**record, "kind": "omnidrive_plan", "text": text}


def _plans(path: Path, pairs: list[tuple[str, Any]]) -> Submission:
    plans: dict[str, Any] = {}
    doubled: dict[str, bool] = {}
    for token, plan in pairs:
        if token not in plans:
            plans[token] = plan
        else:
            doubled[token] = doubled.get(token, False) or not _same(plans[token], plan)
    conflicting = tuple(token for token, differs in doubled.items() if differs)
    return Submission(path, "plans", plans, doubled=tuple(doubled), conflicting=conflicting)


def _same(first: Any, second: Any) -> bool:
    return json.dumps(first, default=str) == json.dumps(second, default=str)


def _is_plan(record: Mapping[str, Any]) -> bool:
    if "kind" in record:
        return record["kind"] == "plan"
    key = str(record.get("id", record.get("qa_id", "")))
    return key.endswith(TRAJECTORY) or "waypoints" in record or "trajectory" in record


def _token(record: Mapping[str, Any]) -> str | None:
    for key in ("sample_token", "sample_id", "token", "id", "qa_id"):
        if isinstance(record.get(key), str):
            return record[key].removesuffix(TRAJECTORY)
    return None


def _points_or_text(record: Mapping[str, Any]) -> Any:
    """Points where there are some, else the text that says them."""
    for key in ("waypoints", "trajectory", "answer", "text"):
        if record.get(key) is not None:
            return unwrapped(record[key])
    return None


def unwrapped(value: Any) -> Any:
    """The reference writes an answer as a list of one text."""
    lone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0] if lone else value


def as_points(value: Any) -> np.ndarray | None:
    """Points [n, 2] of whatever was given; None where they are no such numbers."""
    try:
        points = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # of a number beyond 1e308
        return None
    if points.ndim == 3 and len(points) == 1:
        points = points[0]
    if points.ndim != 2 or points.shape[1] < 2:
        return None
    return points[:, :2]
