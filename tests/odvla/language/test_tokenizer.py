"""Conversations as ids: ChatML as Hugging Face writes it, loss on answers, single digits."""

import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language.dialect_file import TrainingStream
from odvla.language.tokenizer import TAGS, ChatTokenizer, chat_text, train_tokenizer
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


def test_heads_of_chatml_are_short():
    learned = train_tokenizer(TEXTS, 400)
    for role in ("system", "user", "assistant"):
        assert len(learned.text_ids(role)) == 1


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


def reference_labels(tokenizer, conversation, stream):
    """Slowly, message by message: the whole of an answer's, marks and newlines of the others."""
    marks = {tokenizer.text_ids(text)[0] for text in ("\n", "<|im_start|>", "<|im_end|>", *TAGS)}
    ids, labels = [], []
    for turn in conversation.turns:
        head = f"<|im_start|>{turn.role}\n"
        if turn.role == "system" and stream.doubled_system_head:
            head += head
        if turn.role != "system" and stream.default_system:
            head = f"<|im_start|>system\n{stream.default_system}<|im_end|>\n" + head
        new = tokenizer.text_ids(f"{head}{turn.text}<|im_end|>\n")
        ids += new
        labels += [i if turn.role == "assistant" or i in marks else IGNORE_INDEX for i in new]
    return ids, labels


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("default_system", ["", "Be kind."])
def test_reference_labels_are_whole_answers_and_marks_elsewhere(tokenizer, doubled, default_system):
    stream = TrainingStream("reference", doubled, default_system)
    conversation = talk_of("Drive.\nWell.", "Look: <scene_start><SCENE><scene_end>?", "A car.")
    encoded = tokenizer.encode(conversation, stream)
    assert (encoded.ids, encoded.labels) == reference_labels(tokenizer, conversation, stream)
    assert tokenizer.tokenizer.decode([i for i in encoded.ids if i >= 0]) == chat_text(
        conversation, stream
    ).replace("<SCENE>", "")
    assert encoded.labels[encoded.ids.index(SLOT_IDS["<SCENE>"])] == IGNORE_INDEX


def test_quirks_change_what_is_read_and_not_what_is_learned():
    tokenizer = train_cached()
    conversation = talk_of("Drive.", "Look!", "A car.")
    for quirks in ((True, ""), (False, "Be kind."), (True, "Be kind.")):
        plain = tokenizer.encode(conversation)
        quirky = tokenizer.encode(conversation, TrainingStream("answer_only", *quirks))
        assert len(quirky.ids) > len(plain.ids)
        due = [[i for i in e.labels if i != IGNORE_INDEX] for e in (plain, quirky)]
        assert due[0] == due[1]


def test_tags_may_stay_text(request, tmp_path):
    folder = request.getfixturevalue("shared") / "tokenizer" / "qwen2.5"
    spelled, tagged = ChatTokenizer.load(folder, add_tags=False), qwen(request)
    assert len(spelled.text_ids("<traj_start>")) > 1
    assert spelled.decode(spelled.text_ids("<traj_start>")) == "<traj_start>"
    assert len(tagged) - len(spelled) == len(TAGS) == len(tagged.added_ids)
    assert spelled.added_ids == ()
    for tokenizer in (spelled, tagged):
        tokenizer.save(tmp_path)
        again = ChatTokenizer.load(tmp_path)
        assert (len(again), again.added_ids) == (len(tokenizer), tokenizer.added_ids)


@pytest.mark.parametrize(
    ("words", "lacking"), [(["<|im_start|>", "a"], "<|im_end|>"), (["a", "<|im_end|>"], "<|im_st")]
)
def test_a_tokenizer_without_a_needed_token_is_refused(words, lacking):
    ids = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    with pytest.raises(UserError, match=re.escape(f"no token {lacking}")):
        ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_an_answer_of_no_length_is_its_end():
    tokenizer = train_cached()
    encoded = tokenizer.encode(talk_of("Drive.", "Look!", ""))
    assert [i for i in encoded.labels if i != IGNORE_INDEX] == [tokenizer.end_id]


def test_an_object_may_be_named_by_its_track():
    conversation = Conversation("c", "", "qa", (Turn("user", "<OBJECT>?"),), "", object_track=7)
    talk = fake_tokenizer().tokenise([conversation, talk_of("", "Hi")], [0, 0])
    assert talk.object_tracks.tolist() == [7, -1]
    assert talk.object_boxes.isnan().all()
