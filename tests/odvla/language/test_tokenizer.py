"""Conversations as ids: ChatML as Hugging Face writes it, loss on answers, single digits."""

import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language.tokenizer import TAGS, ChatTokenizer, train_tokenizer
from odvla.types import IGNORE_INDEX, SLOT_IDS, Conversation, Turn

TEXTS = [
    "The car ahead is 12.50 m away, at (3.10,-4.07).",
    "Don't turn left:  there's a pedestrian\ncrossing.",
] * 3
# ChatML as Qwen2.5's own template writes it for turns of text.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_CACHE = {}


@pytest.fixture(scope="module", params=["trained", "qwen"])
def tokenizer(request):
    if request.param == "trained":
        return train_tokenizer(TEXTS, 400)
    return qwen(request)


def qwen(request):
    folder = request.getfixturevalue("shared") / "tokenizer" / "qwen2.5"
    if not folder.is_dir():
        pytest.skip("Qwen2.5's tokenizer is not in ../shared")
    if "tokenizer" not in QWEN_CACHE:
        QWEN_CACHE["tokenizer"] = ChatTokenizer.load(folder)
    return QWEN_CACHE["tokenizer"]


def talk_of(*texts, box=None):
    roles = ["system", "user", "assistant", "user", "assistant"]
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return Conversation("c", "", "qa", turns, "", object_box=box)


@given(
    st.lists(
        st.text("ab1 2.,()-\n'äß漢", max_size=12).filter(lambda t: t[:1] != "\n"),
        min_size=1,
        max_size=5,
    )
)
def test_ids_are_those_of_the_chat_template(texts):
    for tokenizer in (train_cached(), *QWEN_CACHE.values()):
        conversation = talk_of(*texts)
        messages = [{"role": t.role, "content": t.text} for t in conversation.turns]
        expected = tokenizer.tokenizer.apply_chat_template(
            messages,
            chat_template=CHATML,
            add_generation_prompt=conversation.turns[-1].role != "assistant",
            return_dict=False,
        )
        assert tokenizer.encode(conversation).ids == expected


def train_cached():
    if "trained" not in QWEN_CACHE:
        QWEN_CACHE["trained"] = train_tokenizer(TEXTS, 400)
    return QWEN_CACHE["trained"]


def test_loss_is_due_on_answers_and_their_ends_only(tokenizer):
    conversation = talk_of("Drive.", "Look: <SCENE>?", "A car.", "Where?", "Ahead.")
    encoded = tokenizer.encode(conversation)
    assert len(encoded.ids) == len(encoded.labels)
    due = [i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
    assert due == [label for label in encoded.labels if label != IGNORE_INDEX]
    end = tokenizer.end_id
    assert due == [*tokenizer.text_ids("A car."), end, *tokenizer.text_ids("Ahead."), end]
    prompt = encoded.ids[: encoded.prompt_length]
    assert encoded.ids[encoded.prompt_length :][: len(tokenizer.text_ids("Ahead."))] == (
        tokenizer.text_ids("Ahead.")
    )
    asked = Conversation("c", "", "qa", conversation.turns[:-1], "")
    assert tokenizer.encode(asked).ids == prompt
    assert tokenizer.encode(asked).prompt_length == len(prompt)


def test_slots_and_tags_are_one_id_each(tokenizer):
    text = "".join(TAGS) + "".join(SLOT_IDS)
    ids = tokenizer.text_ids(text)
    assert len(ids) == len(TAGS) + len(SLOT_IDS)
    assert len(TAGS) == 17
    assert ids[-len(SLOT_IDS) :] == list(SLOT_IDS.values())
    assert tokenizer.decode(ids) == "".join(TAGS)
    assert max(ids) < len(tokenizer)


@given(st.text(max_size=30).filter(lambda t: not re.search("<|\uffff", t)))
def test_text_survives(text):
    import unicodedata

    tokenizer = train_cached()
    assert tokenizer.decode(tokenizer.text_ids(text)) == unicodedata.normalize("NFC", text)


def test_text_is_cut_as_qwen_cuts_it(request):
    ours = train_cached().tokenizer.backend_tokenizer.pre_tokenizer
    theirs = qwen(request).tokenizer.backend_tokenizer.pre_tokenizer
    for text in [*TEXTS, "(-1.00,12.34),(5.6,7)", "A\r\n\n b  1995's", "don't DON'T 漢字 x²"]:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_no_trained_token_holds_two_digits_or_a_piece_of_a_tag():
    tokenizer = train_tokenizer([*TEXTS, "2024 2024 2024 <traj_start> <traj_start>"] * 5, 600)
    for token in tokenizer.tokenizer.get_vocab():
        if token not in TAGS:
            assert not re.search(r"\d.*\d|traj_|im_", token) or token.startswith("<|im_")


def test_training_twice_gives_the_same_and_saving_keeps_it(tmp_path):
    first, second = train_tokenizer(TEXTS, 400), train_tokenizer(iter(TEXTS), 400)
    vocabulary = first.tokenizer.backend_tokenizer.to_str()
    assert vocabulary == second.tokenizer.backend_tokenizer.to_str()
    first.save(tmp_path)
    for copy in (ChatTokenizer.load(tmp_path), pickle.loads(pickle.dumps(first))):
        conversation = talk_of("Drive.", *TEXTS[:2])
        assert copy.encode(conversation) == first.encode(conversation)
        assert (copy.pad_id, copy.end_id, len(copy)) == (first.pad_id, first.end_id, len(first))


def test_a_talk_is_padded_on_the_right():
    tokenizer = fake_tokenizer()
    box = tuple(float(i) for i in range(9))
    short, long = talk_of("", "Hi", "Yes"), talk_of("", "About <OBJECT>?", "It is a car.", box=box)
    talk = tokenizer.tokenise([short, long], [1, 0])
    rows = [tokenizer.encode(short), tokenizer.encode(long)]
    for g, row in enumerate(rows):
        n = len(row.ids)
        assert talk.input_ids[g, :n].tolist() == row.ids
        assert talk.labels[g].tolist() == row.labels + [IGNORE_INDEX] * (talk.mask.shape[1] - n)
        assert talk.mask[g].tolist() == [True] * n + [False] * (talk.mask.shape[1] - n)
    assert talk.frame_index.tolist() == [1, 0]
    assert talk.object_boxes[0].isnan().all()
    assert talk.object_boxes[1].tolist() == list(box)
    assert talk.prompt_length.dtype == torch.int64


def test_what_cannot_be_a_chat_is_refused(tmp_path):
    with pytest.raises(UserError, match="conversation c has <OBJECT> but no object_box"):
        fake_tokenizer().tokenise([talk_of("", "<OBJECT>", "")], [0])
    with pytest.raises(UserError, match="at least 276, not 100"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(UserError, match=r"no tokenizer\.json in"):
        ChatTokenizer.load(tmp_path)
