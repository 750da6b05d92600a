"""Ask a trained model about one sample: its plan, or the answer to a question."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.conversations import LanguageDataModule
from experiments.handoff import (
    CARD,
    TOKENIZER,
    check_files,
    load_checked,
    read_card,
)
from experiments.pictures import draw_scene, save_picture
from experiments.prepare import build_model, data_module
from experiments.sample_pictures import MIN_SCORE, full_size_frame, scene_picture
from experiments.schema import ExperimentConfig
from odvla.errors import UserError
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import ParseFailure, format_waypoints, parse_waypoints
from odvla.outputs import Generation, Perception
from odvla.types import Batch
from stages.base import StageModule
from stages.planning import PlanningStage, PlanningStageConfig
from stages.regression import RegressionStage
from stages.thinking import thoughts_of

MAX_CLIP = 40  # key-frames before the sample that the model may look at first


@dataclass(frozen=True)
class Prediction:
    """What the model said about a sample."""

    text: str
    waypoints: list[list[float]] | None  # [6][2] metres; None for an answer, or an unreadable plan
    picture: Path
    stage: str  # whose weights were used
    cost: Cost


@dataclass(frozen=True)
class Said:
    """What came of one request."""

    text: str
    waypoints: list[list[float]] | None
    perception: Perception | None
    cost: Cost


@dataclass(frozen=True)
class Cost:
    """What an answer took."""

    tokens: int
    runs: int  # of the language model
    encode_s: float  # seeing, and putting what was seen into the text
    prefill_s: float  # reading the prompt
    decode_s: float  # writing

    @classmethod
    def of(cls, found: Generation) -> Cost:
        """Of the first answer of a batch."""
        times = (found.encode_s, found.prefill_s, found.decode_s)
        return cls(found.new_tokens[0], found.runs, *times)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.tokens} tokens in {self.runs} runs of the language model; encode "
            f"{1000 * self.encode_s:.0f} ms, prefill {1000 * self.prefill_s:.0f} ms, decode "
            f"{1000 * self.decode_s:.0f} ms"
        )


class Predictor:
    """A finished stage's weights, ready to be asked about key-frames of a data root.

    Args:
        config: the experiment; its data root may be another than it was trained on.
        folder: of the finished stage.

    Raises:
        UserError: nothing is trained there, or the handoff is damaged.
    """

    def __init__(self, config: ExperimentConfig, folder: Path) -> None:
        card = read_card(folder)
        check_files(folder, card)
        tokenizer = ChatTokenizer.load(folder / TOKENIZER)
        data = data_module(config, "planning", tokenizer)
        assert isinstance(data, LanguageDataModule)
        self.data = data
        self._vla = build_model(config, tokenizer)
        load_checked(folder, card, self._vla, config)
        self._vla.eval()
        self._settings = config.stages.planning or PlanningStageConfig()

    def say(self, sample_token: str, question: str | None = None) -> Said:
        """Plan, or answer, at one sample.

        Args:
            sample_token: of any key-frame of the root.
            question: None: a plan is wanted.

        Raises:
            UserError: there is no such sample, or plans are not to be had of the data.
        """
        clip_length = min(self.data.index.frame(sample_token).position, MAX_CLIP) + 1
        conversation = (
            self.data.plan_request(sample_token)
            if question is None
            else self.data.question(sample_token, question)
        )
        batch = self.data.frame(sample_token, (conversation,), clip_length=clip_length)
        with torch.inference_mode():
            if question is None:
                return _plan(self._settings.build(self._vla), batch)
            found = self._vla.generate(batch, max_new_tokens=self._settings.max_new_tokens)
            return Said(found.texts[0][0], None, found.perception, Cost.of(found))


def predict(
    config: ExperimentConfig,
    run: Path,
    sample_token: str,
    question: str | None = None,
    picture: Path | None = None,
) -> Prediction:
    """Plan, or answer, at one sample of the data root, and draw it.

    Args:
        config: the experiment; its data root may be another than it was trained on.
        run: its run folder, with at least one finished stage.
        sample_token: of any key-frame of the root.
        question: None: a plan is wanted.
        picture: where to; None: into the run folder.

    Raises:
        UserError: nothing is trained yet, the handoff is damaged, or there is no such sample.
    """
    stage, folder = _last_stage(config, run)
    predictor = Predictor(config, folder)
    said = predictor.say(sample_token, question)
    boxes = None
    if said.perception is not None and said.perception.agent_steps:
        agents = said.perception.agent_steps[-1]
        used = agents.scores[0] >= MIN_SCORE
        if agents.mask is not None:
            used &= agents.mask[0]
        boxes = agents.boxes[0][used].tolist()
    path = picture or run / "pictures" / f"{sample_token}.png"
    drawn = scene_picture(
        full_size_frame(predictor.data, sample_token),
        predictor.data.config.grid.extent_m,
        plan=said.waypoints,
        boxes=boxes,
        title=f"{sample_token}  {question or ''}",
    )
    save_picture(draw_scene(drawn), path)
    return Prediction(said.text, said.waypoints, path, stage, said.cost)


def _plan(stage: StageModule, batch: Batch) -> Said:
    """One plan, in the form that the stage has it.

    Raises:
        UserError: see PlanningStage.bins.
    """
    if isinstance(stage, RegressionStage):
        started = time.perf_counter()
        regressed = stage.regress(batch)
        waypoints = regressed.waypoints[0].tolist()
        cost = Cost(0, 0, time.perf_counter() - started, 0.0, 0.0)
        return Said(format_waypoints(waypoints), waypoints, regressed.perception, cost)
    assert isinstance(stage, PlanningStage)
    found, batch = stage.write(batch)
    assert batch.talk is not None
    assert batch.ego is not None
    conversation = batch.talk.conversations[0]
    text = stage.settle(found.texts[0], conversation, batch, 0)
    form, last_step = stage.form(conversation.meta), batch.ego.last_step[0]
    plan = parse_waypoints(text, form, last_step)
    read = None if isinstance(plan, ParseFailure) else plan.xy.tolist()
    text = " ".join([*thoughts_of(conversation).values(), text])
    return Said(text, read, found.perception, Cost.of(found))


def _last_stage(config: ExperimentConfig, run: Path) -> tuple[str, Path]:
    for stage in reversed(config.run):
        if (run / stage / CARD).is_file():
            return stage, run / stage
    raise UserError(f"no stage is finished in {run}; run fit first")
