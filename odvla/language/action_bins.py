"""Plans as action tokens: each of a plan's twelve numbers is one of 256 bins, and a bin a token.

As OpenVLA does it (Kim et al. 2024, section 3.2): every dimension of an action is cut into bins of
one width between the 1st and the 99th percentile of the training data, so that outliers do not make
the bins wide; what lies outside is put into the outermost bin. A dimension here is one coordinate
of one waypoint, in metres in the LIDAR_TOP frame of t0: x right, y forward.

Three choices differ from OpenVLA. Its 256 edges enclose 255 bins; here 256 bins have 257 edges. It
overwrites the 256 tokens of Llama's vocabulary that are used least; here tokens are added
(`tokenizer.action_tokens`), so that no text loses its tokens and a plan is legible: <action_17>.
Its actions are motions of a robot arm; here they are positions, whose errors do not add up.

The bins belong to the weights as the tokens' embeddings do: `ActionBinStore` keeps them there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from odvla.errors import UserError
from odvla.types import WAYPOINTS

PERCENTILES = (1.0, 99.0)
NARROWEST_M = 1e-3  # width of all bins of a dimension together, where nothing ever moves
DIMENSIONS = 2 * WAYPOINTS
_TOKEN = re.compile(r"<action_([0-9]+)>")
_Numbers = tuple[tuple[float, float], ...]  # [6] of (x, y), metres


def action_token(number: int) -> str:
    """The token of a bin."""
    return f"<action_{number}>"


@dataclass(frozen=True)
class QuantisationError:
    """What bins make of a set of plans."""

    mean_m: float  # distance between a waypoint and what is read back, over all waypoints
    largest_m: float
    clipped: int  # coordinates outside of the bins
    coordinates: int

    @property
    def clipped_percent(self) -> float:
        """Part of the coordinates that lie outside."""
        return 100.0 * self.clipped / max(1, self.coordinates)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.mean_m:.3f} m a waypoint on average, {self.largest_m:.3f} m at most; "
            f"{self.clipped} of {self.coordinates} coordinates lie outside and are clipped"
        )


@dataclass(frozen=True)
class ActionBins:
    """Bins of one width between `low` and `high`, dimension by dimension.

    Args:
        low: lower edge of the first bin of each dimension.
        high: upper edge of the last one.
        count: bins a dimension.

    Raises:
        UserError: fewer than two bins, or an upper edge that is not above its lower one.
    """

    low: _Numbers
    high: _Numbers
    count: int

    def __post_init__(self) -> None:
        """Check the edges."""
        if self.count < 2:
            raise UserError(f"action tokens need at least 2 bins a dimension, not {self.count}")
        low, high = np.array(self.low), np.array(self.high)
        if low.shape != (WAYPOINTS, 2) or high.shape != low.shape or not (high > low).all():
            raise UserError(
                f"action bins have a lower and a higher edge for each of {WAYPOINTS} waypoints"
            )

    @classmethod
    def of(cls, waypoints: ArrayLike, count: int, mask: ArrayLike | None = None) -> ActionBins:
        """The bins of training data.

        Args:
            waypoints: [N, 6, 2] metres.
            count: bins a dimension.
            mask: [N, 6] False where a waypoint is not known and must not count.

        Raises:
            UserError: some waypoint is not known in any plan.
        """
        points = np.asarray(waypoints, dtype=np.float64)
        known = np.ones(points.shape[:2], bool) if mask is None else np.asarray(mask, dtype=bool)
        if points.ndim != 3 or not known.any(0).all():
            raise UserError("the training data holds no whole future to take action bins from")
        edges = np.stack(
            [np.percentile(points[known[:, k], k], PERCENTILES, axis=0) for k in range(WAYPOINTS)],
            axis=1,
        )
        low, high = edges[0], np.maximum(edges[1], edges[0] + NARROWEST_M)
        # As the weights will hold them.
        return cls.from_tensors(
            torch.from_numpy(low).float(), torch.from_numpy(high).float(), count
        )

    @classmethod
    def from_tensors(cls, low: Tensor, high: Tensor, count: int) -> ActionBins:
        """The bins of edges [6, 2]."""

        def pairs(edges: Tensor) -> _Numbers:
            return tuple((float(x), float(y)) for x, y in edges.tolist())

        return cls(pairs(low), pairs(high), count)

    @property
    def width(self) -> NDArray[np.float64]:
        """Of a bin [6, 2], metres."""
        return (np.array(self.high) - np.array(self.low)) / self.count

    def numbers(self, waypoints: ArrayLike) -> NDArray[np.int64]:
        """Bin of each coordinate: [..., 6, 2] metres to numbers from 0 to count - 1."""
        place = (np.asarray(waypoints, dtype=np.float64) - np.array(self.low)) / self.width
        return np.floor(place).clip(0, self.count - 1).astype(np.int64)

    def centres(self, numbers: ArrayLike) -> NDArray[np.float64]:
        """The way back: the middle of each bin [..., 6, 2], metres."""
        return np.array(self.low) + (np.asarray(numbers) + 0.5) * self.width

    def error(self, waypoints: ArrayLike, mask: ArrayLike | None = None) -> QuantisationError:
        """What is lost of plans [N, 6, 2] whose known waypoints `mask` [N, 6] says."""
        points = np.asarray(waypoints, dtype=np.float64)
        known = np.ones(points.shape[:2], bool) if mask is None else np.asarray(mask, dtype=bool)
        gaps = np.linalg.norm(self.centres(self.numbers(points)) - points, axis=-1)[known]
        outside = ((points < np.array(self.low)) | (points > np.array(self.high)))[known]
        return QuantisationError(
            mean_m=float(gaps.mean()) if len(gaps) else 0.0,
            largest_m=float(gaps.max(initial=0.0)),
            clipped=int(outside.sum()),
            coordinates=outside.size,
        )

    def text(self, waypoints: ArrayLike) -> str:
        """A plan [6, 2] as twelve tokens: x and y of each waypoint in turn."""
        return "".join(action_token(number) for number in self.numbers(waypoints).ravel().tolist())

    def read(self, text: str) -> NDArray[np.float64] | str:
        """Waypoints [6, 2] of a text, or why it is none."""
        found = _TOKEN.findall(text)
        if _TOKEN.sub("", text) != "":
            return "not of action tokens alone"
        if len(found) != DIMENSIONS:
            return f"{len(found)} action tokens instead of {DIMENSIONS}"
        numbers = np.array([int(number) for number in found]).reshape(WAYPOINTS, 2)
        if numbers.max() >= self.count:
            return f"an action token beyond the {self.count} bins"
        return self.centres(numbers)


class ActionBinStore(nn.Module):
    """The bins as a part of a model's weights; a model that has never planned has none yet."""

    low: Tensor
    high: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(WAYPOINTS, 2))

    @property
    def bins(self) -> ActionBins | None:
        """What was kept; None: nothing yet."""
        if not bool((self.high > self.low).all()):
            return None
        return ActionBins.from_tensors(self.low, self.high, self.count)

    def keep(self, bins: ActionBins) -> None:
        """Make bins a part of the weights."""
        assert bins.count == self.count
        self.low.copy_(torch.tensor(bins.low))
        self.high.copy_(torch.tensor(bins.high))
