"""DriveLM-nuScenes: questions about a key-frame in the order of a graph (v1_*_nus.json).

A file is {scene_token: {"scene_description": text, "key_frames": {sample_token: {
"key_object_infos": {"<c1,CAM_BACK,1088.3,497.5>": {"Category", "Status", "Visual_description",
"2d_bbox"}}, "QA": {"perception": [{"Q", "A", "C", "con_up", "con_down", "cluster", "layer"}],
"prediction": [...], "planning": [...], "behavior": [...]}, "image_paths": {camera: path}}}}}. The
files of the challenge give every question its "tag", have no key_object_infos, and the questions of
val have no answers.

A key object is named by a camera and the middle of its box there, in pixels of the 1600x900 image.
It stays as it is, in questions and answers: it is text to the model, and what the match term of the
scores compares.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.collate import Tokenises
from datamodules.conversations import FrameRecords, LanguageDataConfig, LanguageDataModule
from datamodules.joining import Join
from datamodules.language_files import dict_items, read_json, text_field
from datamodules.multiple_choice import INSTRUCTION, LETTERS, as_multiple_choice
from datamodules.records import FrameRecord
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.metrics.drivelm import TAGS
from odvla.types import CAMERAS, Conversation, EgoState, Turn

log = logging.getLogger(__name__)
# The order of the graph, which is that of the challenge's numbers, too.
TOPICS = ("perception", "prediction", "planning", "behavior")
IMAGE_SIZE = (1600, 900)  # that key objects are measured in, whatever size is shown to a model
# The challenge asks these with four options (its convert_data.py): how such a question starts, and
# answers that are options even where a file does not give them.
WITH_OPTIONS: dict[str, tuple[str, ...]] = {
    "What is the moving status of object": (
        "Going ahead.", "Turn right.", "Turn left.", "Stopped.", "Back up.", "Reverse parking.",
    ),
    "Predict the behavior of the ego vehicle": (),
}  # fmt: skip
_NAMED = re.compile(r"<c\d+,[^<>]*>")
_KEY_OBJECT = re.compile(r"<(c\d+),(CAM_\w+),(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)>")


@dataclass(frozen=True)
class KeyObject:
    """What `<c1,CAM_BACK,1088.3,497.5>` says."""

    name: str
    camera: str  # one of CAMERAS
    x_px: float  # of 1600
    y_px: float  # of 900

    @property
    def inside(self) -> bool:
        """Whether it lies in its image."""
        return self.x_px <= IMAGE_SIZE[0] and self.y_px <= IMAGE_SIZE[1]


@dataclass(frozen=True, slots=True)
class GraphQuestion:
    """One question of a key-frame."""

    scene_token: str
    sample_token: str
    topic: str  # one of TOPICS
    number: int  # place in the key-frame, counted through all topics: the challenge's
    question: str
    answer: str  # "": held back
    tags: tuple[int, ...]  # () where the file has none

    @property
    def id(self) -> str:
        """The challenge's name of it."""
        return f"{self.scene_token}_{self.sample_token}_{self.number}"


def parse_key_object(text: str) -> KeyObject:
    """Read a key object.

    Raises:
        ValueError: it is none, or of no camera of nuScenes.
    """
    found = _KEY_OBJECT.fullmatch(text)
    if found is None or found[2] not in CAMERAS:
        raise ValueError(
            "expected <c1,CAMERA,x,y> with one of nuScenes' cameras and pixels of a 1600x900 "
            f"image, not {text!r}"
        )
    return KeyObject(found[1], found[2], float(found[3]), float(found[4]))


def read_drivelm(join: Join, *, answered: bool) -> list[tuple[int, GraphQuestion]]:
    """Key-frame number and question of every joined question, in the order of file and graph.

    Args:
        join: with a file of DriveLM-nuScenes, published or the challenge's.
        answered: whether every question must have its answer, as in training.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, scene, sample,
            topic, number and field.
    """
    path = join.file
    pairs: list[tuple[int, GraphQuestion]] = []
    outside = unlisted = 0
    for scene, sample, record in key_frames(read_json(path), path):
        where = f"scene {scene}, sample {sample}"
        told = join.fitting(where, _key_frame, record, path, (scene, sample), answered)
        if told is None:
            continue
        objects, questions = told
        outside += sum(not one.inside for one in objects)
        listed = set(record.get("key_object_infos", ()))
        for question in questions:
            if listed:
                named = _NAMED.findall(f"{question.question} {question.answer}")
                unlisted += sum(name not in listed for name in named)
            frame = join.frame(sample, f"{where}, {question.topic}")
            if frame is None:
                continue
            own = join.scene(frame).token
            if own != scene:
                raise UserError(f"{path}, {where}: the sample belongs to scene {own!r}")
            pairs.append((frame, question))
    for count, what in (
        (outside, "key objects lie outside of their 1600x900 images"),
        (unlisted, "times a text names an object that its key-frame does not list"),
    ):
        if count:
            log.warning("%s: %d %s; texts are used as they are", path, count, what)
    return pairs


