"""Plans that are thought over: describe the scene, decide, then write the plan (DriveVLM's chain).

A conversation holds three requests and, as it comes from the data, their three answers. At a test
none of these answers may be seen, the decision least of all: it is read off the driven path. So
the conversation is taken up at its first request, and goes on with what the model itself says.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from odvla.language.decisions import Decisions, all_decisions
from odvla.language.grammar import choice_grammar
from odvla.language.prompts import THINKING
from odvla.outputs import Generation, Perception, VLAState
from odvla.types import SLOT_IDS, Batch, Conversation, Turn

if TYPE_CHECKING:
    from stages.planning import PlanningStage

_SLOTS = re.compile("|".join(map(re.escape, SLOT_IDS)))


def think(
    stage: PlanningStage,
    batch: Batch,
    state: VLAState | None,
    *,
    blind: bool,
    seen: Perception | None,
) -> tuple[Generation, Batch]:
    """Answer the three requests of each conversation, one after the other.

    The description is free text, the decision one of `all_decisions` (whose, the conversation
    says), the plan what the stage's grammar allows. The scene is looked at once.

    Returns:
        The plans, with the tokens and the time of all three answers, and the batch with the
        conversations as they were held.
    """
    assert batch.talk is not None
    tokenizer, owners = stage.vla.tokenizer, batch.talk.frame_index.tolist()
    device = batch.talk.input_ids.device
    told = batch.talk.conversations
    meta = told[0].meta
    whose = cast(Decisions, meta["thoughts"])
    requests = [[turn for turn in c.turns if turn.role == "user"] for c in told]
    said = [[turn for turn in c.turns if turn.role == "system"] for c in told]
    steps: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": stage.config.max_thought_tokens},
        {
            "grammar": choice_grammar(tokenizer, all_decisions(whose)),
            "max_new_tokens": stage.config.max_new_tokens,
        },
        {
            "grammar": stage.grammar(meta),
            "max_new_tokens": stage.config.max_new_tokens,
            "samples": stage.samples,
            "temperature": stage.temperature,
            "drafting": stage.drafting(meta),
        },
    )
    found: list[Generation] = []
    for number, settings in enumerate(steps):
        for turns, asked in zip(said, requests, strict=True):
            turns.append(asked[number])
        spoken = [replace(c, turns=tuple(t)) for c, t in zip(told, said, strict=True)]
        talk = tokenizer.tokenise(spoken, owners).to(device)
        batch = replace(batch, talk=talk)
        answered = stage.vla.generate(batch, state, blind=blind, seen=seen, **settings)
        seen, state = answered.perception, answered.state
        found.append(answered)
        if number < len(steps) - 1:
            for turns, texts in zip(said, answered.texts, strict=True):
                # A slot that the model has written is text, not a place for tokens.
                turns.append(Turn("assistant", _SLOTS.sub("", texts[0])))
    whole = replace(
        found[-1],
        new_tokens=tuple(map(sum, zip(*(part.new_tokens for part in found), strict=True))),
        runs=sum(part.runs for part in found),
        encode_s=sum(part.encode_s for part in found),
        prefill_s=sum(part.prefill_s for part in found),
        decode_s=sum(part.decode_s for part in found),
    )
    return whole, batch


def thoughts_of(conversation: Conversation) -> dict[str, str]:
    """What was said before the plan, for its record; nothing where it was not thought over."""
    if "thoughts" not in conversation.meta:
        return {}
    said = [turn.text for turn in conversation.turns if turn.role == "assistant"]
    description, decision = said[: len(THINKING) - 1]
    return {"description": description, "decision": decision}
