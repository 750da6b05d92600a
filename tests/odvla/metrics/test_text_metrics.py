"""Answer, caption and forecast scores against hand-made cases."""

import math

import numpy as np
import pytest

from odvla.metrics.captions import score_captions, tokenise
from odvla.metrics.forecasting import score_forecasts
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
    assert tokenise("A car, at (-3.50,12.1).") == "a car at -3.50 12.1"


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
