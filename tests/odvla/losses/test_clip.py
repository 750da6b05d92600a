"""Losses of tracks over a clip: a slow loop over queries, a batch as its clips, quirks by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import l1_loss

from odvla.errors import UserError
from odvla.losses.clip import (
    NO_TARGET,
    ClipLossConfig,
    ClipTargets,
    Lesson,
    LevelMatch,
    nearest_iou,
)
from odvla.queries.track_life import EGO, FALSE_TRACK, NOBODY
from odvla.rows import rows_of
from odvla.types import BevGrid

GRID = BevGrid(-1.0, -1.0, 1.0, 2, 2)
CLASSES, STEPS, EGO_SLOT = 4, 3, 5


def build(**settings):
    return ClipLossConfig(**settings).build(GRID)


def made(seed, rows=2, agents=3, queries=9):
    """Predictions, ids and truth of noise; row 1 has one agent less, and one slot less in use."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(rows, agents, dtype=torch.bool)
    used = torch.ones(rows, queries, dtype=torch.bool)
    if rows > 1 and agents:
        mask[1, -1] = False
        used[1, -1] = False
    ids = torch.full((rows, queries), NOBODY)
    ids[:, EGO_SLOT] = EGO
    ids[:, EGO_SLOT + 1] = 100  # its object is there
    ids[:, EGO_SLOT + 2] = 999  # its object is gone
    targets = ClipTargets(
        codes=noise(rows, agents, 10) * 2,
        labels=torch.randint(CLASSES, (rows, agents), generator=generator),
        ids=torch.arange(100, 100 + agents).expand(rows, -1),
        mask=mask,
        paths=noise(rows, agents, STEPS, 2),
        paths_mask=(noise(rows, agents, STEPS, 1) > 0).float().expand(-1, -1, -1, 2),
        ego_code=noise(rows, 10),
        ego_label=torch.zeros(rows, dtype=torch.int64),
        ego_known=torch.ones(rows, dtype=torch.bool),
    )
    predictions = noise(rows, queries, CLASSES), noise(rows, queries, 10) * 2
    return predictions, noise(rows, queries, STEPS, 2), ids, used, targets


def lesson_of(criterion, seed, **sizes):
    (logits, codes), paths, ids, used, targets = made(seed, **sizes)
    match = criterion.matcher.match(logits, codes, ids, torch.zeros(ids.shape), used, targets)
    return Lesson((logits,), (codes,), (paths,), (match,), targets, used, EGO_SLOT)


def focal(logit, positive):
    p = 1 / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) if positive else 0.75 * p**2 * -math.log(1 - p)


def losses_by_hand(lesson, row, compat):
    """Class, box and path loss of a row, query by query."""
    logits, codes, paths = lesson.logits[0][row], lesson.codes[0][row], lesson.paths[0][row]
    match, targets = lesson.matches[0], lesson.targets
    of_class, found, positive, of_box = 0.0, 0, 0, 0.0
    path_sum, path_count = 0.0, 0
    weights = torch.tensor([1.0] * 8 + [0.2] * 2)

    def classes(query, label):
        return sum(focal(float(x), k == label) for k, x in enumerate(logits[query]))

    def box(query, code):
        return float(((codes[query] - code).abs() * weights).sum())

    for query in range(len(logits)):
        if not lesson.used[row, query]:
            continue
        target, label = int(match.target[row, query]), None
        if match.ids[row, query] >= 0:
            positive += 1
        if target >= 0:
            found, label = found + 1, int(targets.labels[row, target])
            of_box += box(query, targets.codes[row, target])
            known = targets.paths_mask[row, target]
            path_sum += float(((paths[query] - targets.paths[row, target]).abs() * known).sum())
            path_count += int(known.sum())
        if query != EGO_SLOT or compat == "uniad":
            of_class += classes(query, label)
    of_class += classes(EGO_SLOT, 0)
    of_box += box(EGO_SLOT, targets.ego_code[row])
    count = positive if compat == "uniad" else found
    return (
        2.0 * of_class / (count + 1),
        0.25 * of_box / (found + 1),
        0.5 * path_sum / (path_count + 1e-5),
    )


