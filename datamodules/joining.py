"""Which records of a language file go with which key-frames of a split, and why the others do not.

Every reader asks one Join for the key-frame of every record, so that all of them decide alike, and
every record is either joined or counted under the reason it was left out for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from datamodules.records import Index, SceneRecord
from odvla.errors import UserError

log = logging.getLogger(__name__)
Leaks = Literal["refuse", "leave_out"]
ELSEWHERE = "its sample is not in this root"
NO_SPLIT = "its scene is in no split of this version"
UNFIT = "it does not fit (the log says why)"
_UNKNOWN = -1
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class LeftOut:
    """Records that were left out for one reason."""

    reason: str
    count: int
    example: str  # the first one: record number or token


@dataclass(frozen=True)
class JoinReport:
    """What became of the records of one file; joined and left out make up all of them."""

    file: Path
    split: str  # train | val | test, or "all" splits of the root
    records: int
    left_out: tuple[LeftOut, ...]  # in the order in which the reasons came up
    sampling: str = "all"  # the part of the conversations that is trained on, see subset.py
    kept: int | None = None  # conversations of that part; None: all that were made
    how: str = ""  # records without tokens found their key-frames

    @property
    def joined(self) -> int:
        """Records that go with a key-frame."""
        return self.records - sum(left.count for left in self.left_out)

    @property
    def told(self) -> str:
        """The split, and how records without tokens were joined."""
        return ", ".join(filter(None, (self.split, self.how)))

    def __str__(self) -> str:
        """One sentence."""
        said = f"{self.file}: {self.joined} of {self.records} records joined ({self.told})"
        for left in self.left_out:
            said += f"; {left.count} left out: {left.reason}, e.g. {left.example}"
        if self.kept is not None:
            said += f"; sampling {self.sampling} keeps {self.kept} conversations"
        return said

    @property
    def brief(self) -> str:
        """What a run's log says: no examples, and of the path only its end."""
        joined = f"{self.joined} of {self.records} records joined ({self.told})"
        left = (f"{left.count} left out: {left.reason}" for left in self.left_out)
        return "; ".join((f"{'/'.join(self.file.parts[-2:])}: {joined}", *left))


def _typed(setting: str) -> str:
    """How one types a setting of a data set, which does not know the stage it is read for."""
    return f"data.<stage>.{setting} (data describe: {setting})"


@cache
def _say_once(brief: str) -> None:
    """Log what several stages would find out anew."""
    log.info("%s", brief)


