"""A plan by regression: the car's query reads the bird's-eye view, an MLP says where to go.

After UniAD's planner (Hu et al. 2023, section 2.4 and planning_head.py): an embedding of the
command is fused with the car's query, a transformer decoder of three layers lets it look at the
bird's-eye view, and an MLP regresses six steps that are added up. No language model has a part in
it. What is different here: the query starts from a learned embedding and the ego state (UniAD's
comes out of tracking and motion forecasting, and is not told the ego state), it may read the tokens
of other streams beside the bird's-eye view, and there is no test-time optimisation.

It may also read what the language model makes of the request for a plan: its last hidden state
where the answer would begin, after the whole prompt with all tokens of the scene, as OpenVLA-OFT
(Kim et al. 2025) and ORION (Fu et al. 2025) make their plans from such states.

Shape legend: B rows, H x W BEV cells, C encoder channels, N tokens of a stream, D width, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from odvla import geometry
from odvla.errors import UserError
from odvla.queries.decoder import PositionEncoding
from odvla.types import COMMANDS, EGO_SCALES, WAYPOINTS, BevGrid, EgoState, Stream

SOURCES = ("bev", *get_args(Stream), "language")
STEP_SCALE_M = 5.0  # what an output of 1 means: 10 m/s


@dataclass(frozen=True)
class PlannerConfig:
    """Sizes, and what the car's query is shown.

    Args:
        reads: of "bev" (all cells of the bird's-eye view), the streams "scene", "track", "map", and
            "language" (the language model's state at the end of the request). Streams and language
            can be read from remembered tokens. A stage may read less (`planner_reads`).
        ego_state: tell the query the car's velocity, acceleration and history; UniAD does not.
    """

    reads: tuple[str, ...] = ("bev", "track")
    dim: int = 64
    layers: int = 3  # as UniAD
    heads: int = 4
    intermediate: int = 128
    dropout: float = 0.1
    ego_state: bool = True

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: nothing to read, an unknown source, or heads that do not divide the width.
        """
        unknown = [name for name in self.reads if name not in SOURCES]
        if unknown or not self.reads:
            raise UserError(f"planner.reads must be some of {', '.join(SOURCES)}, not {self.reads}")
        if self.dim % self.heads:
            raise UserError(
                f"planner.dim {self.dim} must be a multiple of planner.heads {self.heads}"
            )

    def build(self, widths: Mapping[str, int], grid: BevGrid | None) -> EgoPlanner:
        """The planner of a model.

        Args:
            widths: of the features that the model makes, by source.
            grid: of the bird's-eye view.

        Raises:
            UserError: the model does not make something that the planner is to read.
        """
        for name in self.reads:
            if name not in widths:
                raise UserError(
                    f"model.planner.reads names {name!r}, which this model does not make; it "
                    f"makes {', '.join(widths)}"
                )
        return EgoPlanner(self, widths, grid)


class EgoPlanner(nn.Module):
    """Features and the ego state to a plan; see the module's head."""

    ego_scales: Tensor

    def __init__(
        self, config: PlannerConfig, widths: Mapping[str, int], grid: BevGrid | None
    ) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.inputs = nn.ModuleDict({name: nn.Linear(widths[name], dim) for name in config.reads})
        self.kinds = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(dim) * 0.02) for name in config.reads}
        )
        # Always there to be read, whatever else is hidden.
        self.nothing = nn.Parameter(torch.randn(dim) * 0.02)
        self.grid = grid
        if "bev" in config.reads:
            assert grid is not None
            self.positions = PositionEncoding(dim, grid)
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.command = nn.Embedding(len(COMMANDS), dim)
        if config.ego_state:
            scales = torch.tensor(EGO_SCALES)
            self.register_buffer("ego_scales", scales, persistent=False)
            self.ego = nn.Sequential(nn.Linear(len(scales), dim), nn.ReLU(), nn.Linear(dim, dim))
        parts = 3 if config.ego_state else 2
        self.fuse = nn.Sequential(nn.Linear(parts * dim, dim), nn.LayerNorm(dim), nn.ReLU())
        layer = nn.TransformerDecoderLayer(
            dim, config.heads, config.intermediate, config.dropout, batch_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.layers)
        self.steps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 2 * WAYPOINTS))

    def forward(self, features: Mapping[str, tuple[Tensor, Tensor]], ego: EgoState) -> Tensor:
        """Plan.

        Args:
            features: by source, what is read: BEV cells [B, H * W, C], row by row, or tokens
                [B, N, width], and which of them are shown [B, K]. Sources that are not there are
                not read.
            ego: the car's state and command.

        Returns:
            Waypoints [B, 6, 2] in metres, LIDAR_TOP frame of t0.
        """
        B = len(ego.command)
        keys = [self.nothing.expand(B, 1, -1)]
        shown = [torch.ones(B, 1, dtype=torch.bool, device=ego.command.device)]
        for name in self.config.reads:
            if name not in features:
                continue
            values, mask = features[name]
            key = self.inputs[name](values) + self.kinds[name]
            if name == "bev":
                assert self.grid is not None
                cells = geometry.cell_centres(self.grid, values.device).flatten(0, 1)
                key = key + self.positions(cells)
            keys.append(key)
            shown.append(mask)
        told = [self.query.expand(B, -1), self.command(ego.command)]
        if self.config.ego_state:
            told.append(self.ego(ego.motion / self.ego_scales))
        query = self.fuse(torch.cat(told, -1))[:, None]  # B, 1, D
        found = self.decoder(
            query, torch.cat(keys, 1), memory_key_padding_mask=~torch.cat(shown, 1)
        )
        steps = self.steps(found[:, 0]).float().unflatten(-1, (WAYPOINTS, 2))
        return (steps * STEP_SCALE_M).cumsum(1)
