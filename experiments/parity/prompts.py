"""Cases j: the texts of the released prompts, and what its training takes loss on.

The texts come out of the recordings; a dialect file is made of them, as `weights convert` makes one
of a checkout, and everything else is ours.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models
from tokenizers import pre_tokenizers as pre
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiments.parity.golden import Check, Golden
from odvla.errors import UserError
from odvla.language.dialect_file import write_dialect
from odvla.language.prompts import Dialect
from odvla.language.released import SYSTEM_HEAD, released_dialect, request_of_example
from odvla.language.tokenizer import CONTROL_TOKENS, ChatTokenizer, chat_text
from odvla.types import HISTORY, IGNORE_INDEX, SLOT_IDS, Conversation, EgoState

PROMPTS = "j_prompts"


def prompts(golden: Golden, stem: str) -> Iterator[Check]:
    """Question, answer and inference prompt of every record, byte by byte."""
    facts = golden.facts(stem)
    dialect = recorded_dialect(facts)
    for case in facts["records"]:
        talk = conversation(dialect, case)
        _, user, assistant = talk.turns
        asked = Conversation(talk.id, "", "plan", talk.turns[:-1], "")
        yield text_check(f"{case['id']}/question", user.text, case["question"])
        yield text_check(f"{case['id']}/answer", assistant.text, case["answer"])
        yield text_check(f"{case['id']}/prompt", chat_text(asked), case["inference_prompt"])


def recorded_dialect(facts: Mapping[str, Any], default_system: str = "") -> Dialect:
    """The released dialect, of recorded texts."""
    requests = {request_of_example(case["question"]) for case in facts["records"]}
    if len(requests) != 1:
        raise UserError(f"the recorded requests have {len(requests)} wordings")
    content = released_dialect(
        facts["system_prompt"], requests.pop(), default_system=default_system, known_only=False
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "released.yaml"
        write_dialect(content, path)
        return Dialect(str(path))  # read once, at construction


def conversation(dialect: Dialect, case: Mapping[str, Any]) -> Conversation:
    """A record through our dialect."""
    record = {name: torch.tensor(v, dtype=torch.float64) for name, v in case["record"].items()}
    lcf, steps = record["gt_ego_lcf_feat"], record["gt_ego_his_diff"]
    ego = EgoState(
        velocity=lcf[None, :2],
        yaw_rate=lcf[None, 4],
        acceleration=(steps[-1] - steps[-2])[None],
        can_accel=lcf[None, 2:4],
        heading_speed=lcf[None, 7],
        steering=lcf[None, 8],
        history=record["gt_ego_his_trajs"][None, :HISTORY],
        command=record["gt_ego_fut_cmd"].argmax()[None],
    )
    answer = dialect.plan_answer(record["gt_ego_fut_trajs"][1:], ego.last_step[0])
    return Conversation(case["id"], "", "plan", dialect.turns("plan", answer, ego), answer)


def text_check(name: str, ours: str, theirs: str) -> Check:
    """Two texts as their bytes."""
    mine, other = (torch.tensor(list(text.encode()), dtype=torch.int64) for text in (ours, theirs))
    return Check(name, mine, other, "index")


def label_mask(golden: Golden, stem: str) -> Iterator[Check]:
    """The training stream token by token, what loss is due on, and the prompt of inference."""
    records = golden.facts(PROMPTS)
    for name, case in golden.facts(stem).items():
        text = case["training_text"]
        told = next((r for r in records["records"] if r["question"] in text), None)
        if told is None:
            raise UserError(f"{name} is about none of the records of {PROMPTS}")
        dialect = recorded_dialect(records, _default_system(text))
        tokenizer, ids = recorded_tokenizer(case["tokens"])
        talk = conversation(dialect, told)
        yield text_check(f"{name}/text", chat_text(talk, dialect.training), text)
        encoded = tokenizer.encode(talk, dialect.training)
        wanted = torch.tensor([ids[token] for token in case["tokens"]])
        yield Check(f"{name}/tokens", torch.tensor(encoded.ids), wanted, "index")
        due = torch.tensor([label != IGNORE_INDEX for label in encoded.labels]).long()
        yield Check(f"{name}/unmasked", due, torch.tensor(case["unmasked"]), "index")
        learned = torch.tensor(encoded.labels)[due.bool()]
        yield Check(f"{name}/labels", learned, wanted[due.bool()], "index")
        asked = Conversation(talk.id, "", "plan", talk.turns[:-1], "")
        prompt = torch.tensor(tokenizer.encode(asked).ids)
        count = torch.tensor([case["inference_n_tokens"]])
        yield Check(f"{name}/inference_n_tokens", torch.tensor([len(prompt)]), count, "index")
        for slot, places in case["inference_special_positions"].items():
            yield _places(f"{name}/place of {slot}", prompt, SLOT_IDS[f"<{slot}>"], places)


def _places(name: str, prompt: Tensor, slot: int, places: Sequence[int]) -> Check:
    return Check(name, (prompt == slot).nonzero()[:, 0], torch.tensor(places), "index")


def _default_system(text: str) -> str:
    """The system message that stands before the user's in a recorded training stream."""
    blocks = re.split(r"(?:<\|im_end\|>\n|^)(?=<\|im_start\|>)", text)
    user = next(n for n, block in enumerate(blocks) if block.startswith("<|im_start|>user\n"))
    before = blocks[user - 1].removeprefix(SYSTEM_HEAD)
    own = before.startswith(SYSTEM_HEAD) or not blocks[user - 1].startswith(SYSTEM_HEAD)
    return "" if own else before


def recorded_tokenizer(tokens: Sequence[str]) -> tuple[ChatTokenizer, dict[str, int]]:
    """A tokenizer that cuts a recorded text as it was cut, and the id of each token.

    It knows the recorded tokens and at each place takes the longest that fits.
    """
    known = [*CONTROL_TOKENS, *dict.fromkeys(t for t in tokens if t not in CONTROL_TOKENS)]
    ids = {token: number for number, token in enumerate(known)}
    words = sorted(ids, key=len, reverse=True)
    pattern = "|".join(re.escape(word).replace("\\\n", "\\n") for word in words)
    backend = Tokenizer(models.WordLevel(ids, unk_token=CONTROL_TOKENS[0]))
    backend.pre_tokenizer = pre.Split(Regex(pattern), behavior="isolated")
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend)
    return ChatTokenizer(wrapped, add_tags=False), ids | SLOT_IDS
