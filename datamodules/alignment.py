"""Stage 1's data: each stream of tokens is put into words.

Track tokens by TOD3Cap's object captions with the object's position, map tokens by a text made from
the true map around the car, scene tokens by a summary merged from nuCaption's answers. How the
authors merge nuCaption's answers is not published: here the distinct answers of a key-frame stand
one after the other, up to `summary_answers`.
"""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.collate import Tokenises
from datamodules.conversations import FrameRecords, LanguageDataModule, group_by_frame
from datamodules.map_raster import map_targets
from datamodules.nucaption import NuCaptionConfig, read_nucaption
from datamodules.picking import ConversationSource, UnionSource
from datamodules.records import FrameRecord, Index
from datamodules.subset import chosen
from datamodules.tod3cap import TOD3CapConfig, object_captions
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.types import MAP_CLASSES, BevGrid, Conversation, EgoState

STREAMS = ("track", "map", "scene")
REPEATED = "its answer is that of another record of its key-frame"
TOO_MANY = "its key-frame's summary has as many answers as summary_answers allows"
# (one of, many of) for each of MAP_CLASSES
MAP_WORDS = (
    ("lane or road divider", "lane or road dividers"),
    ("pedestrian crossing", "pedestrian crossings"),
    ("edge of the road", "edges of the road"),
)


def map_text(counts: tuple[int, ...]) -> str:
    """The map around the car in words.

    Args:
        counts: number of elements of each of MAP_CLASSES.
    """
    parts = [
        f"{count or 'no'} {one if count == 1 else many}"
        for count, (one, many) in zip(counts, MAP_WORDS, strict=True)
    ]
    return f"Around the car there are {parts[0]}, {parts[1]} and {parts[2]}."


class SceneSummaries(FrameRecords[tuple[str]]):
    """One conversation a key-frame: records are (summary,)."""

    def conversation(
        self, frame: FrameRecord, number: int, record: tuple[str], ego: EgoState
    ) -> Conversation:
        """Word one summary."""
        return Conversation(
            id=f"{frame.token}_scene",
            sample_token=frame.token,
            kind="caption_scene",
            turns=self.dialect.turns("caption_scene", record[0], ego),
            reference=record[0],
        )


@dataclass(frozen=True)
class MapTexts(ConversationSource):
    """One conversation a key-frame about the map elements on the grid."""

    index: Index
    dialect: Dialect
    grid: BevGrid
    sampled_out: frozenset[int] = frozenset()  # key-frames that are not trained on

    def count(self, frame: int) -> int:
        """Every key-frame lies on a map."""
        return int(frame not in self.sampled_out)

    def make(self, frame: int, number: int, *, ego: EgoState) -> Conversation:
        """Word the map of one key-frame."""
        record = self.index.frames[frame]
        labels = map_targets(self.index, record, self.grid).labels[0]
        counts = tuple(int((labels == label).sum()) for label in range(len(MAP_CLASSES)))
        text = map_text(counts)
        return Conversation(
            id=f"{record.token}_map",
            sample_token=record.token,
            kind="caption_map",
            turns=self.dialect.turns("caption_map", text, ego),
            reference=text,
        )


@dataclass(frozen=True)
class AlignmentConfig(TOD3CapConfig, NuCaptionConfig):
    """Settings of AlignmentDataModule."""

    streams: tuple[str, ...] = STREAMS  # which tokens are put into words
    summary_answers: int = 2  # nuCaption answers in a scene summary, at most

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: no stream, or an unknown one.
        """
        super().__post_init__()
        if not self.streams or set(self.streams) - set(STREAMS):
            raise UserError(f"streams must be some of {', '.join(STREAMS)}, not {self.streams}")

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return AlignmentDataModule(self, tokenizer, dialect)


class AlignmentDataModule(LanguageDataModule):
    """Captions of objects, maps and scenes."""

    config: AlignmentConfig

    def prepare_data(self) -> None:
        """Make the index and, for track tokens, the table of captions, where there are none."""
        super().prepare_data()
        if "track" in self.config.streams:
            self.config.ensure_table(self.index)

    def make_source(self, split: str) -> UnionSource:
        """Union of the chosen streams' captions."""
        makers = {"track": self._objects, "map": self._maps, "scene": self._scenes}
        return UnionSource(tuple(makers[stream](split) for stream in self.config.streams))

    def _objects(self, split: str) -> ConversationSource:
        return object_captions(self, split)

    def _maps(self, split: str) -> ConversationSource:
        sampled_out: frozenset[int] = frozenset()
        if split == "train":
            frames = self.frame_numbers(split)
            keep = chosen(self.config.sampling, len(frames), self.config.seed)
            sampled_out = frozenset(f for f, kept in zip(frames, keep, strict=True) if not kept)
        return MapTexts(self.index, self.dialect, self.config.grid, sampled_out)

    def _scenes(self, split: str) -> ConversationSource:
        path = self.config.language_folder / self.config.nucaption_files[split != "train"]
        join = self.join(path, split)
        pairs = read_nucaption(join, self.config.nucaption_answer)
        summaries = []
        for frame, records in group_by_frame(pairs).items():
            distinct = list(dict.fromkeys(one.answer for one in records))
            told = distinct[: self.config.summary_answers]
            summaries.append((frame, (" ".join(told),)))
            example = self.index.frames[frame].token
            join.leave_out(REPEATED, example, len(records) - len(distinct))
            join.leave_out(TOO_MANY, example, len(distinct) - len(told))
        return SceneSummaries(self.index, self.dialect, *self.part(summaries, split, join.report()))
