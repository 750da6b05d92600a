"""Token streams -> the language model's width: one small network a stream.

Names of parameters are those of the released checkpoints behind `model.mm_projector_<stream>.`, so
that the names in a checkpoint tell which kind it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from odvla.errors import UserError

Kind = Literal["linear", "mlp2x_gelu", "qwen2_5_rms"]
# What a projector's state dict holds, by kind.
NAMES: dict[Kind, frozenset[str]] = {
    "linear": frozenset({"weight", "bias"}),
    "mlp2x_gelu": frozenset({"0.weight", "0.bias", "2.weight", "2.bias"}),
    "qwen2_5_rms": frozenset({"0.weight", "1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias"}),
}
EPS = 1e-6  # Qwen2.5's


@dataclass(frozen=True)
class ProjectorConfig:
    """Which network.

    "mlp2x_gelu", two linear layers with a GELU between them, is the paper's choice; "qwen2_5_rms"
    puts an RMSNorm before it, "linear" is one layer. All three are in the released code, which does
    not say which of them the released weights have (`weights inspect` reads it from the file).
    """

    kind: str = "mlp2x_gelu"

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            UserError: an unknown one.
        """
        if self.kind not in NAMES:
            raise UserError(f"projector.kind must be one of {', '.join(NAMES)}, not {self.kind!r}")

    def build(self, dim: int, hidden: int) -> nn.Module:
        """A projector of tokens [..., dim] to [..., hidden]."""
        if self.kind == "linear":
            return nn.Linear(dim, hidden)
        mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        if self.kind == "mlp2x_gelu":
            return mlp
        return nn.Sequential(nn.RMSNorm(dim, eps=EPS), mlp)


def kind_of(names: Iterable[str]) -> Kind | None:
    """The kind of projector whose state dict has these names; None: no kind has."""
    found = frozenset(names)
    return next((kind for kind, own in NAMES.items() if own == found), None)
