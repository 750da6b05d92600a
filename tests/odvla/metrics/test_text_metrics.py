"""Answer, caption and forecast scores against hand-made cases."""

import math

import numpy as np
import pytest
import torch
import transformers

from odvla.errors import UserError
from odvla.metrics.bertscore import bert_score, match
from odvla.metrics.captions import java_missing, score_captions, score_nux, split_nux, tokenise
from odvla.metrics.forecasting import score_forecasts
from odvla.metrics.object_captions import ObjectCaption, score_object_captions, size_iou
from odvla.metrics.question_answering import Answer, score_answers


def test_answers_are_compared_raw_and_bucketed():
    scores = score_answers(
        [
            Answer("yes", "yes", "exist", 0),
            Answer("Yes", "yes", "exist", 0),  # the official evaluator does not lower-case
            Answer("2", "2", "count", 1),
            Answer("3", "2", "count", 1),
            Answer("car", "car", "object", 1),
        ]
    )
    assert scores.accuracy == 60.0
    assert scores.by_type == {"exist": 50.0, "count": 50.0, "object": 100.0}
    assert scores.by_hop[1] == pytest.approx(200 / 3)
    assert scores.by_type_hop["exist_0"] == 50.0


def test_bleu_equals_the_closed_form():
    # 4 of 5 words match, bigrams 3 of 4 ("a b", "b c", "c d"), lengths equal: no brevity penalty.
    scores = score_captions(["a b c d x"], ["a b c d e"])
    assert scores.bleu[0] == pytest.approx(100 * 4 / 5, rel=1e-4)
    assert scores.bleu[1] == pytest.approx(100 * math.sqrt(4 / 5 * 3 / 4), rel=1e-4)


def test_equal_captions_score_full_marks():
    captions = ["A red car is 3.5 m ahead.", "two trucks wait at the light", "nothing here to see"]
    scores = score_captions(captions, captions)
    assert scores.bleu[0] == pytest.approx(100, rel=1e-4)
    assert scores.rouge_l == pytest.approx(100)
    assert scores.cider > 500


def test_tokenise_keeps_numbers_and_drops_punctuation():
    assert tokenise("A car, at (-3.50,12.1).") == "a car at -lrb- -3.50,12.1 -rrb-"


def test_forecast_errors_use_the_last_known_point():
    predicted = np.zeros((2, 6, 2))
    driven = np.zeros((2, 6, 2))
    driven[0, :, 1] = np.arange(1, 7)
    driven[1, :, 0] = 3.0
    mask = np.array([[True, True, True, False, False, False], [True] * 6])
    scores = score_forecasts(predicted, driven, mask, np.array([True, True]))
    assert scores.min_ade_m == pytest.approx((2.0 + 3.0) / 2)
    assert scores.min_fde_m == pytest.approx(3.0)
    assert scores.missed == 1.0


def test_unreadable_forecasts_count_as_standing_still():
    predicted = np.full((1, 6, 2), 99.0)
    scores = score_forecasts(
        predicted, np.ones((1, 6, 2)), np.ones((1, 6), bool), np.array([False])
    )
    assert scores.unreadable == 1
    assert scores.min_ade_m == pytest.approx(math.sqrt(2))


def test_rouge_l_and_cider_equal_values_worked_by_hand():
    # Longest common subsequence of 2 words in 3 and 3: precision and recall 2/3, and so F.
    assert score_captions(["a b c"], ["a x b"]).rouge_l == pytest.approx(200 / 3)
    # Two captions, every word in one of them alone: each weighs ln 2. "a x" against "a b" has half
    # of the unigrams' cosine and no bigram, 0.5 / 4; "c d" against itself has unigrams and bigrams,
    # 2 / 4; times ten, and times 100 as printed.
    found = score_captions(["a x", "c d"], ["a b", "c d"])
    assert found.cider == pytest.approx(100 * 10 * (0.125 + 0.5) / 2)


def test_a_short_caption_pays_for_its_brevity():
    found = score_captions(["a b"], ["a b c d"])
    assert found.bleu[0] == pytest.approx(100 * math.exp(1 - 4 / 2), rel=1e-4)


