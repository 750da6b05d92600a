"""Stage 2's data: the plain union of nuCaption, NuScenes-QA and nuX, as the paper's counts show."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.collate import Tokenises
from datamodules.conversations import LanguageDataModule
from datamodules.nucaption import NuCaptionConfig, NuCaptionDataModule
from datamodules.nuscenes_qa import NuScenesQAConfig, NuScenesQADataModule
from datamodules.nux import NuXConfig, NuXDataModule
from datamodules.picking import UnionSource
from odvla.errors import UserError
from odvla.language.prompts import Dialect

DATASETS = ("nucaption", "nuscenes_qa", "nux")


@dataclass(frozen=True)
class MixtureConfig(NuCaptionConfig, NuScenesQAConfig, NuXConfig):
    """Settings of MixtureDataModule."""

    datasets: tuple[str, ...] = DATASETS  # an ablation leaves some out

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: no data set, or an unknown one.
        """
        super().__post_init__()
        unknown = [name for name in self.datasets if name not in DATASETS]
        if unknown or not self.datasets:
            raise UserError(
                f"data.datasets must be some of {', '.join(DATASETS)}, not {self.datasets}"
            )

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return MixtureDataModule(self, tokenizer, dialect)


class MixtureDataModule(LanguageDataModule):
    """All conversations of several data sets, none drawn more often than another."""

    config: MixtureConfig

    def make_source(self, split: str) -> UnionSource:
        """Union of the chosen data sets' sources."""
        modules: dict[str, type[LanguageDataModule]] = {
            "nucaption": NuCaptionDataModule,
            "nuscenes_qa": NuScenesQADataModule,
            "nux": NuXDataModule,
        }
        parts = (modules[name](self.config, None, self.dialect) for name in self.config.datasets)
        return UnionSource(tuple(part.make_source(split) for part in parts))
