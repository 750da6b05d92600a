"""How sure a number is: bootstrap over scenes, and paired tests on the same samples.

Key-frames of one scene are half a second apart and anything but independent: resampling them one
by one gives intervals several times too narrow. Scenes are resampled whole.

Shape legend: S samples, G scenes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
EXACT_SCENES = 12  # up to here all sign patterns are tried, from here on as many as RESAMPLES * 5


@dataclass(frozen=True)
class Interval:
    """A value and where it lies with probability `LEVEL` were other scenes drawn."""

    value: float
    low: float
    high: float
    scenes: int


@dataclass(frozen=True)
class PairedTest:
    """The difference of two planners (second minus first) on the same samples."""

    difference: Interval
    p_value: float  # two-sided, signs of whole scenes flipped
    samples: int


def bootstrap(
    values: NDArray[np.floating],
    counted: NDArray[np.bool_],
    scenes: Sequence[str],
    seed: int = 0,
) -> Interval:
    """Percentile interval of a mean over samples.

    Args:
        values: [S].
        counted: [S] False where a sample does not count.
        scenes: [S] name of each sample's scene.
        seed: of the resampling.

    Raises:
        ValueError: lengths differ, or nothing counts.
    """
    total, count = _scene_sums(values, counted, scenes)
    mean = float(total.sum() / count.sum())
    weights = _resampled(len(total), np.random.default_rng(seed))
    denominator = weights @ count
    kept = denominator > 0
    means = (weights @ total)[kept] / denominator[kept]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), len(total))


def bootstrap_steps(
    values: NDArray[np.floating],
    counted: NDArray[np.bool_],
    scenes: Sequence[str],
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    seed: int = 0,
) -> Interval:
    """Percentile interval of a number that is put together from means of steps.

    Where steps have different numbers of samples, the mean over samples of each one's own average
    is another number, and an interval around that one need not hold the number that is printed.

    Args:
        values: [S, T].
        counted: [S, T] False where a step of a sample does not count.
        scenes: [S] name of each sample's scene.
        combine: from means of the steps [..., T], NaN where nothing counts, to the number [...].
        seed: of the resampling.

    Returns:
        The interval; all NaN where the number is.

    Raises:
        ValueError: lengths differ, or nothing counts.
    """
    steps = range(values.shape[1])
    owner = np.unique(np.asarray(scenes), return_inverse=True)[1]
    size = int(owner.max()) + 1 if len(owner) else 0
    if not len(values) == len(counted) == len(scenes) or not counted.any():
        raise ValueError("values, flags and scenes differ in length, or no step counts")
    kept = np.where(counted, values, 0.0)
    total = np.stack([np.bincount(owner, kept[:, step], size) for step in steps], axis=1)
    count = np.stack([np.bincount(owner, counted[:, step], size) for step in steps], axis=1)
    total, count = total[count.any(1)], count[count.any(1)]
    weights = _resampled(len(total), np.random.default_rng(seed))
    # A resample may lose a step altogether, and with all of them the number.
    with np.errstate(invalid="ignore"):
        found = combine((weights @ total) / (weights @ count))
        value = float(combine(total.sum(0) / count.sum(0)))
    known = found[~np.isnan(found)] if not np.isnan(value) else np.array([np.nan])
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), len(total))


def paired_test(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    counted: NDArray[np.bool_],
    scenes: Sequence[str],
    seed: int = 0,
) -> PairedTest:
    """Whether two planners differ on the samples that both have.

    The interval is a bootstrap over scenes; the p-value is that of a permutation test which flips
    the sign of the difference of whole scenes (exact for up to EXACT_SCENES scenes).

    Args:
        first: [S] a number a sample.
        second: [S] of the same samples.
        counted: [S].
        scenes: [S].
        seed: of both resamplings.
    """
    difference = np.asarray(second, float) - np.asarray(first, float)
    interval = bootstrap(difference, counted, scenes, seed)
    total, _ = _scene_sums(difference, counted, scenes)
    if len(total) <= EXACT_SCENES:
        patterns = (np.arange(2 ** len(total))[:, None] >> np.arange(len(total))) & 1
        signs = 1.0 - 2.0 * patterns
        extra = 0  # the pattern that was observed is among them
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (5 * RESAMPLES, len(total)))
        signs = 1.0 - 2.0 * drawn
        extra = 1
    flipped = np.abs(signs @ total)
    observed = abs(total.sum()) * (1 - 1e-12)
    p_value = (float((flipped >= observed).sum()) + extra) / (len(flipped) + extra)
    return PairedTest(interval, p_value, int(np.asarray(counted).sum()))


def paired_by_sample(
    first: Mapping[str, float], second: Mapping[str, float], scene_of: Mapping[str, str]
) -> PairedTest | None:
    """`paired_test` on the samples that both planners have a number for; None where there is none.

    Args:
        first: a number a sample, by sample token.
        second: of another planner; the difference is the second less the first.
        scene_of: the scene of each sample.
    """
    tokens = [token for token in first if token in second]
    if not tokens:
        return None
    return paired_test(
        np.array([first[token] for token in tokens]),
        np.array([second[token] for token in tokens]),
        np.ones(len(tokens), bool),
        [scene_of[token] for token in tokens],
    )


def _scene_sums(
    values: NDArray[np.floating], counted: NDArray[np.bool_], scenes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the counted samples of each scene [G]."""
    values, counted = np.asarray(values, float), np.asarray(counted, bool)
    if not len(values) == len(counted) == len(scenes):
        raise ValueError(f"got {len(values)} values, {len(counted)} flags and {len(scenes)} scenes")
    if not counted.any():
        raise ValueError("no sample counts, there is no mean to bootstrap")
    _, owner = np.unique(np.asarray(scenes), return_inverse=True)
    size = int(owner.max()) + 1
    total = np.bincount(owner, np.where(counted, values, 0.0), size).astype(np.float64)
    count = np.bincount(owner, counted.astype(float), size).astype(np.float64)
    kept = count > 0
    return total[kept], count[kept]


def _resampled(scenes: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """How often each scene is in each resample [R, G]."""
    return generator.multinomial(scenes, np.full(scenes, 1 / scenes), RESAMPLES).astype(float)