def test_meteor_is_there_with_java_and_says_why_not_without(monkeypatch):
    captions = ["a red car is ahead", "two trucks wait at the light"]
    if not java_missing():
        # One chunk of n matches: penalty 0.6 (1/n)^0.2 is left out for a perfect match.
        assert score_captions(captions, captions).meteor == pytest.approx(100, abs=0.5)
    monkeypatch.setenv("PATH", "")
    found = score_captions(captions, captions)
    assert found.meteor is None
    assert "no java" in found.meteor_missing


def test_nux_is_scored_apart_and_joined():
    assert split_nux("Narration: The car waits. Reasoning: The light is red.") == (
        "The car waits.",
        "The light is red.",
    )
    assert split_nux("The car waits. Because it must. Always.") == (
        "The car waits.",
        "Because it must. Always.",
    )
    said = ["Narration: The car waits. Reasoning: It is late.", "The car turns left"]
    true = ["The car waits. The light is red now.", "The car turns left. The lane is free."]
    found = score_nux(said, true)
    assert found.narration.bleu[0] == pytest.approx(100, rel=1e-4)
    assert found.reasoning.bleu[0] < 50
    assert found.joined.bleu[0] < found.narration.bleu[0]
    assert found.undivided == 1


def test_object_captions_look_at_sizes_and_charge_for_what_was_not_kept():
    annotated = [
        ObjectCaption("s", (2.0, 4.0, 1.5), "a red car"),
        ObjectCaption("s", (0.5, 0.5, 1.7), "a man"),
    ]
    said = [
        ObjectCaption("s", (2.0, 4.0, 1.5), "a red car"),
        ObjectCaption("s", (2.0, 2.0, 1.5), "a red car"),  # size IoU 1/2 with the car
        ObjectCaption("s", (20.0, 20.0, 20.0), "a man"),
        ObjectCaption("elsewhere", (2.0, 4.0, 1.5), "a red car"),
    ]
    assert size_iou(np.array([[2.0, 2.0, 1.5]]), np.array([[2.0, 4.0, 1.5]])) == pytest.approx(0.5)
    loose = score_object_captions(said, annotated, 0.25)
    strict = score_object_captions(said, annotated, 0.5)  # 1/2 is not more than 1/2
    assert (loose.kept, strict.kept, loose.total) == (2, 1, 4)
    assert loose.scores["BLEU-1"] == pytest.approx(100 * 2 / 4, rel=1e-3)
    assert strict.scores["BLEU-1"] == pytest.approx(100 * 1 / 4, rel=1e-3)
    nothing = score_object_captions(said[2:], annotated, 0.5)
    assert (nothing.kept, nothing.scores["CIDEr"]) == (0, 0.0)


def test_bert_score_matches_tokens_greedily():
    # Prediction: x, y. Reference: x, and a token halfway between x and y.
    half = math.sqrt(0.5)
    predicted = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [9.0, 9.0]]])
    reference = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, True, False]])
    precision, recall, f1 = match(predicted, reference, mask, torch.ones(1, 2, dtype=torch.bool))
    assert precision.item() == pytest.approx((1 + half) / 2)
    assert recall.item() == pytest.approx((1 + half) / 2)
    assert f1.item() == pytest.approx((1 + half) / 2)
    none = match(predicted, reference, torch.zeros_like(mask), torch.ones(1, 2, dtype=torch.bool))
    assert [value.item() for value in none] == [0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny encoder with random weights and a vocabulary of words, as a local folder."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "car", "waits", "two", "trucks"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_bert_score_reads_a_local_model(bert, tmp_path):
    texts = ["a red car waits", "two trucks"]
    same = bert_score(texts, texts, bert, layer=2)
    assert (same.precision, same.recall, same.f1) == pytest.approx((100.0, 100.0, 100.0))
    # The layer of embeddings knows no context but the place: a shared first word matches fully.
    other = bert_score(["a car"], ["a red"], bert, layer=0)
    assert 50 < other.f1 < 100
    # Padding of a batch changes nothing.
    apart = [
        bert_score([a], [b], bert, layer=2).f1 for a, b in zip(texts, texts[::-1], strict=True)
    ]
    both = bert_score(texts, texts[::-1], bert, layer=2)
    assert both.f1 == pytest.approx(sum(apart) / 2, rel=1e-4)
    with pytest.raises(UserError, match="has layers 0 to 2, not 9"):
        bert_score(texts, texts, bert, layer=9)
    with pytest.raises(UserError, match=r"has no config\.json"):
        bert_score(texts, texts, tmp_path, layer=1)
