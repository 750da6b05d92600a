"""What a planning number means: the protocol card, the presets of the field, and who may compare.

The same plans score 0.35 or 0.68 m depending on four choices that papers seldom print: how six
steps become a number, what a collision is, which samples count, and what happens to a plan that
cannot be read. A ProtocolCard holds all of them and travels with every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from odvla.errors import UserError

OverTime = Literal["value_at_t", "mean_up_to_t"]
CollisionOverTime = Literal["value_at_t", "mean_up_to_t", "any_up_to_t"]
Shape = Literal["point", "box"]
Occupancy = Literal["vehicles", "vehicles+pedestrians", "every_box"]
Geometry = Literal["raster", "polygons"]
EgoBox = Literal["fixed", "oriented"]
Samples = Literal["reference", "complete_only", "valid_steps"]
Parse = Literal["strict", "repair"]
Unreadable = Literal["standing_still", "left_out", "stop"]
Missing = Literal["left_out", "standing_still", "stop"]
DrivenPoint = Literal["lidar", "uniad", "file"]
DATA_ROOT = "data root"


@dataclass(frozen=True)
class ProtocolCard:
    """All choices behind a planning number; two numbers compare only when their cards are equal.

    Attributes:
        l2: the value at t seconds (UniAD's table) or the mean of all steps up to t (ST-P3's).
        collision: the same for collisions, or whether anything was hit so far (OmniDrive).
        shape: what collides: the planned point, or the car's box around it.
        geometry: against a raster of 0.5 m cells (ST-P3 and its heirs), or against the annotated
            boxes themselves (SparseDrive).
        occupancy: whom a plan may collide with; "every_box" are all annotated boxes that a lidar
            or radar point lies in, whatever they are (SparseDrive).
        ego_box: never rotated, or turned along the path.
        samples: "reference": a step without recorded future counts as error 0, and sums are divided
            by all samples; "complete_only": only samples with all six steps; "valid_steps": the
            recorded steps, divided by their number; unknown (NaN) where there are none.
        parse: texts are read strictly, or mended as OpenDriveVLA's code mends them.
        unreadable: what becomes of a plan that cannot be read, has the wrong length or is not
            finite.
        missing: what becomes of a sample nobody planned for.
        driven: the path of LIDAR_TOP, or of the point below it that UniAD's labels follow; "file":
            of whatever somebody's file of driven paths follows.
        truth: where driven paths and masks are from: computed from the data root, or a file,
            which stands here by a hash of what was used of it.
        traffic: the same for those whom a plan may collide with.
        ego_status: whether the planner was told its velocity and history; it may differ, and is
            printed beside each number.
    """

    l2: OverTime
    collision: CollisionOverTime = "mean_up_to_t"
    shape: Shape = "box"
    geometry: Geometry = "raster"
    occupancy: Occupancy = "vehicles"
    ego_box: EgoBox = "fixed"
    samples: Samples = "valid_steps"
    parse: Parse = "strict"
    unreadable: Unreadable = "standing_still"
    missing: Missing = "left_out"
    driven: DrivenPoint = "lidar"
    truth: str = DATA_ROOT
    traffic: str = DATA_ROOT
    ego_status: str = "not stated"

    def as_dict(self) -> dict[str, str]:
        """The card as plain strings, for JSON and run tags."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any, where: str) -> ProtocolCard:
        """A card that was written by `as_dict`.

        Cards from before truth could be a file do not say where theirs is from: the data root.

        Raises:
            UserError: it is no card; the sentence names `where`.
        """
        names = {field.name for field in fields(cls)}
        later = {"truth", "traffic"}
        if not isinstance(content, dict) or set(content) | later != names:
            raise UserError(f"{where} has no whole protocol card ({', '.join(sorted(names))})")
        return cls(**content)

    def sentence(self) -> str:
        """The card in words, to be printed below a table."""
        over = {
            "value_at_t": "at t",
            "mean_up_to_t": "mean up to t",
            "any_up_to_t": "any hit up to t",
        }
        samples = {
            "reference": "all samples, steps without a recorded future counted as 0",
            "complete_only": "samples with a whole future",
            "valid_steps": "recorded steps",
        }
        unreadable = {
            "standing_still": "counted as standing still",
            "left_out": "left out and counted",
            "stop": "not accepted",
        }
        place = "raster of 0.5 m cells" if self.geometry == "raster" else "annotated boxes"
        others = self.occupancy.replace("_", " ")
        if self.traffic != DATA_ROOT:
            others += f" from a file ({self.traffic})"
        path = _POINTS[self.driven] + (f" ({self.truth})" if self.truth != DATA_ROOT else "")
        return (
            f"L2 {over[self.l2]}; collision {over[self.collision]} of the {self.shape} "
            f"({self.ego_box}) with the {place} of {others}, where the "
            f"driven path is free; average over {samples[self.samples]}; texts are read "
            f"{'strictly' if self.parse == 'strict' else 'with repairs'}, what cannot be read is "
            f"{unreadable[self.unreadable]}; driven path of {path}; ego status "
            f"{self.ego_status}."
        )


