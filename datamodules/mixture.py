"""Stage 2's data: nuCaption, NuScenes-QA and nuX; a plain union, as the paper's counts show.

DriveLM and OmniDrive may be named beside them, or instead of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from datamodules.collate import Tokenises
from datamodules.conversations import LanguageDataModule
from datamodules.drivelm import DriveLMConfig, DriveLMDataModule
from datamodules.nucaption import NuCaptionConfig, NuCaptionDataModule
from datamodules.nuscenes_qa import NuScenesQAConfig, NuScenesQADataModule
from datamodules.nux import NuXConfig, NuXDataModule
from datamodules.omnidrive import OmniDriveConfig, OmniDriveDataModule
from datamodules.picking import UnionSource
from datamodules.subset import check_sampling
from odvla.errors import UserError
from odvla.language.prompts import Dialect

PAPER = ("nucaption", "nuscenes_qa", "nux")
DATASETS = (*PAPER, "drivelm", "omnidrive")


@dataclass(frozen=True)
class MixtureConfig(NuCaptionConfig, NuScenesQAConfig, NuXConfig, DriveLMConfig, OmniDriveConfig):
    """Settings of MixtureDataModule."""

    datasets: tuple[str, ...] = PAPER  # an ablation leaves some out
    # How often training draws a conversation of each of them, compared with others about the same
    # key-frame; an epoch stays as long. (): all alike, the plain union.
    weights: tuple[float, ...] = ()
    samplings: tuple[str, ...] = ()  # of each data set, see `sampling`; (): that one for all

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: no data set, an unknown one, or weights or samplings that do not fit them.
        """
        super().__post_init__()
        unknown = [name for name in self.datasets if name not in DATASETS]
        if unknown or not self.datasets:
            raise UserError(f"datasets must be some of {', '.join(DATASETS)}, not {self.datasets}")
        for name in ("weights", "samplings"):
            given = len(getattr(self, name))
            if given not in (0, len(self.datasets)):
                raise UserError(
                    f"{name} must be empty or have one entry for each of the "
                    f"{len(self.datasets)} datasets, not {given}"
                )
        if not all(0 < weight < inf for weight in self.weights):
            raise UserError(
                f"weights must be numbers above 0, not {self.weights}; leave a data set out "
                "of datasets to train without it"
            )
        if self.weights and not self.conversations_per_frame:
            raise UserError("weights change nothing where conversations_per_frame is 0 (all)")
        for sampling in self.samplings:
            check_sampling(sampling, "samplings")

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return MixtureDataModule(self, tokenizer, dialect)


class MixtureDataModule(LanguageDataModule):
    """All conversations of several data sets; none is drawn more often, or by weight."""

    config: MixtureConfig

    def make_source(self, split: str) -> UnionSource:
        """Union of the chosen data sets' sources."""
        modules: dict[str, type[LanguageDataModule]] = {
            "nucaption": NuCaptionDataModule,
            "nuscenes_qa": NuScenesQADataModule,
            "nux": NuXDataModule,
            "drivelm": DriveLMDataModule,
            "omnidrive": OmniDriveDataModule,
        }
        config = self.config
        sources = []
        for number, name in enumerate(config.datasets):
            own = config.samplings[number] if config.samplings else config.sampling
            part = modules[name](replace(config, sampling=own), None, self.dialect)
            sources.append(part.make_source(split))
        return UnionSource(tuple(sources), config.weights)