@pytest.mark.parametrize("compat", ["none", "uniad"])
def test_losses_are_those_of_a_loop_over_queries(compat):
    criterion = build(compat=compat, past_trajectory=0.5)
    for seed in range(4):
        lesson = lesson_of(criterion, seed)
        (level,) = criterion.levels(lesson)
        for row in range(2):
            expected = losses_by_hand(lesson, row, compat)
            ours = [float(level[n][row]) for n in ("agent_class", "agent_box", "past_trajectory")]
            assert ours == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_matches_are_the_cheapest_and_keep_what_is_carried(seed, agents):
    criterion = build()
    (logits, codes), _, ids, used, targets = made(seed, agents=agents)
    match = criterion.matcher.match(logits, codes, ids, torch.zeros(ids.shape), used, targets)
    of_class, of_box = criterion.matcher.costs(logits, codes, targets)
    for row in range(2):
        wanted = [a for a in range(agents) if targets.mask[row, a]]
        carried = {EGO_SLOT + 1: 0} if 0 in wanted else {}
        free = [q for q in range(len(ids[0])) if used[row, q] and ids[row, q] == NOBODY]
        rest = [a for a in wanted if a not in carried.values()]
        cost = (of_class + of_box)[row][free][:, rest]
        expected = dict(carried)
        for q, a in zip(*linear_sum_assignment(cost), strict=True):
            expected[free[q]] = rest[a]
        for query in range(len(ids[0])):
            assert int(match.target[row, query]) == expected.get(query, NO_TARGET)
            own = int(ids[row, query])
            assert int(match.ids[row, query]) == 100 + expected.get(query, own - 100)
        assert int(match.ids[row, EGO_SLOT + 2]) == 999
        assert match.inherited[row].nonzero()[:, 0].tolist() == [EGO_SLOT + 1, EGO_SLOT + 2]


def test_costs_leave_the_velocity_out():
    criterion = build()
    (logits, codes), _, _, _, targets = made(0)
    _, before = criterion.matcher.costs(logits, codes, targets)
    faster = codes.clone()
    faster[..., 8:] += 50
    _, after = criterion.matcher.costs(logits, faster, targets)
    assert torch.equal(before, after)
    difference = l1_loss(codes[0, 2, :8], targets.codes[0, 1, :8], reduction="sum")
    assert float(before[0, 2, 1]) == pytest.approx(0.25 * float(difference), rel=1e-5)


@pytest.mark.parametrize("compat", ["none", "uniad"])
def test_a_batch_costs_the_mean_of_its_clips(compat):
    criterion = build(compat=compat, past_trajectory=0.5)
    lessons = tuple(lesson_of(criterion, seed) for seed in range(3))
    together = criterion(lessons)
    alone = [criterion(rows_of(lessons, torch.tensor([row]))) for row in range(2)]
    for name, value in together.items():
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(value, mean)


def test_without_any_object_all_is_background_but_the_car():
    criterion = build()
    lesson = lesson_of(criterion, 0, agents=0)
    assert (lesson.matches[0].target == NO_TARGET).all()
    loss = criterion((lesson,))
    assert all(bool(value.isfinite()) for value in loss.values())
    (level,) = criterion.levels(lesson)
    for row in range(2):
        expected = losses_by_hand(lesson, row, "none")
        assert float(level["agent_class"][row]) == pytest.approx(expected[0], rel=1e-5)