class Join:
    """Finds the key-frame of each record of one file, and counts.

    Args:
        file: for messages.
        index: the root's index.
        split: the key-frames wanted: train, val or test.
        scenes: of that split, those used.
        limit: the setting that left the split's other scenes out, for the report.
        leaks: what happens to records that lie in an evaluation scene although the file is one of
            training records; None: the file serves all splits, so that nothing can leak.
        unfit: so many records may not fit.
    """

    def __init__(
        self,
        file: Path,
        index: Index,
        split: str,
        scenes: Iterable[SceneRecord],
        *,
        limit: str = "",
        leaks: Leaks | None = None,
        unfit: int = 0,
    ) -> None:
        self.file = file
        self.index = index
        self.split = split
        self.leaks = leaks if split == "train" else None
        self.records = 0
        self.how = ""  # set by readers of records that do not name their sample
        self.allowed = unfit
        self.unfit: list[str] = []  # what is wrong with the records that do not fit
        self.found = 0  # records about a wanted key-frame, whatever the reader then makes of them
        self.left: dict[str, list] = {}  # reason -> [count, first example]
        self.reasons, self.verdicts = _verdicts(index, split, {s.token for s in scenes}, limit)
        self._frames: dict[str, int] = {}  # tokens come again and again

    @classmethod
    def whole(cls, file: Path, index: Index) -> Join:
        """A join with every key-frame of a root, whatever its split."""
        return cls(file, index, "all", index.scenes)

    def frame(self, token: str, name: str) -> int | None:
        """Key-frame number of a record; None: the record is left out, and counted.

        Args:
            token: the record's sample.
            name: of the record, e.g. "record 7".

        Raises:
            UserError: a training record is about an evaluation scene, and leaks are refused.
        """
        frame = self._number(token)
        self.records += 1
        reason = ELSEWHERE if frame == _UNKNOWN else self.reasons[self.verdicts[frame]]
        if not reason:
            self.found += 1
            return frame
        if frame != _UNKNOWN:
            self.refuse_leak(frame, name)
        self.leave_out(reason, name)
        return None

    def wants(self, token: str) -> bool:
        """Whether a sample's record would be joined; nothing is counted."""
        frame = self._number(token)
        return frame != _UNKNOWN and not self.reasons[self.verdicts[frame]]

    def _number(self, token: str) -> int:
        if token not in self._frames:
            self._frames[token] = self.index.number_of_token.get(token, _UNKNOWN)
        return self._frames[token]

    def fitting(
        self, name: str, read: Callable[_P, _T], *args: _P.args, **options: _P.kwargs
    ) -> _T | None:
        """What a reader makes of a record; None: it does not fit, is left out, and counted.

        Args:
            name: of the record.
            read: the reader, which raises a UserError that names file, record and field.
            args: for the reader.
            options: for the reader.

        Raises:
            UserError: more records do not fit than may; it is that of the first one.
        """
        try:
            return read(*args, **options)
        except UserError as error:
            self.unfit.append(str(error))
            if len(self.unfit) > self.allowed:
                raise UserError(
                    f"{self.unfit[0]}; it is the first of {len(self.unfit)} record(s) so far that "
                    f"do not fit, and {_typed('broken_records')} allows {self.allowed}"
                ) from error
        log.warning("%s; it is left out", self.unfit[-1])
        self.records += 1
        self.leave_out(UNFIT, name)
        return None

    def refuse_leak(self, frame: int, name: str) -> None:
        """Refuse a training record about a key-frame of an evaluation scene.

        Raises:
            UserError: it is one, and leaks are refused.
        """
        scene = self.scene(frame)
        if self.leaks == "refuse" and scene.split in ("val", "test"):
            raise UserError(
                f"{self.file}, {name}: a training record is about {scene.name}, a scene of the "
                f"{scene.split} split of {self.index.root / self.index.version}; "
                f"{_typed('leaks=leave_out')} trains without such records"
            )

    def scene(self, frame: int) -> SceneRecord:
        """Scene of a key-frame."""
        return self.index.scenes[int(self._scene_of_frame[frame])]

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        """Count records that are left out; they were (or are) counted in `records`, too."""
        if count:
            self.left.setdefault(reason, [0, example])[0] += count

    def report(self) -> JoinReport:
        """What became of the records so far.

        It is logged, too, once a process, where more is left out than what belongs elsewhere.

        Raises:
            UserError: there is no record, or none goes with a key-frame of the split: the file is
                of other data.
        """
        if not self.records:
            raise UserError(f"{self.file}: it holds no record")
        left = tuple(LeftOut(reason, n, example) for reason, (n, example) in self.left.items())
        report = JoinReport(self.file, self.split, self.records, left, how=self.how)
        if not self.found:
            whose = "this data root" if self.split == "all" else f"the {self.split} split"
            why = "; ".join(f"{le.count}: {le.reason}, e.g. {le.example}" for le in left)
            raise UserError(
                f"{self.file}: none of its {self.records} records belongs to a sample of {whose} "
                f"({why})"
            )
        if set(self.left) - {ELSEWHERE, *self.reasons}:
            _say_once(report.brief)
        return report

    @cached_property
    def _scene_of_frame(self) -> NDArray[np.int64]:
        return scene_of_frame(self.index)


def scene_of_frame(index: Index) -> NDArray[np.int64]:
    """[F] row of Index.scenes of every key-frame."""
    lengths = [scene.last - scene.first for scene in index.scenes]
    return np.repeat(np.arange(len(lengths)), lengths)


def _verdicts(
    index: Index, split: str, wanted: set[str], limit: str
) -> tuple[Sequence[str], NDArray[np.int64]]:
    """Reasons, the first of which is "" (wanted), and for every key-frame [F] which one holds."""
    reasons = [""]
    verdicts = np.zeros(len(index.frames), dtype=np.int64)
    for scene in index.scenes:
        if scene.token in wanted:
            reason = ""
        elif not scene.split:
            reason = NO_SPLIT
        elif scene.split != split:
            reason = f"its sample belongs to the {scene.split} split"
        else:
            reason = f"its scene is beyond {limit or 'the scenes used'}"
        if reason not in reasons:
            reasons.append(reason)
        verdicts[scene.first : scene.last] = reasons.index(reason)
    return tuple(reasons), verdicts