_POINTS = {"lidar": "LIDAR_TOP", "uniad": "UniAD's box bottom", "file": "a file"}

_REFERENCE: dict[str, Any] = {"samples": "reference", "driven": "uniad", "parse": "repair"}
# Names are what the code bases do, read in their evaluation code (sources in docs/evaluation.md).
PRESETS: dict[str, ProtocolCard] = {
    "odvla_stp3": ProtocolCard(l2="mean_up_to_t", collision="mean_up_to_t"),
    "odvla_uniad": ProtocolCard(l2="value_at_t", collision="value_at_t"),
    "uniad": ProtocolCard(l2="value_at_t", collision="value_at_t", **_REFERENCE),
    # The ST-P3 table as UniAD's heirs compute it: all samples, VAD's map with pedestrians.
    "stp3": ProtocolCard(
        l2="mean_up_to_t",
        collision="mean_up_to_t",
        occupancy="vehicles+pedestrians",
        **_REFERENCE,
    ),
    "vad": ProtocolCard(
        l2="mean_up_to_t",
        collision="mean_up_to_t",
        occupancy="vehicles+pedestrians",
        samples="complete_only",
        parse="repair",
    ),
    # OpenDriveVLA prints both tables from the vehicles' raster; an unreadable answer stops it.
    "opendrivevla_uniad": ProtocolCard(
        l2="value_at_t", collision="value_at_t", unreadable="stop", missing="stop", **_REFERENCE
    ),
    "opendrivevla_stp3": ProtocolCard(
        l2="mean_up_to_t", collision="mean_up_to_t", unreadable="stop", missing="stop", **_REFERENCE
    ),
    # OmniDrive rasters at 0.1 m, here the boxes themselves; it sees only agents annotated at t0.
    "omnidrive": ProtocolCard(
        l2="mean_up_to_t",
        collision="any_up_to_t",
        geometry="polygons",
        ego_box="oriented",
        samples="complete_only",
        unreadable="left_out",
    ),
    "sparsedrive": ProtocolCard(
        l2="mean_up_to_t",
        collision="mean_up_to_t",
        geometry="polygons",
        occupancy="every_box",
        ego_box="oriented",
        samples="complete_only",
    ),
}
# A name that stands for both of a code base's tables.
GROUPS = {
    "opendrivevla": ("opendrivevla_uniad", "opendrivevla_stp3"),
    "odvla": ("odvla_stp3", "odvla_uniad"),
}


def protocols_of(names: Sequence[str]) -> dict[str, ProtocolCard]:
    """Cards by name.

    Raises:
        UserError: there is no preset of that name.
    """
    cards: dict[str, ProtocolCard] = {}
    for name in names:
        for member in GROUPS.get(name, (name,)):
            if member not in PRESETS:
                known = ", ".join((*PRESETS, *GROUPS))
                raise UserError(f"there is no protocol {name!r}; there are {known}")
            cards[member] = PRESETS[member]
    return cards


def refuse_to_mix(cards: Sequence[tuple[str, ProtocolCard]]) -> None:
    """Stop where numbers of different protocols would be compared.

    Args:
        cards: name of a result and its card.

    Raises:
        UserError: naming two results and every choice they differ in.
    """
    for name, card in cards[1:]:
        first_name, first = cards[0]
        differing = [
            f"{field.name} ({getattr(first, field.name)} | {getattr(card, field.name)})"
            for field in fields(ProtocolCard)
            # Whether a planner was told its speed is a property of the planner, printed beside it.
            if field.name != "ego_status"
            and getattr(first, field.name) != getattr(card, field.name)
        ]
        if differing:
            raise UserError(
                f"{first_name} and {name} were scored under different protocols and cannot be "
                f"compared: {', '.join(differing)}"
            )