def test_where_the_cars_box_is_unknown_its_query_learns_nothing():
    criterion = build(compat="uniad")
    lesson = lesson_of(criterion, 0)
    unknown = replace(
        lesson.targets, ego_known=torch.zeros(2, dtype=torch.bool), ego_code=torch.zeros(2, 10)
    )
    logits = lesson.logits[0].clone().requires_grad_()
    codes = lesson.codes[0].clone().requires_grad_()
    lesson = replace(lesson, targets=unknown, logits=(logits,), codes=(codes,))
    torch.stack(list(criterion((lesson,)).values())).sum().backward()
    assert not logits.grad[:, EGO_SLOT].any()
    assert not codes.grad[:, EGO_SLOT].any()
    assert logits.grad[:, 0].any()


def test_overlaps_without_a_birth_stay_only_in_uniad():
    (logits, codes), _, ids, used, targets = made(3, rows=1, agents=1)
    stale = torch.full(ids.shape, 0.7)
    codes[:, EGO_SLOT + 1] = targets.codes[:, 0]
    ours = build().matcher.match(logits, codes, ids, stale, used, targets)
    assert float(ours.iou[0, EGO_SLOT + 1]) == pytest.approx(1.0)
    theirs = build(compat="uniad").matcher.match(logits, codes, ids, stale, used, targets)
    assert float(theirs.iou[0, EGO_SLOT + 1]) == pytest.approx(0.7)
    # A track whose object is gone keeps its overlap in both.
    assert float(ours.iou[0, EGO_SLOT + 2]) == pytest.approx(0.7)
    # With something new, UniAD measures, too.
    more = replace(targets, ids=torch.tensor([[55]]))
    born = build(compat="uniad").matcher.match(logits, codes, ids, stale, used, more)
    assert (born.ids == 55).sum() == 1
    assert float(born.iou[born.ids == 55]) != pytest.approx(0.7)


def test_false_tracks_are_nobodys():
    criterion = build()
    (logits, codes), _, _, used, targets = made(1)
    ids = torch.full(used.shape, FALSE_TRACK)
    match = criterion.matcher.match(logits, codes, ids, torch.zeros(ids.shape), used, targets)
    assert (match.target == NO_TARGET).all()
    assert torch.equal(match.ids, ids)


@given(
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.floats(0.5, 4),
    st.floats(0.5, 4),
    st.sampled_from([0, 1, 2, 3]),
)
def test_overlap_of_boxes_along_the_axes_is_the_usual_one(x, y, width, length, quarter):
    def code(x, y, width, length, yaw):
        size = math.log(width), math.log(length)
        return torch.tensor([[x, y, *size, 0, 0, math.sin(yaw), math.cos(yaw), 0, 0]])

    yaw = quarter * math.pi / 2 + 0.3  # turned to the nearer axis
    across, along = (width, length) if quarter % 2 == 0 else (length, width)
    dx = max(0.0, min(1.0, x + across / 2) - max(-1.0, x - across / 2))
    dy = max(0.0, min(1.5, y + along / 2) - max(-1.5, y - along / 2))
    expected = dx * dy / (6 + width * length - dx * dy)
    ours = nearest_iou(code(x, y, width, length, yaw), code(0, 0, 2, 3, 0.0))
    assert float(ours) == pytest.approx(expected, abs=1e-4)


def test_a_map_criterion_plugs_in():
    class OfMap:
        def build(self):
            return lambda head, predictions, targets: {
                "map_class": head * (predictions + targets.sum())
            }

    criterion = build(map=OfMap())
    losses = criterion((lesson_of(criterion, 0),), 2, torch.tensor(2.0), torch.ones(3))
    assert float(losses["map_class"]) == 10.0
    assert set(losses) == {"agent_class", "agent_box", "map_class"}


def test_settings_are_checked():
    with pytest.raises(UserError, match="code_weights must be 10 numbers"):
        ClipLossConfig(code_weights=(1.0,))


def test_fields_of_a_match_are_tensors():
    match = lesson_of(build(), 0).matches[0]
    assert isinstance(match, LevelMatch)
    assert match.to("meta").iou.device.type == "meta"
