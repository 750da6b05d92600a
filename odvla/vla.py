"""DrivingVLA: cameras -> encoder -> queries -> projectors -> splice -> language model.

Read from top to bottom: what it is made of (config), what goes in and comes out, the whole.

    frames --encoder--> features --queries--> tokens of "scene", "track", "map"   (perceive)
    tokens --projectors--> language width --splice into the text--> embeddings     (_spliced)
    embeddings --language model--> loss (forward) or text (generate)
    features, tokens, state of the language model --planner--> waypoints   (regress)

What is unusual: the past is an explicit value (VLAState) that goes in and comes out; any number of
conversations may be about any row of the batch; a conversation about an object is left out of the
batch when no track is near the object, and counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from odvla.errors import UserError
from odvla.language import generation
from odvla.language.action_bins import ActionBinStore
from odvla.language.causal_lm import CausalLM, LanguageConfig
from odvla.language.draft import Drafting, MotionDraft
from odvla.language.generation import Decoded
from odvla.language.grammar import Grammar
from odvla.language.splice import Spliced, match_objects, splice
from odvla.language.talk_rows import request_of, seeds_of, shared_text, talk_rows
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import PlanForm
from odvla.outputs import Generation, Perception, Regression, TalkOutput, Teaching, VLAState
from odvla.planner import PlannerConfig
from odvla.projectors import ProjectorConfig
from odvla.seeing import see_clip
from odvla.types import (
    EGO_SCALES,
    IGNORE_INDEX,
    Batch,
    Frames,
    Stream,
    Talk,
)

EGO_NOW = 9  # so many of them are of now, the rest is the history


@dataclass(frozen=True)
class VLAConfig:
    """The parts of a DrivingVLA.

    `encoder` is an encoder's config (with build()); `queries` are query modules' configs (with
    build(dim, grid)), at most one a stream.
    """

    encoder: Any
    queries: tuple[Any, ...]
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    # Regresses plans (stages.planning.actions=regression); None: none is built. One that no stage
    # uses stays as it was built.
    planner: PlannerConfig | None = None
    # An object is the track whose centre is nearest, if it is as near as this.
    object_match_m: float = 2.0
    # Put the ego state into the text as one projected token, too, where the dialect has <EGO>: a
    # language model that nobody has pre-trained takes long to learn what digits mean. Not in the
    # paper.
    ego_token: bool = False
    # Whether the ego token holds the past 2 s, beside the state of now.
    ego_token_history: bool = True
    # Streams that the language model is not shown, of "scene", "track" and "map", for ablations: as
    # on a road where nothing was found. The one token of an object that is asked about stays.
    hidden_streams: tuple[str, ...] = ()
    # A conversation longer than this many places, or than the language model's context (0), is
    # refused; cut: its end is lost instead, as in the released code.
    max_length: int = 0
    cut_to_length: bool = False

    def __post_init__(self) -> None:
        """Check the names of streams.

        Raises:
            UserError: naming the unknown one.
        """
        for stream in self.hidden_streams:
            if stream not in get_args(Stream):
                raise UserError(
                    f"model.hidden_streams must be some of {', '.join(get_args(Stream))}, "
                    f"not {stream!r}"
                )

    def build(self, tokenizer: ChatTokenizer) -> DrivingVLA:
        """The model, for texts of this tokenizer.

        Raises:
            UserError: two query modules of one stream, or one that needs features the encoder
                does not make.
        """
        return DrivingVLA(self, tokenizer)


class DrivingVLA(nn.Module):
    """The whole model; see the module's text."""

    ego_scales: Tensor
    # Give parameters that a batch does not use a gradient of zeros (see stages/sharding.py).
    every_parameter_counts = False

    def __init__(self, config: VLAConfig, tokenizer: ChatTokenizer) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = config.encoder.build()
        self.queries = nn.ModuleDict()
        widths: dict[str, int] = {}
        for query_config in config.queries:
            try:
                module = query_config.build(dim=self.encoder.dim, grid=self.encoder.grid)
            except ValueError as error:
                names = f"{type(query_config).__name__} with {type(config.encoder).__name__}"
                raise UserError(f"{names}: {error}") from error
            if module.stream in self.queries:
                raise UserError(f"two query modules make the {module.stream!r} stream")
            if module.needs == "bev" and self.encoder.grid is None:
                raise UserError(
                    f"{type(query_config).__name__} needs bird's-eye-view features, which "
                    f"{type(config.encoder).__name__} does not make"
                )
            self.queries[module.stream] = module
            widths[module.stream] = module.dim
        self.language: CausalLM = config.language.build(len(tokenizer), tokenizer.added_ids)
        if config.ego_token:
            widths["ego"] = len(EGO_SCALES)
            self.register_buffer("ego_scales", torch.tensor(EGO_SCALES), persistent=False)
        self.projectors = nn.ModuleDict(
            {
                stream: config.projector.build(dim, self.language.hidden)
                for stream, dim in widths.items()
            }
        )
        self.planner = None
        if config.planner is not None:
            if self.encoder.grid is not None:
                widths["bev"] = self.encoder.dim
            widths["language"] = self.language.hidden
            self.planner = config.planner.build(widths, self.encoder.grid)
        # What the action tokens of the vocabulary mean, once a planning stage has settled that.
        bins = len(tokenizer.action_ids)
        self.actions = ActionBinStore(bins) if bins else None

    # -- seeing ---------------------------------------------------------------------------------

    def perceive(
        self,
        clip: tuple[Frames, ...],
        state: VLAState | None = None,
        *,
        blind: bool = False,
        teaching: Teaching | None = None,
    ) -> tuple[Perception, VLAState]:
        """Look at a clip, oldest frame first.

        Args:
            clip: T frames of B scenes, at least one.
            state: what the previous call returned; None at the start.
            blind: show black images (and no lidar points), to measure what vision is worth.
            teaching: let the ground truth decide which tracks live, as in training.
        """
        return see_clip(self.encoder, self.queries, clip, state, blind=blind, teaching=teaching)

    # -- talking --------------------------------------------------------------------------------

    def forward(
        self,
        batch: Batch,
        state: VLAState | None = None,
        *,
        blind: bool = False,
        seen: Perception | None = None,
    ) -> TalkOutput:
        """Next-token loss of the batch's conversations.

        Args:
            batch: conversations, and what they are about.
            state: what the previous call returned; None at the start.
            blind: see `perceive`.
            seen: what `perceive` makes of the batch, where that is known already.

        Raises:
            UserError: a conversation is longer than the language model's context, or its text has
                slots and the batch no images.
        """
        assert batch.talk is not None
        perception, state = (seen, state) if seen else self._look(batch, state, blind)
        talk, tokens = batch.talk, self._objects(batch.talk, perception)
        kept = (tokens != -1).nonzero()[:, 0]
        unmatched, matched = len(tokens) - len(kept), int((tokens >= 0).sum())
        if len(kept) == 0:
            # Nothing to learn here, but every process of a distributed run must take the step.
            kept = kept.new_zeros(1)
            talk = replace(talk, labels=torch.full_like(talk.labels, IGNORE_INDEX))
        spliced = self._spliced(batch, talk, tokens, kept, perception)
        loss, logits, labels = self.language(spliced)
        return TalkOutput(self.counted(loss), logits, labels, matched, unmatched, perception, state)

    def counted(self, loss: Tensor) -> Tensor:
        """The loss with a gradient of zeros for parameters that a batch has not used."""
        if not self.every_parameter_counts:
            return loss
        in_layers = {id(p) for p in self.language.layers.parameters()}  # these are always used
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in in_layers]
        return loss + 0.0 * torch.stack([p.sum() for p in rest]).sum()

    def regress(
        self,
        batch: Batch,
        state: VLAState | None = None,
        *,
        reads: tuple[str, ...] = (),
        blind: bool = False,
        seen: Perception | None = None,
    ) -> Regression:
        """Plan without writing: by the planner.

        Args:
            batch: what is seen, the car's state, and a request for a plan where that is read.
            state: what the previous call returned; None at the start.
            reads: of what the planner can read; (): all of it.
            blind: see `perceive`.
            seen: see `forward`.

        Raises:
            UserError: the model has no planner, or the bird's-eye view that it reads was not kept.
        """
        if self.planner is None or batch.ego is None:
            raise UserError("plans by regression need model.planner and the car's state")
        perception, state = (seen, state) if seen else self._look(batch, state, blind)
        assert perception is not None
        reads = reads or self.planner.config.reads
        asked = torch.ones_like(batch.valid)
        features = {
            stream: (tokens.feats, self._shown(stream, tokens.mask))
            for stream, tokens in perception.tokens.items()
            if stream in reads
        }
        if "language" in reads:
            features["language"] = self._heard(batch, perception)
            asked = features["language"][1][:, 0]
        if "bev" in reads:
            if perception.features is None or perception.features.bev is None:
                raise UserError(
                    "model.planner reads the bird's-eye view, which remembered tokens do not hold: "
                    "set stages.planning.remember_tokens=false, or model.planner.reads to streams"
                )
            cells = perception.features.bev.flatten(1, 2)
            everywhere = torch.ones(cells.shape[:2], dtype=torch.bool, device=cells.device)
            # The view is the whole scene: who hides the scene hides it.
            features["bev"] = cells, self._shown("scene", everywhere)
        return Regression(self.planner(features, batch.ego), asked, perception, state)

    def _heard(self, batch: Batch, perception: Perception) -> tuple[Tensor, Tensor]:
        """The language model's state where each row's answer would begin.

        Returns:
            States [B, 1, D], and which rows have a request [B, 1].
        """
        talk, B = batch.talk, len(batch.valid)
        if talk is None:  # all scenes of this group have ended
            nobody = torch.zeros(B, 1, dtype=torch.bool, device=batch.valid.device)
            return torch.zeros(B, 1, self.language.hidden, device=batch.valid.device), nobody
        everybody = torch.arange(len(talk.frame_index), device=talk.mask.device)
        objects = self._objects(talk, perception)
        spliced = self._spliced(batch, request_of(talk), objects, everybody, perception)
        last = spliced.attention_mask.sum(1) - 1
        ends = self.language.states(spliced)[everybody, last]  # G, D
        requests = talk.frame_index.bincount(minlength=B)
        if int(requests.max()) > 1:
            raise UserError("plans by regression need one request a key-frame")
        heard = ends.new_zeros(B, ends.shape[1]).index_copy(0, talk.frame_index, ends)
        return heard[:, None], (requests > 0)[:, None]

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        state: VLAState | None = None,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 128,
        blind: bool = False,
        seen: Perception | None = None,
        samples: int = 1,
        temperature: float = 1.0,
        drafting: Drafting | None = None,
    ) -> Generation:
        """Answer the batch's conversations.

        Args:
            batch: conversations are read up to their last answer, which is not looked at.
            state: what the previous call returned; None at the start.
            grammar: what may be written; None: anything.
            max_new_tokens: most tokens an answer may have.
            blind: see `perceive`.
            seen: see `forward`.
            samples: 1 writes the most likely tokens; more draws so many answers at random. They
                depend on the conversation's id, not on the batch.
            temperature: of the draws; below 1, likely answers are drawn more often.
            drafting: how plans are guessed before they are verified; None: not at all. The answers
                are the same.

        Raises:
            UserError: as `forward`.
        """
        started = self._now()
        perception, state = (seen, state) if seen else self._look(batch, state, blind)
        if batch.talk is None:  # all scenes of this group have ended, or the frame has no talk
            return Generation((), (), (), perception, state)
        talk, tokens = batch.talk, self._objects(batch.talk, perception)
        kept = (tokens != -1).nonzero()[:, 0].repeat_interleave(samples)
        answers: list[list[list[int]]] = [[] for _ in tokens]
        encoded, found = self._now(), Decoded([], 0, 0, 0.0, 0.0)
        if len(kept):
            prompt = request_of(talk)
            spliced = self._spliced(batch, prompt, tokens, kept, perception, pad_left=True)
            encoded = self._now()
            drafts = self._drafts(batch, talk, kept, grammar) if _guesses(drafting) else ()
            found = generation.decode(
                self.language,
                spliced,
                self.tokenizer.end_id,
                max_new_tokens=max_new_tokens,
                grammar=grammar,
                seeds=seeds_of(talk, kept, samples),
                temperature=temperature,
                drafts=drafts,
                drafting=drafting,
                prefix=shared_text(prompt, kept),
            )
            for row, ids in zip(kept.tolist(), found.ids, strict=True):
                answers[row].append(ids)
        return Generation(
            texts=tuple(tuple(map(self.tokenizer.decode, drawn)) for drawn in answers),
            unmatched=tuple((tokens == -1).tolist()),
            new_tokens=tuple(sum(map(len, drawn)) for drawn in answers),
            perception=perception,
            state=state,
            runs=found.runs,
            encode_s=encoded - started,
            prefill_s=found.prefill_s,
            decode_s=found.decode_s,
        )

    def _drafts(
        self, batch: Batch, talk: Talk, rows: Tensor, grammar: Grammar | None
    ) -> list[MotionDraft]:
        """Guesses of the plans that the conversations `rows` ask for."""
        if batch.ego is None or grammar is None:
            raise ValueError("drafts of plans need the batch's ego state, and a grammar")
        past = batch.ego.history[talk.frame_index[rows]].cpu().numpy()
        forms = [PlanForm.from_meta(talk.conversations[row].meta) for row in rows.tolist()]
        return [
            MotionDraft(self.tokenizer, grammar, form, history)
            for form, history in zip(forms, past, strict=True)
        ]

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        device = self.language.head.weight.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _look(
        self, batch: Batch, state: VLAState | None, blind: bool
    ) -> tuple[Perception | None, VLAState | None]:
        if batch.clip:
            if len(batch.clip) > 1:
                # History only sets the temporal state; as in BEVFormer, no gradient flows through
                # it, which halves the work.
                with torch.no_grad():
                    _, state = see_clip(
                        self.encoder, self.queries, batch.clip[:-1], state, blind=blind
                    )
            return see_clip(self.encoder, self.queries, batch.clip[-1:], state, blind=blind)
        if batch.talk is not None:
            slots = (batch.talk.input_ids < 0).any(1).nonzero()[:, 0]
            if len(slots):
                conversation = batch.talk.conversations[int(slots[0])]
                raise UserError(
                    f"conversation {conversation.id} has slots for the scene, but the batch has "
                    "no images"
                )
        return None, state

    def _objects(self, talk: Talk, perception: Perception | None) -> Tensor:
        """Track token of each conversation's object, see `match_objects`."""
        tracks = perception.tokens.get("track") if perception else None
        return match_objects(talk, tracks, self.config.object_match_m)

    def _spliced(
        self,
        batch: Batch,
        talk: Talk,
        object_token: Tensor,
        rows: Tensor,
        perception: Perception | None,
        *,
        pad_left: bool = False,
    ) -> Spliced:
        """Embed the conversations `rows` of a talk, slots filled."""
        talk = talk_rows(talk, rows)
        # In one layout, so that tokens that were kept give the same bits as fresh ones.
        streams = {
            stream: (
                self.projectors[stream](tokens.feats.contiguous()),
                self._shown(stream, tokens.mask),
            )
            for stream, tokens in (perception.tokens.items() if perception else ())
        }
        if self.config.ego_token and batch.ego is not None:
            state = batch.ego.motion / self.ego_scales
            if not self.config.ego_token_history:
                state = state * (torch.arange(len(EGO_SCALES), device=state.device) < EGO_NOW)
            here = torch.ones(len(state), 1, dtype=torch.bool, device=state.device)
            streams["ego"] = (self.projectors["ego"](state[:, None]), here)
        text = self.language.embed(talk.input_ids.clamp(min=0))
        limit = self.config.max_length or self.language.max_positions
        spliced = splice(
            text,
            talk,
            streams,
            object_token[rows],
            pad_left=pad_left,
            max_length=limit if self.config.cut_to_length else None,
        )
        if spliced.embeds.shape[1] > limit:
            longest = int(spliced.attention_mask.sum(1).argmax())
            whose = "model.max_length" if self.config.max_length else "the language model's"
            raise UserError(
                f"conversation {talk.conversations[longest].id} takes {spliced.embeds.shape[1]} "
                f"tokens, more than {whose} {limit} positions"
            )
        return spliced

    def _shown(self, stream: str, mask: Tensor) -> Tensor:
        """Which of a stream's tokens the language model is shown."""
        return torch.zeros_like(mask) if stream in self.config.hidden_streams else mask


def _guesses(drafting: Drafting | None) -> bool:
    return drafting is not None and drafting.guess != "none"
