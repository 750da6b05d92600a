r"""Conversations as token ids: Qwen's ChatML around any byte-level BPE tokenizer.

    <|im_start|>role\ntext<|im_end|>\n      for every turn

A slot (<SCENE>, <TRACK>, <MAP>, <OBJECT>) becomes one negative id that `splice` replaces by tokens
of the scene. Loss is due on the assistant's text and its <|im_end|>, on nothing else. (The released
code trains on every newline and tag of the prompt as well, and with the stock template on a second
system prompt; neither is reproduced.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from odvla.errors import UserError
from odvla.types import BOX_DIM, IGNORE_INDEX, SLOT_IDS, Conversation, Talk

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
# The paper's table VII, without the slots, which never reach a vocabulary.
TAGS = (
    "<trajectory>",
    *(
        f"<{name}_{end}>"
        for name in ("scene", "track", "map", "ego", "command", "traj", "question", "answer")
        for end in ("start", "end")
    ),
)
ROLES = ("system", "user", "assistant")
# How Qwen2.5 cuts text before merging bytes: words with a leading mark or space, single digits,
# runs of marks, white space up to a line's end.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SLOTS = re.compile("(" + "|".join(map(re.escape, SLOT_IDS)) + ")")
_NOT_TEXT = re.compile("|".join(map(re.escape, (*SLOT_IDS, *CONTROL_TOKENS, *TAGS))))


@dataclass(frozen=True)
class Encoded:
    """One conversation as ids; equal in length: ids and labels."""

    ids: list[int]
    labels: list[int]  # IGNORE_INDEX where no loss is due
    prompt_length: int  # ids before the last assistant turn's text


class ChatTokenizer:
    """Wraps a Hugging Face tokenizer; adds the tags it lacks.

    Args:
        tokenizer: a fast tokenizer that has <|im_start|> and <|im_end|>.

    Raises:
        UserError: one of those is missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = tokenizer.get_vocab()
        for token in (IM_START, IM_END):
            if token not in vocabulary:
                raise UserError(f"the tokenizer has no token {token}, which ChatML needs")
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=True) for tag in TAGS])
        self.tokenizer = tokenizer
        self.end_id = vocabulary[IM_END]
        self.pad_id = vocabulary.get(END_OF_TEXT, self.end_id)
        self._control_ids = frozenset(vocabulary.get(token, -1) for token in CONTROL_TOKENS)

    def __len__(self) -> int:
        """Number of ids, tags included: what an embedding needs at least."""
        return len(self.tokenizer)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text; slots become SLOT_IDS."""
        encode = self.tokenizer.backend_tokenizer.encode
        ids: list[int] = []
        for piece in _SLOTS.split(text):
            if piece in SLOT_IDS:
                ids.append(SLOT_IDS[piece])
            elif piece:
                ids.extend(encode(piece, add_special_tokens=False).ids)
        return ids

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and labels of a conversation.

        Where its last turn is not the assistant's, the head of an answer is appended, so that
        generation can start behind the ids.
        """
        ids: list[int] = []
        labels: list[int] = []
        prompt_length = 0
        for turn in conversation.turns:
            if turn.role != "assistant":
                ids += self.text_ids(f"{IM_START}{turn.role}\n{turn.text}{IM_END}\n")
                labels += [IGNORE_INDEX] * (len(ids) - len(labels))
                continue
            # Apart from its head, as it will be when it is generated.
            ids += self.text_ids(f"{IM_START}assistant\n")
            prompt_length = len(ids)
            labels += [IGNORE_INDEX] * (prompt_length - len(labels))
            answer = [*self.text_ids(turn.text), self.end_id]
            end = self.text_ids("\n")
            ids += answer + end
            labels += answer + [IGNORE_INDEX] * len(end)
        if not conversation.turns or conversation.turns[-1].role != "assistant":
            ids += self.text_ids(f"{IM_START}assistant\n")
            prompt_length = len(ids)
            labels += [IGNORE_INDEX] * (prompt_length - len(labels))
        return Encoded(ids, labels, prompt_length)

    def tokenise(self, conversations: Sequence[Conversation], frame_index: Sequence[int]) -> Talk:
        """Pad conversations to one Talk.

        Args:
            conversations: G of them, at least one.
            frame_index: row of the Frames that each one is about.

        Raises:
            UserError: a text holds <OBJECT> but its conversation has no box.
        """
        rows = [self.encode(conversation) for conversation in conversations]
        boxes = torch.full((len(rows), BOX_DIM), float("nan"))
        for g, (row, conversation) in enumerate(zip(rows, conversations, strict=True)):
            if SLOT_IDS["<OBJECT>"] not in row.ids:
                continue
            if conversation.object_box is None:
                raise UserError(f"conversation {conversation.id} has <OBJECT> but no object_box")
            boxes[g] = torch.tensor(conversation.object_box)
        lengths = torch.tensor([len(row.ids) for row in rows])
        return Talk(
            input_ids=_padded([row.ids for row in rows], self.pad_id),
            labels=_padded([row.labels for row in rows], IGNORE_INDEX),
            mask=torch.arange(int(lengths.max())) < lengths[:, None],
            prompt_length=torch.tensor([row.prompt_length for row in rows]),
            frame_index=torch.tensor(list(frame_index), dtype=torch.int64),
            object_boxes=boxes,
            conversations=tuple(conversations),
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens and slots vanish, tags stay."""
        kept = [i for i in ids if i >= 0 and i not in self._control_ids]
        return self.tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and its configuration into a folder."""
        self.tokenizer.save_pretrained(str(folder))

    @classmethod
    def load(cls, folder: Path | str) -> ChatTokenizer:
        """Read what `save` wrote, or a model folder such as Qwen2.5's.

        Raises:
            UserError: there is no tokenizer.json, or no ChatML token in it.
        """
        path = Path(folder).expanduser()
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"there is no tokenizer.json in {path}")
        return cls(PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> ChatTokenizer:
    """Learn a byte-level BPE vocabulary that cuts text as Qwen2.5's does; deterministic.

    Args:
        texts: what to learn merges from; tags and slots in it are left out.
        vocab_size: all ids together: 256 bytes, control tokens, tags, and merges for the rest.

    Raises:
        UserError: vocab_size is too small for bytes and tags.
    """
    smallest = 256 + len(CONTROL_TOKENS) + len(TAGS)
    if vocab_size < smallest:
        raise UserError(f"vocab_size must be at least {smallest}, not {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*CONTROL_TOKENS, *TAGS],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_plain_pieces(texts), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=IM_END, pad_token=END_OF_TEXT
    )
    return ChatTokenizer(wrapped)


def _plain_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at everything that is one token by decree, and the words of ChatML's heads."""
    yield "\n".join(ROLES)
    for text in texts:
        yield from filter(None, _NOT_TEXT.split(text))


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """[G, L] with rows filled up at the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
