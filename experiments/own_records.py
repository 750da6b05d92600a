"""What a record of ours is, and whether it has what it is scored by.

Stages write such records, one a line (predictions.jsonl); other programs may write them, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from odvla.errors import UserError
from stages.plan_ablations import KIND_OF

Record = dict[str, Any]
# Kinds of records.
ANSWERS = (
    *("qa", "caption", "caption_object", "caption_map", "caption_scene", "narration"),
    *("drivelm", "omnidrive", "omnidrive_plan"),
)
KINDS = ("plan", *KIND_OF.values(), *ANSWERS, "agent", "detection", "map")
# One of these is in every answer that names no kind.
SAID = {"question", "answer", "text", "prediction", "pred", "caption", "narration", "reasoning"}


def kind_beside_plans(record: Record, where: str) -> str:
    """What a record is that is no plan.

    Args:
        record: in a file that has plans.
        where: its name in messages.

    Raises:
        UserError: it is nothing that is known.
    """
    kind = record.get("kind", "answer" if SAID & set(record) else None)
    if kind not in (*KINDS, "answer"):
        told = f"kind {kind!r}" if "kind" in record else ", ".join(record) or "no field"
        raise UserError(f"{where} is neither a plan nor of another known kind: it has {told}")
    return str(kind)


def check_answers(records: Iterable[Record], path: Path) -> None:
    """Answers and captions that bring their references are whole, and there once.

    Raises:
        UserError: naming the record that is not.
    """
    first: dict[tuple[str, ...], int] = {}
    for number, record in enumerate(records):
        own, where = "text" in record and "reference" in record, f"record {number} of {path}"
        if "reference" in record and not isinstance(record.get("meta", {}), dict):
            raise UserError(f"{where}: field 'meta' must be an object, not {record['meta']!r}")
        if own or record.get("kind") in ("omnidrive", "omnidrive_plan"):
            _check_own(record, where)
        # Plans and answers beside a file that come twice are counted where they are scored.
        if own and record["reference"] and record["kind"] != "omnidrive_plan":
            key = tuple(str(record.get(k, "")) for k in ("kind", "sample_token", "id", "question"))
            if first.setdefault(key, number) != number:
                raise UserError(
                    f"{where} answers what record {first[key]} does: sample {key[1]}, question "
                    f"{key[3]!r} ({key[0]}); an 'id' would tell them apart"
                )


def _check_own(record: Record, where: str) -> None:
    """Stop where one of our records lacks what it is scored by."""
    kind, meta, reference = record.get("kind"), record.get("meta", {}), record.get("reference")
    if kind not in ANSWERS:
        raise UserError(
            f"{where} has a text and a reference, so its 'kind' must be one of "
            f"{', '.join(ANSWERS)}, not {kind!r}"
        )
    texts = {name: record.get(name) for name in ("sample_token", "text")}
    numbers: dict[str, list[Any]] = {}
    if reference is not None:  # null and "": held back
        texts["reference"] = reference
    elif kind == "omnidrive":  # its file is asked
        texts["question"] = record.get("question")
    if reference and kind == "qa":
        texts["meta.template_type"] = meta.get("template_type")
        numbers["meta.num_hop"] = [meta.get("num_hop")]
    if reference and kind == "drivelm" and meta.get("tags"):
        texts["id"] = record.get("id")
        texts |= {f"meta.{name}": meta.get(name) for name in ("question", "number", "tags")}
        numbers |= {"meta.number": [meta.get("number")], "meta.tags": str(meta["tags"]).split()}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} must be a text, not {value!r}")
    for name, values in numbers.items():
        for value in values:
            if not str(value).isdecimal():
                raise UserError(f"{where}: field {name!r} must be of digits, not {value!r}")
