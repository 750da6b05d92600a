r"""Conversations as token ids: Qwen's ChatML around any byte-level BPE tokenizer.

    <|im_start|>role\ntext<|im_end|>\n      for every turn

A slot (<SCENE>, <TRACK>, <MAP>, <OBJECT>) becomes one negative id that `splice` replaces by tokens
of the scene. Loss is due on the assistant's text and its <|im_end|>, on nothing else, unless the
dialect's TrainingStream says otherwise: the released code trains on every newline and tag of the
prompt as well, and with the stock template on a second system message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from odvla.errors import UserError
from odvla.language.action_bins import action_token
from odvla.language.dialect_file import PLAIN, TrainingStream
from odvla.types import BOX_DIM, IGNORE_INDEX, SLOT_IDS, Conversation, Talk, Turn

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
CHAT_FILE = "chat.json"  # beside tokenizer.json: what ChatTokenizer added to it
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
        add_tags: make every tag that it lacks a token. False: such a tag is spelled out like any
            text, as comments in the released code imply.
        added_ids: ids that were added to it before; None: those that are added now.
        action_tokens: bins a dimension that plans of action tokens have; such tokens are added
            where it has none. 0: those that it has.

    Attributes:
        action_ids: the tokens of these bins, in order; () where it has none.
        added_ids: ids whose embeddings a pretrained model has never learned.

    Raises:
        UserError: it lacks a token that conversations need.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        add_tags: bool = True,
        added_ids: Sequence[int] | None = None,
        action_tokens: int = 0,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        for token in (IM_START, IM_END):
            if token not in vocabulary:
                raise UserError(f"the tokenizer has no token {token}, which ChatML needs")
        if add_tags:
            tokenizer.add_tokens([AddedToken(tag, normalized=False, special=True) for tag in TAGS])
        actions = [action_token(number) for number in range(action_tokens)]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in actions])
        now = tokenizer.get_vocab()
        self.action_ids = _actions_of(now)
        self.tokenizer = tokenizer
        self.add_tags = add_tags
        self.stands_in = False  # True: only for one that is not here, to count with
        self.added_ids = (
            tuple(sorted(now[t] for t in (*TAGS, *actions) if t in now and t not in vocabulary))
            if added_ids is None
            else tuple(added_ids)
        )
        self.end_id = vocabulary[IM_END]
        self.pad_id = vocabulary.get(END_OF_TEXT, self.end_id)
        self._control_ids = frozenset(vocabulary.get(token, -1) for token in CONTROL_TOKENS)
        newline = self.text_ids("\n")
        if len(newline) != 1:
            raise UserError("the tokenizer has no token for a newline, which ChatML needs")
        # What the released code takes loss on wherever it stands.
        marks = (IM_START, IM_END, *TAGS)
        self._mark_ids = frozenset(newline) | {now[mark] for mark in marks if mark in now}

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

    def encode(self, conversation: Conversation, stream: TrainingStream = PLAIN) -> Encoded:
        """Ids and labels of a conversation.

        Where its last turn is not the assistant's, the head of an answer is appended, so that
        generation can start behind the ids.

        Args:
            conversation: turns of text.
            stream: what training makes of it; anything but PLAIN is for training only.
        """
        ids: list[int] = []
        labels: list[int] = []
        prompt_length = 0
        for turn in conversation.turns:
            head, body = _message(turn, stream)
            first = len(ids)
            if turn.role != "assistant":
                ids += self.text_ids(f"{head}{body}{IM_END}\n")
                labels += self._prompt_labels(ids[first:], stream)
                continue
            # Apart from its head, as it will be when it is generated.
            ids += self.text_ids(head)
            prompt_length = len(ids)
            answer = [*self.text_ids(body), self.end_id]
            end = self.text_ids("\n")
            ids += answer + end
            if stream.labels == "reference":
                labels += [IGNORE_INDEX if i < 0 else i for i in ids[first:]]
            else:
                labels += [IGNORE_INDEX] * (prompt_length - first)
                labels += answer + [IGNORE_INDEX] * len(end)
        if not conversation.turns or conversation.turns[-1].role != "assistant":
            first = len(ids)
            ids += self.text_ids(f"{IM_START}assistant\n")
            prompt_length = len(ids)
            labels += self._prompt_labels(ids[first:], stream)
        return Encoded(ids, labels, prompt_length)

    def _prompt_labels(self, ids: Sequence[int], stream: TrainingStream) -> list[int]:
        """Labels of a message that is not the assistant's."""
        if stream.labels == "answer_only":
            return [IGNORE_INDEX] * len(ids)
        return [i if i in self._mark_ids else IGNORE_INDEX for i in ids]

    def tokenise(
        self,
        conversations: Sequence[Conversation],
        frame_index: Sequence[int],
        stream: TrainingStream = PLAIN,
    ) -> Talk:
        """Pad conversations to one Talk.

        Args:
            conversations: G of them, at least one.
            frame_index: row of the Frames that each one is about.
            stream: see `encode`.

        Raises:
            UserError: a text holds <OBJECT> but its conversation has no box.
        """
        rows = [self.encode(conversation, stream) for conversation in conversations]
        boxes = torch.full((len(rows), BOX_DIM), float("nan"))
        tracks = torch.full((len(rows),), -1)
        for g, (row, conversation) in enumerate(zip(rows, conversations, strict=True)):
            if SLOT_IDS["<OBJECT>"] not in row.ids:
                continue
            if conversation.object_track is not None:
                tracks[g] = conversation.object_track
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
            object_tracks=tracks if bool((tracks >= 0).any()) else None,
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens and slots vanish, tags stay."""
        kept = [i for i in ids if i >= 0 and i not in self._control_ids]
        return self.tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, its configuration, and what was added to it into a folder."""
        self.tokenizer.save_pretrained(str(folder))
        added = {"add_tags": self.add_tags, "added_ids": list(self.added_ids)}
        (Path(folder) / CHAT_FILE).write_text(json.dumps(added), encoding="utf-8")

    @classmethod
    def load(
        cls, folder: Path | str, *, add_tags: bool = True, action_tokens: int = 0
    ) -> ChatTokenizer:
        """Read what `save` wrote, or a model folder such as Qwen2.5's.

        Args:
            folder: holds a tokenizer.json.
            add_tags: of a tokenizer that `save` did not write.
            action_tokens: the same.

        Raises:
            UserError: there is no tokenizer.json, or no ChatML token in it.
        """
        path = Path(folder).expanduser()
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"there is no tokenizer.json in {path}")
        kept: dict[str, Any] = {"add_tags": add_tags, "action_tokens": action_tokens}
        if (path / CHAT_FILE).is_file():
            kept = json.loads((path / CHAT_FILE).read_text(encoding="utf-8"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        try:
            return cls(tokenizer, **kept)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _actions_of(vocabulary: dict[str, int]) -> tuple[int, ...]:
    """Ids of the action tokens, in the order of their bins."""
    found: list[int] = []
    while action_token(len(found)) in vocabulary:
        found.append(vocabulary[action_token(len(found))])
    return tuple(found)


def _message(turn: Turn, stream: TrainingStream) -> tuple[str, str]:
    """What stands before a turn's text, and the text."""
    head = f"{IM_START}{turn.role}\n"
    if turn.role == "system":
        return head * (2 if stream.doubled_system_head else 1), turn.text
    if stream.default_system:
        head = f"{IM_START}system\n{stream.default_system}{IM_END}\n{head}"
    return head, turn.text


def chat_text(conversation: Conversation, stream: TrainingStream = PLAIN) -> str:
    """What `ChatTokenizer.encode` cuts into tokens, as one text."""
    text = ""
    for turn in conversation.turns:
        head, body = _message(turn, stream)
        text += f"{head}{body}{IM_END}\n"
    answered = bool(conversation.turns) and conversation.turns[-1].role == "assistant"
    return text if answered else f"{text}{IM_START}assistant\n"


def train_tokenizer(texts: Iterable[str], vocab_size: int, action_tokens: int = 0) -> ChatTokenizer:
    """Learn a byte-level BPE vocabulary that cuts text as Qwen2.5's does; deterministic.

    Args:
        texts: what to learn merges from; tags and slots in it are left out.
        vocab_size: all ids together: 256 bytes, control tokens, tags, and merges for the rest.
        action_tokens: so many more ids, see `ChatTokenizer`.

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
    return ChatTokenizer(wrapped, action_tokens=action_tokens)


def _plain_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at everything that is one token by decree, and the words of ChatML's heads.

    A head stands before every text: with its words counted so, `assistant` is one token, not six.
    """
    heads = "\n".join(ROLES)
    for text in texts:
        yield heads
        yield from filter(None, _NOT_TEXT.split(text))


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """[G, L] with rows filled up at the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