def key_frames(content: Any, path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Scene token, sample token and record of every key-frame of a file.

    Raises:
        UserError: a scene has no key_frames, or a key-frame is no object.
    """
    for scene, value in dict_items(content, path):
        found = value.get("key_frames") if isinstance(value, Mapping) else None
        if not isinstance(found, Mapping):
            raise UserError(
                f"{path}, scene {scene}: field 'key_frames' must be an object keyed by sample token"
            )
        for sample, record in found.items():
            if not isinstance(record, Mapping):
                raise UserError(f"{path}, scene {scene}, sample {sample}: expected an object")
            yield scene, sample, record


def _key_frame(
    record: Mapping[str, Any], path: Path, tokens: tuple[str, str], answered: bool
) -> tuple[list[KeyObject], list[GraphQuestion]]:
    """Everything a key-frame holds."""
    objects = _key_objects(record, path, "scene {}, sample {}".format(*tokens))
    return objects, _questions(record, path, tokens, answered)


def _key_objects(record: Mapping[str, Any], path: Path, where: str) -> list[KeyObject]:
    infos = record.get("key_object_infos", {})  # the challenge's files hold them back
    if not isinstance(infos, Mapping):
        raise UserError(f"{path}, {where}: field 'key_object_infos' must be an object")
    objects = []
    for name, info in infos.items():
        try:
            objects.append(parse_key_object(name))
        except ValueError as error:
            raise UserError(f"{path}, {where}: key_object_infos: {error}") from error
        if not isinstance(info, Mapping):
            raise UserError(f"{path}, {where}: key_object_infos, {name}: expected an object")
    return objects


def _questions(
    record: Mapping[str, Any], path: Path, tokens: tuple[str, str], answered: bool
) -> list[GraphQuestion]:
    where = "scene {}, sample {}".format(*tokens)
    topics = record.get("QA")
    if not isinstance(topics, Mapping) or set(topics) != set(TOPICS):
        raise UserError(
            f"{path}, {where}: field 'QA' must be an object of {', '.join(TOPICS)}, not "
            f"{sorted(topics) if isinstance(topics, Mapping) else topics!r}"
        )
    questions: list[GraphQuestion] = []
    for topic in TOPICS:
        if not isinstance(topics[topic], list):
            raise UserError(f"{path}, {where}: field 'QA.{topic}' must be a list of questions")
        for place, asked in enumerate(topics[topic]):
            name = f"{where}, {topic} {place}"
            question = text_field(asked, "Q", path, name)
            held_back = not answered and isinstance(asked, Mapping) and not asked.get("A")
            questions.append(
                GraphQuestion(
                    scene_token=tokens[0],
                    sample_token=tokens[1],
                    topic=topic,
                    number=len(questions),
                    question=question,
                    answer="" if held_back else text_field(asked, "A", path, name),
                    tags=_tags(asked.get("tag"), path, name),
                )
            )
    return questions


def _tags(value: Any, path: Path, name: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or any(tag not in TAGS for tag in value):
        raise UserError(
            f"{path}, {name}: field 'tag' must be a list of {', '.join(map(str, TAGS))}, not "
            f"{value!r}"
        )
    return tuple(value)


def with_choices(pairs: list[tuple[int, GraphQuestion]]) -> list[tuple[int, GraphQuestion]]:
    """Questions that the challenge asks with four options, as it asks them; others as they are.

    The options are answers that the file gives to such questions, and those of WITH_OPTIONS.

    Raises:
        UserError: the file has questions of a kind, but fewer than four different answers to them.
    """
    pools: dict[str, set[str]] = {}
    for _, asked in pairs:
        kind = _option_kind(asked.question)
        if kind:
            pools.setdefault(kind, set(WITH_OPTIONS[kind])).add(asked.answer)
    for kind, answers in pools.items():
        if len(answers) < len(LETTERS):
            raise UserError(
                f"drivelm_multiple_choice needs {len(LETTERS)} different answers to "
                f"{kind!r}, and the file has {len(answers)}"
            )
    ordered = {kind: sorted(answers) for kind, answers in pools.items()}

    def asked_anew(asked: GraphQuestion) -> GraphQuestion:
        kind = _option_kind(asked.question)
        if not kind:
            return asked
        text, letter = as_multiple_choice(asked.question, asked.answer, ordered[kind], asked.id)
        return replace(asked, question=text, answer=letter)

    return [(frame, asked_anew(asked)) for frame, asked in pairs]


def _option_kind(question: str) -> str:
    """Which of WITH_OPTIONS a question is; "": none, or it has its options already."""
    if INSTRUCTION in question:
        return ""
    return next((kind for kind in WITH_OPTIONS if question.startswith(kind)), "")


class GraphQuestions(FrameRecords[GraphQuestion]):
    """One conversation a question, each asked on its own."""

    def conversation(
        self, frame: FrameRecord, number: int, record: GraphQuestion, ego: EgoState
    ) -> Conversation:
        """Word one question."""
        return Conversation(
            id=record.id,
            sample_token=frame.token,
            kind="drivelm",
            turns=self.dialect.turns("drivelm", record.answer or None, ego, record.question),
            reference=record.answer,
            meta={
                "dataset": "drivelm",
                "question": record.question,
                "topic": record.topic,
                "number": str(record.number),
                "scene_token": record.scene_token,
                "tags": " ".join(map(str, record.tags)),
            },
        )


class WholeGraphs(FrameRecords[tuple[GraphQuestion, ...]]):
    """One conversation a key-frame: its questions in turn, each after the answers before it."""

    def conversation(
        self,
        frame: FrameRecord,
        number: int,
        record: tuple[GraphQuestion, ...],
        ego: EgoState,
    ) -> Conversation:
        """Word a key-frame."""
        first, *others = record
        turns = list(self.dialect.turns("drivelm", first.answer, ego, first.question))
        for asked in others:
            turns.append(Turn("user", self.dialect.request("text", None, asked.question)))
            turns.append(Turn("assistant", asked.answer))
        return Conversation(
            id=f"{first.scene_token}_{frame.token}",
            sample_token=frame.token,
            kind="drivelm",
            turns=tuple(turns),
            reference=record[-1].answer,
            meta={
                "dataset": "drivelm",
                "scene_token": first.scene_token,
                "topic": " ".join(asked.topic for asked in record),
                "number": " ".join(str(asked.number) for asked in record),
            },
        )


@dataclass(frozen=True)
class DriveLMConfig(LanguageDataConfig):
    """Settings of DriveLMDataModule."""

    drivelm_files: tuple[str, str] = (
        "drivelm/v1_1_train_nus.json",
        "drivelm/v1_1_val_nus_q_only.json",
    )
    drivelm_topics: tuple[str, ...] = TOPICS
    # Train on whole key-frames, all questions of one in turn; evaluation asks them one by one.
    drivelm_multi_turn: bool = False
    # Train on the questions that the challenge asks with four options as it asks them.
    drivelm_multiple_choice: bool = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: no topic, or an unknown one.
        """
        super().__post_init__()
        if not self.drivelm_topics or set(self.drivelm_topics) - set(TOPICS):
            raise UserError(
                f"drivelm_topics must be some of {', '.join(TOPICS)}, not {self.drivelm_topics}"
            )

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return DriveLMDataModule(self, tokenizer, dialect)


class DriveLMDataModule(LanguageDataModule):
    """DriveLM on nuScenes key-frames."""

    config: DriveLMConfig

    def make_source(self, split: str) -> GraphQuestions | WholeGraphs:
        """Questions of one split's file."""
        config, train = self.config, split == "train"
        path = config.language_folder / config.drivelm_files[not train]
        join = self.join(path, split)
        pairs = read_drivelm(join, answered=train)
        if train and config.drivelm_multiple_choice:
            pairs = with_choices(pairs)
        chosen = [pair for pair in pairs if pair[1].topic in config.drivelm_topics]
        join.leave_out(
            "its topic is not in drivelm_topics", str(path.name), len(pairs) - len(chosen)
        )
        records, reports = self.part(chosen, split, join.report())
        if train and config.drivelm_multi_turn:
            graphs = {frame: (questions,) for frame, questions in records.items()}
            return WholeGraphs(self.index, self.dialect, graphs, reports)
        return GraphQuestions(self.index, self.dialect, records, reports)
