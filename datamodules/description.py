"""What a language data set holds on a root: joins, counts, lengths of texts, examples."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datamodules.conversations import LanguageDataModule
from datamodules.joining import JoinReport
from odvla.language.prompts import answers_of
from odvla.types import Conversation

# Entries of Conversation.meta that have few values.
GROUPS = (
    "dataset", "template_type", "num_hop", "command", "known_waypoints", "class", "topic", "tags",
    "part", "decision", "view",
)  # fmt: skip
SHORT = 30  # characters of an answer that may come often
COMMON = 8  # of them are told
Told = Callable[[int, int], None]  # conversations done, of how many


@dataclass(frozen=True)
class Lengths:
    """How long texts of one sort are, in one unit."""

    shortest: int
    median: float
    most: float  # 95 of 100 are not longer
    longest: int
    total: int


@dataclass(frozen=True)
class TextLengths:
    """Texts of one sort."""

    kind: str  # of the conversations
    text: str  # question | thoughts | answer | prompt
    characters: Lengths
    words: Lengths
    tokens: Lengths | None  # None: there is no tokenizer


@dataclass(frozen=True)
class Example:
    """One conversation."""

    id: str
    sample_token: str
    scene: str
    kind: str
    question: str
    answer: str
    meta: dict[str, str]


@dataclass(frozen=True)
class Description:
    """What one split has."""

    name: str
    root: str
    version: str
    split: str
    reports: tuple[JoinReport, ...]
    frames: int  # key-frames of the split
    frames_with: int  # those with conversations
    per_frame: Lengths | None  # conversations of a key-frame that has any
    conversations: int
    counts: dict[str, dict[str, int]]  # kind and GROUPS -> value -> conversations
    common_answers: dict[str, dict[str, int]]  # kind -> the commonest short answers
    lengths: tuple[TextLengths, ...]
    examples: tuple[Example, ...]

    def as_tree(self) -> dict[str, Any]:
        """Primitives only, for JSON."""
        tree = asdict(self)
        for report, told in zip(self.reports, tree["reports"], strict=True):
            told |= {"file": str(report.file), "joined": report.joined}
        return tree


class _Texts:
    """Lengths of the texts of one sort, as they stream by."""

    def __init__(self) -> None:
        self.units = {name: array("L") for name in ("characters", "words", "tokens")}

    def add(self, text: str, tokens_of: Callable[[str], int] | None) -> None:
        self.units["characters"].append(len(text))
        self.units["words"].append(len(text.split()))
        if tokens_of is not None:
            self.units["tokens"].append(tokens_of(text))

    def summed_up(self, kind: str, text: str) -> TextLengths:
        characters, words, tokens = (_lengths(values) for values in self.units.values())
        assert characters is not None
        assert words is not None
        return TextLengths(kind, text, characters, words, tokens)


def describe(
    data: LanguageDataModule,
    split: str,
    *,
    name: str = "",
    tokens_of: Callable[[str], int] | None = None,
    examples: int = 3,
    told: Told | None = None,
) -> Description:
    """Go through all conversations of a split.

    Args:
        data: the data module.
        split: train or val.
        name: of the data set.
        tokens_of: number of tokens of a text; None: not counted.
        examples: conversations to show, evenly spread.
        told: called now and then.

    Raises:
        UserError: a file is missing, or a record does not fit.
    """
    source = data.source(split)
    assert source is not None
    frames = data.frame_numbers(split)
    per_frame = [source.count(frame) for frame in frames]
    total = sum(per_frame)
    wanted = {int((k + 0.5) * total / examples) for k in range(examples)}
    counts: dict[str, Counter[str]] = {group: Counter() for group in ("kind", *GROUPS)}
    answers: dict[str, Counter[str]] = {}
    texts: dict[tuple[str, str], _Texts] = {}
    shown = []
    for number, conversation in enumerate(data.conversations(split)):
        counts["kind"][conversation.kind] += 1
        for group in GROUPS:
            if conversation.meta.get(group):  # "" tells nothing
                counts[group][conversation.meta[group]] += 1
        if len(conversation.reference) <= SHORT:
            answers.setdefault(conversation.kind, Counter())[conversation.reference] += 1
        for sort, text in _texts(conversation):
            texts.setdefault((conversation.kind, sort), _Texts()).add(text, tokens_of)
        if number in wanted:
            shown.append(_example(data, conversation))
        if told is not None and number % 64 == 0:
            told(number, total)
    return Description(
        name=name or type(data).__name__,
        root=str(data.config.folder),
        version=data.config.version,
        split=split,
        reports=data.join_reports(split),
        frames=len(frames),
        frames_with=sum(count > 0 for count in per_frame),
        per_frame=_lengths([count for count in per_frame if count]),
        conversations=total,
        counts={group: _sorted(found) for group, found in counts.items() if found},
        common_answers={kind: dict(found.most_common(COMMON)) for kind, found in answers.items()},
        lengths=tuple(found.summed_up(*sort) for sort, found in texts.items()),
        examples=tuple(shown),
    )


def _texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """The texts of a conversation by sort: its record's question, its answer, all it is asked."""
    if "question" in conversation.meta:
        yield "question", conversation.meta["question"]
    if "thoughts" in conversation.meta and (thoughts := answers_of(conversation.turns)[0]):
        yield "thoughts", thoughts
    yield "answer", conversation.reference
    yield "prompt", "\n".join(turn.text for turn in conversation.turns[:-1])


def _example(data: LanguageDataModule, conversation: Conversation) -> Example:
    frame = data.index.frame(conversation.sample_token)
    answer = conversation.reference
    if "thoughts" in conversation.meta:
        answer = "\n".join(filter(None, answers_of(conversation.turns)))
    return Example(
        id=conversation.id,
        sample_token=conversation.sample_token,
        scene=f"{data.index.scenes[frame.scene].name}, key-frame {frame.position}",
        kind=conversation.kind,
        question=conversation.meta.get("question", conversation.turns[-2].text),
        answer=answer,
        meta=dict(conversation.meta),
    )


def _lengths(values: array[int] | list[int]) -> Lengths | None:
    if not len(values):
        return None
    found = np.asarray(values, dtype=np.int64)
    median, most = np.percentile(found, (50, 95)).tolist()
    return Lengths(int(found.min()), median, most, int(found.max()), int(found.sum()))


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
