"""DriveLM's scores against slow loops, closed forms and numbers that others have printed."""

import re

import numpy as np
import pytest

from odvla.errors import UserError
from odvla.metrics.captions import score_captions
from odvla.metrics.drivelm import (
    DriveLMAnswer,
    language_term,
    match_points,
    points_of,
    score_drivelm,
)

FIRST = "<c1,CAM_BACK,1088.3,497.5>"
SECOND = "<c2,CAM_FRONT,864.2,468.3>"


def slow_match(answer, reference, near=16.0):
    """Precision and recall by explicit bookkeeping: one flag a point of the reference."""
    said = [float(n) for n in re.findall(r"[0-9]+[.][0-9]+", answer)]
    wanted = [float(n) for n in re.findall(r"[0-9]+[.][0-9]+", reference)]
    said, wanted = np.array(said[: len(said) // 2 * 2]), np.array(wanted)
    said, wanted = said.reshape(-1, 2), wanted.reshape(-1, 2)
    taken = np.zeros(len(wanted), bool)
    order = []
    for point in said:
        best, which = np.inf, -1
        for k, target in enumerate(wanted):
            distance = abs(point[0] - target[0]) + abs(point[1] - target[1])
            if not taken[k] and distance < best:
                best, which = distance, k
        if best < near:
            taken[which] = True
            order.append(tuple(wanted[which]))
    hits = taken.sum()
    if hits == 0:
        return order, 0.0
    precision, recall = hits / len(said), hits / len(wanted)
    return order, 2 * precision * recall / (precision + recall)


def random_text(rng, count):
    """Objects close enough together that they compete."""
    points = rng.integers(0, 60, (count, 2)) + rng.integers(0, 10, (count, 2)) / 10
    return " and ".join(f"<c{k},CAM_FRONT,{x:.1f},{y:.1f}>" for k, (x, y) in enumerate(points))


def test_match_is_that_of_a_slow_loop():
    rng = np.random.default_rng(0)
    values = set()
    for _ in range(400):
        answer, reference = (random_text(rng, int(rng.integers(0, 6))) for _ in range(2))
        found, f1 = match_points(answer, reference)
        expected, slow = slow_match(answer, reference)
        assert found == expected
        assert f1 == pytest.approx(slow, abs=1e-7)
        values.add(round(f1, 3))
    assert len(values) > 10


def test_match_in_closed_form():
    both = f"{FIRST} and {SECOND}"
    assert match_points(both, both)[1] == pytest.approx(1.0, abs=1e-7)
    assert match_points(FIRST, both)[1] == pytest.approx(2 / 3, abs=1e-7)
    # 15.9 pixels in L1 are near, 16 are not, though 16 in x and y together are 11.3 in L2.
    assert match_points("100.0,100.0", "107.9,108.0")[1] == pytest.approx(1, abs=1e-7)
    assert match_points("100.0,100.0", "108.0,108.0")[1] == 0
    # A point is found once only; whole numbers are no coordinates; half a point is dropped.
    assert match_points(f"{FIRST} {FIRST}", FIRST)[1] == pytest.approx(2 / 3, abs=1e-7)
    assert match_points("1088,497", FIRST)[1] == 0
    assert points_of("at 3.5,4.5 and 7.5") == [(3.5, 4.5)]
    assert match_points("nothing", "nothing") == ([], 0.0)


def frame(*answers):
    return [DriveLMAnswer(*fields) for fields in answers]


def test_the_graph_decides_what_counts():
    named = f"Is {FIRST} a car?", f"Is {SECOND} a car?"
    first = ("What matters?", f"{FIRST} and {SECOND}", f"a car {FIRST}", (2,))
    scores = score_drivelm(
        [
            frame(
                first,
                (named[0], "Yes.", "Yes.", (0,)),
                (named[1], "No.", "Yes.", (0,)),  # its object was not found
                ("Safe?", "Stop.", "Go.", (1,)),
            ),
            frame(
                ("What matters?", FIRST, SECOND, (3,)),
                (named[0], "Yes.", "Yes.", (0,)),  # nothing was found
                ("Steering?", "B", "b", (0,)),  # names no object, so it counts; case matters
            ),
        ]
    )
    assert scores.accuracy == 50.0
    assert scores.match_f1 == 0.0
    assert scores.counted == {"accuracy": 2, "chatgpt": 1, "language": 1, "match": 1}
    assert (scores.out_of_graph, scores.unanswered) == (2, 0)
    known = 0.2 * 0.5 + 0.2 * scores.language / 100 + 0.1 * 0
    assert scores.known_part == pytest.approx(known)


def test_perfect_answers_and_none():
    asked = [
        ("What matters?", f"a brown car {FIRST} to the back of us", (2,)),
        ("What is noticed first?", f"First {FIRST}", (3,)),
        (f"Status of {FIRST}?", "B", (0,)),
    ]
    perfect = [frame(*((q, a, a, tags) for q, a, tags in asked)) for _ in range(2)]
    scores = score_drivelm(perfect)
    assert scores.accuracy == 100
    assert scores.match_f1 == pytest.approx(100, abs=1e-5)
    assert scores.language == pytest.approx(language_term(scores.captions))
    assert scores.captions.bleu[0] == pytest.approx(100, abs=1e-4)
    silent = [frame(*((q, a, None, tags) for q, a, tags in asked))]
    nothing = score_drivelm(silent)
    assert (nothing.unanswered, nothing.out_of_graph) == (3, 1)
    assert (nothing.accuracy, nothing.match_f1, nothing.language) == (None, None, None)
    assert nothing.known_part is None


def test_language_is_what_the_challenge_s_package_prints():
    """The example in the README of language_evaluation (bckim92), with the values printed there."""
    scores = score_captions(
        ["i am a boy", "she is a girl"], ["am i a boy ?", "is she a girl ?"], meteor=False
    )
    printed = [
        0.9999999997500004,
        0.5773502690332603,
        4.3679023223468616e-06,
        1.4287202142987477e-08,
    ]
    np.testing.assert_allclose(np.array(scores.bleu) / 100, printed, rtol=1e-6)
    assert scores.rouge_l / 100 == pytest.approx(0.75)
    assert scores.cider / 100 == pytest.approx(3.333333333333333)
    term = (sum(printed) / 4 + 0.75 + 3.333333333333333 / 10) / 3
    assert language_term(scores) / 100 == pytest.approx(term)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tags": ()}, r"scene_frame_1: its tags must be some of 0, 1, 2, 3"),
        ({"tags": (0, 7)}, r"not \[0, 7\]"),
        ({"question": "Is 3.5 near?"}, "its question names half a point"),
        ({"tags": (3,), "reference": "at 3.5"}, "its reference names half a point"),
    ],
)
def test_what_cannot_be_scored_is_named(changes, message):
    good = {"question": "Q?", "reference": "A", "answer": "A", "tags": (0,)}
    asked = [
        DriveLMAnswer(**good, name="scene_frame_0"),
        DriveLMAnswer(**good | changes, name="scene_frame_1"),
    ]
    with pytest.raises(UserError, match=message):
        score_drivelm([asked])
    with pytest.raises(ValueError, match="at least one question"):
        score_drivelm([])
