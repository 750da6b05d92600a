"""Token streams -> the language model's width: one small network a stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from odvla.errors import UserError


@dataclass(frozen=True)
class ProjectorConfig:
    """Which network. "mlp2x_gelu": two linear layers with a GELU, the paper's choice."""

    kind: str = "mlp2x_gelu"

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            UserError: an unknown one.
        """
        if self.kind not in ("linear", "mlp2x_gelu"):
            raise UserError(f"projector.kind must be linear or mlp2x_gelu, not {self.kind!r}")

    def build(self, dim: int, hidden: int) -> nn.Module:
        """A projector of tokens [..., dim] to [..., hidden]; names as in the released weights."""
        if self.kind == "linear":
            return nn.Linear(dim, hidden)
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
