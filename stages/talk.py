"""What the stages that learn from text share: the language loss, and answers as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from odvla.language.draft import Drafting
from odvla.language.grammar import Grammar
from odvla.outputs import Generation, Perception, VLAState
from odvla.types import Batch, Conversation
from stages.base import Record, StageConfig, StageLoss, StageModule, gather


@dataclass(frozen=True)
class TalkConfig(StageConfig):
    """Settings of a stage that answers."""

    max_new_tokens: int = 128
    # Show each key-frame to the frozen vision half once, before training, instead of in every step.
    remember_tokens: bool = False
    # Keep what the frozen vision half makes of the training key-frames on disk, and learn from
    # that. With remember_tokens they are its tokens; without, those of every step's clip.
    feature_cache: bool = False


class TalkStage(StageModule):
    """Next-token loss on conversations; the test writes one answer a conversation."""

    config: TalkConfig
    unmatched = 0  # conversations of the test whose object no track was found for
    seen: Perception | None = None  # what the last plain answers were given about

    def loss_of(self, batch: Batch, state: VLAState | None) -> StageLoss:
        """Cross-entropy of the assistant's text, a mean over its tokens."""
        seen = self.recall(batch)
        if batch.talk is None:
            # A streamed key-frame without conversations only moves the temporal state on.
            if seen is None:
                _, state = self.vla.perceive(batch.clip, state)
            return StageLoss(torch.zeros((), device=batch.valid.device), 0, state=state)
        output = self.vla(batch, state, seen=seen)
        return StageLoss(output.loss, output.labels.numel(), state=output.state)

    def grammar(self, meta: Mapping[str, str]) -> Grammar | None:
        """What may be written, given a conversation's `meta`; None: anything."""
        return None

    @property
    def samples(self) -> int:
        """Answers that are drawn for one conversation; 1: the most likely one."""
        return 1

    @property
    def temperature(self) -> float:
        """Of the draws."""
        return 1.0

    def drafting(self, meta: Mapping[str, str]) -> Drafting | None:
        """How answers are guessed before they are verified; None: not at all."""
        return None

    def write(
        self,
        batch: Batch,
        state: VLAState | None = None,
        *,
        blind: bool = False,
        seen: Perception | None = None,
    ) -> tuple[Generation, Batch]:
        """Answer the conversations of a batch.

        Args:
            batch: the next key-frames of the streamed scenes.
            state: what the previous call left.
            blind: zero the images.
            seen: what the vision half makes of the batch, where that is known.

        Returns:
            The answers, and the batch whose conversations they belong to.
        """
        # All conversations of an experiment share a dialect, and so the form of their numbers.
        meta = batch.talk.conversations[0].meta if batch.talk else None
        found = self.vla.generate(
            batch,
            state,
            grammar=None if meta is None else self.grammar(meta),
            max_new_tokens=self.config.max_new_tokens,
            blind=blind,
            seen=seen,
            samples=self.samples,
            temperature=self.temperature,
            drafting=None if meta is None else self.drafting(meta),
        )
        return found, batch

    def settle(
        self, texts: Sequence[str], conversation: Conversation, batch: Batch, row: int
    ) -> str:
        """One answer of several."""
        return texts[0]

    def on_test_epoch_start(self) -> None:
        """Start to count, too."""
        super().on_test_epoch_start()
        self.unmatched = 0

    def on_test_epoch_end(self) -> None:
        """Log how many conversations had to be left out."""
        super().on_test_epoch_end()
        self.log("test/unmatched_objects", float(sum(gather(self.unmatched))))

    def predict_rows(self, batch: Batch) -> list[Record]:
        """One record a conversation, but for those whose object was not found."""
        return self.answers(batch)

    def answers(
        self,
        batch: Batch,
        *,
        blind: bool = False,
        stream: str = "",
        seen: Perception | None = None,
    ) -> list[Record]:
        """Answer a batch.

        Args:
            batch: the next key-frames of the streamed scenes.
            blind: zero the images.
            stream: whose temporal state it goes on from; "": the seeing or the blind one's.
            seen: what the vision half makes of the batch, where that is known.
        """
        plain = not blind and not stream
        stream = stream or ("blind" if blind else "seeing")
        found, batch = self.write(
            batch,
            self.streams.get(stream),
            blind=blind,
            seen=None if blind else seen or self.recall(batch),
        )
        self.streams[stream] = found.state
        if plain:
            self.seen = found.perception
        if batch.talk is None:
            return []
        records = []
        rows = batch.talk.frame_index.tolist()
        talks = zip(batch.talk.conversations, found.texts, found.unmatched, rows, strict=True)
        for conversation, texts, unmatched, row in talks:
            if not unmatched:
                text = self.settle(texts, conversation, batch, row)
                records.append(self.record(conversation, text, batch, row))
        if plain:
            self.unmatched += sum(found.unmatched)
        return records

    def record(self, conversation: Conversation, text: str, batch: Batch, row: int) -> Record:
        """What is written about one answer; `row` is the row of the batch it is about."""
        asked = [turn.text for turn in conversation.turns if turn.role == "user"]
        return {
            "id": conversation.id,
            "sample_token": conversation.sample_token,
            "kind": conversation.kind,
            # The request proper is a prompt's last line; what stands before is ego state and slots.
            "question": asked[-1].splitlines()[-1] if asked else "",
            "text": text,
            "reference": conversation.reference,
            "meta": conversation.meta,
        }
