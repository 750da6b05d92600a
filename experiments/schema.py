"""What an experiment is: one frozen dataclass that composes the configs of all parts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.agent_trajectories import AgentTrajectoriesConfig
from datamodules.alignment import AlignmentConfig
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.mixture import MixtureConfig
from datamodules.nuscenes import NuScenesDataConfig
from experiments.baselines import EgoMLPConfig
from odvla.config import config_hash, to_tree
from odvla.errors import UserError
from odvla.language.prompts import THINKING, Dialect, PlanDialect
from odvla.types import BevGrid
from odvla.vla import VLAConfig
from odvla.weight_names import OWN_PARTS
from stages.alignment import AlignmentStageConfig
from stages.base import StageConfig
from stages.instruction import InstructionStageConfig
from stages.interaction import InteractionStageConfig
from stages.language import LanguageStageConfig
from stages.perception import PerceptionStageConfig
from stages.planning import PlanningStageConfig

# In the order they are run in; each starts from what the one before it hands over.
STAGES = ("language", "perception", "alignment", "instruction", "interaction", "planning")
Strategy = Literal["auto", "ddp", "fsdp2", "deepspeed_2"]
# Settings that say how a result is computed, not what it is: changing one retrains nothing.
SPEED_SETTINGS = (
    "num_workers",
    "cache_images",
    "cache_limit_gb",
    "checkpoint",
    "checkpoint_every",
    "val_every",
    "feature_cache",
    "length_groups",
    "drafting",
    "log_model",
    # With any budget that lets a stage run, the same records are left out.
    "broken_captions",
    "broken_records",
)


SEEDS = 2**32  # as many as numpy and Lightning take


@dataclass(frozen=True)
class TokenizerConfig:
    """A vocabulary learned from the training texts, or one that comes with a language model."""

    vocab_size: int = 1024
    # Learned from, of each stage's data, spread evenly; a vocabulary is settled long before.
    max_conversations: int = 5_000
    pretrained: str | None = None  # folder with a tokenizer.json, or a hub id
    # Bins a dimension of plans of action tokens (OpenVLA: 256), so many tokens more; 0: none.
    action_tokens: int = 0
    # Give every tag a token of its own; False: spell out those that a pretrained tokenizer lacks.
    add_tags: bool = True

    def __post_init__(self) -> None:
        """Check numbers.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.max_conversations < 1:
            raise UserError(
                f"tokenizer.max_conversations must be at least 1, not {self.max_conversations}"
            )
        if self.action_tokens < 0 or self.action_tokens == 1:
            raise UserError(f"tokenizer.action_tokens is 0 or at least 2, not {self.action_tokens}")


@dataclass(frozen=True)
class TownSettings:
    """The generated town an experiment trains on where no other data is given."""

    scenes: int = 10
    image_size: tuple[int, int] = (320, 180)
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        """Check the seed; the rest is checked where a town is made.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.seed < 0:
            raise UserError(f"a town's seed must be at least 0, not {self.seed}")

    @property
    def version(self) -> str:
        """The nuScenes version a town of this size is written as."""
        return "v1.0-mini" if self.scenes == 10 else "v1.0-trainval"

    @property
    def folder_name(self) -> str:
        """Towns that differ lie in different folders."""
        width, height = self.image_size
        return f"town-{self.scenes}-{width}x{height}-{self.seed}"


@dataclass(frozen=True)
class DataConfig:
    """What all stages read, and what each of them reads of it.

    Settings of the upper group hold for every stage; a stage's own config leaves them alone.
    """

    root: str = ""  # "": the folder named by ODVLA_DATA, or ./data
    version: str = "v1.0-mini"
    image_size: tuple[int, int] = (320, 180)
    crop_top: int = 0
    pad_multiple: int = 1
    broken_images: int = 0
    language_root: str = ""  # "": <root>/language
    num_workers: int = 0
    cache_images: bool = False
    cache_limit_gb: float = 2.0
    train_scenes: int = 0  # use only the first so many; 0: all
    eval_scenes: int = 0

    language: Any = None
    perception: Any = field(
        default_factory=lambda: NuScenesDataConfig(targets=("agents", "map"), clip_length=3)
    )
    alignment: Any = field(default_factory=AlignmentConfig)
    instruction: Any = field(default_factory=MixtureConfig)
    interaction: Any = field(default_factory=AgentTrajectoriesConfig)
    planning: Any = field(default_factory=GPTDriverConfig)

    def __post_init__(self) -> None:
        """Check that stages leave the common settings alone.

        Raises:
            UserError: naming the setting.
        """
        for stage in STAGES:
            own = getattr(self, stage)
            for setting in fields(own) if own is not None else ():
                common = setting.name in COMMON or setting.name in ("grid", "seed")
                if common and getattr(own, setting.name) != setting.default:
                    where = f"data.{setting.name}" if setting.name in COMMON else "the experiment"
                    raise UserError(
                        f"data.{stage}.{setting.name} must be left alone: {where} decides it for "
                        "all stages"
                    )

    @property
    def folder(self) -> Path:
        """Where the data lies, or will be made."""
        return Path(self.root or os.environ.get("ODVLA_DATA", "data")).expanduser()

    def of_stage(self, stage: str, seed: int, grid: BevGrid | None) -> Any:
        """A stage's data config, complete."""
        own = getattr(self, stage)
        names = {setting.name for setting in fields(own)}
        common = {name: getattr(self, name) for name in COMMON if name in names}
        if grid is not None and "grid" in names:
            common["grid"] = grid
        return replace(own, **common, seed=seed)


COMMON = tuple(setting.name for setting in fields(DataConfig) if setting.name not in STAGES)


@dataclass(frozen=True)
class StagesConfig:
    """Settings of every stage; None: the experiment has no such stage."""

    language: LanguageStageConfig | None = None
    perception: PerceptionStageConfig | None = field(default_factory=PerceptionStageConfig)
    alignment: AlignmentStageConfig | None = field(default_factory=AlignmentStageConfig)
    instruction: InstructionStageConfig | None = field(default_factory=InstructionStageConfig)
    interaction: InteractionStageConfig | None = field(default_factory=InteractionStageConfig)
    planning: PlanningStageConfig | None = field(default_factory=PlanningStageConfig)

    def of(self, stage: str) -> StageConfig:
        """A stage's settings."""
        return getattr(self, stage)


@dataclass(frozen=True)
class TrainerConfig:
    """How the work is done on a machine."""

    accelerator: str = "auto"  # cpu | gpu | auto
    devices: int = 1  # of a machine
    nodes: int = 1  # machines; more than one are started by torchrun or srun (docs/multi-node.md)
    # How several devices share the work, see strategies.py; auto: ddp.
    strategy: Strategy = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    gradient_checkpointing: bool = False  # of the language model: slower, less memory
    log_every: int = 10  # steps

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        for name in ("devices", "nodes", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name} must be at least 1, not {getattr(self, name)}")

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.devices * self.nodes

    @property
    def sharing(self) -> Strategy:
        """The strategy, settled: one process shares with nobody, several do by ddp."""
        if self.processes == 1:
            return "auto"
        return "ddp" if self.strategy == "auto" else self.strategy


@dataclass(frozen=True)
class InitConfig:
    """Weights that the first stage starts from; what they do not fill stays random."""

    weights: str = ""  # what `weights convert` made, or any file of our names; "": none
    # Parts to load, each of them whole: of OWN_PARTS, or one of several, e.g. queries.track; ():
    # all that the file holds.
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the parts.

        Raises:
            UserError: naming the one that does not exist.
        """
        for part in self.parts:
            if part.split(".")[0] not in OWN_PARTS:
                raise UserError(f"init.parts must be some of {', '.join(OWN_PARTS)}, not {part!r}")


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment: model, data, stages and the order they are run in."""

    name: str
    model: VLAConfig
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dialect: Dialect = field(default_factory=Dialect)
    force_dialect: bool = False  # take weights that were trained on other prompts all the same
    init: InitConfig = field(default_factory=InitConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    run: tuple[str, ...] = STAGES[1:]
    town: TownSettings | None = None  # made when the data root holds no data
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    baseline: EgoMLPConfig = field(default_factory=EgoMLPConfig)
    pictures: int = 4  # of val samples, drawn at the end
    # Put the last stage into MLflow as a model with a signature: a second copy of its weights.
    log_model: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that the stages to run exist and stand in order.

        Raises:
            UserError: naming the setting or stage.
        """
        if not self.name or "/" in self.name:
            raise UserError(f"an experiment's name becomes a folder, {self.name!r} cannot be one")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed must be at least 0 and below {SEEDS}, not {self.seed}")
        if self.model.ego_token and not self.dialect.has_ego_slot:
            raise UserError(
                f"model.ego_token has no place: dialect {self.dialect.name!r} without "
                f"{self.dialect.without} has no <EGO> in its plans; set model.ego_token=false"
            )
        if self.model.language.attention == "flash_attention_2" and (
            self.trainer.precision == "32-true"
        ):
            raise UserError(
                "model.language.attention=flash_attention_2 computes in bf16 or fp16, not in fp32: "
                "set trainer.precision=bf16-mixed, or model.language.attention=sdpa"
            )
        if not self.run:
            raise UserError(f"run is empty: choose some of {', '.join(STAGES)}")
        for stage in self.run:
            if stage not in STAGES:
                raise UserError(
                    f"run has an unknown stage {stage!r}; there are {', '.join(STAGES)}"
                )
            if self.stages.of(stage) is None or getattr(self.data, stage) is None:
                raise UserError(f"run has stage {stage!r}, but its settings or its data are null")
        self._check_actions()
        order = [STAGES.index(stage) for stage in self.run]
        if order != sorted(set(order)):
            raise UserError(
                f"run has its stages out of order ({', '.join(self.run)}); the order is "
                f"{', '.join(STAGES)}"
            )

    def _check_actions(self) -> None:
        """The format of plans needs its parts of the model, its tokens and its requests."""
        planning = self.stages.planning
        if planning is None or "planning" not in self.run:
            return
        if planning.actions == "tokens" and not self.tokenizer.action_tokens:
            raise UserError(
                "stages.planning.actions=tokens needs action tokens in the vocabulary: set "
                "tokenizer.action_tokens=256"
            )
        if planning.actions == "regression" and self.model.planner is None:
            raise UserError(
                "stages.planning.actions=regression needs a planner: set model.planner.dim=64"
            )
        requests = self.dialect.wording.requests
        whose = getattr(self.data.planning, "thinking", None)
        if whose is not None:
            setting = "thoughts" if whose == "odvla" else "conversations_file"
            if planning.actions == "regression":
                raise UserError(
                    f"data.planning.{setting} holds texts, which regression does not write"
                )
            if lacking := [kind for kind in THINKING if kind not in requests]:
                raise UserError(
                    f"data.planning.{setting} needs a dialect with the requests "
                    f"{', '.join(THINKING)}; {self.dialect.name!r} lacks {lacking[0]!r} "
                    "(dialect.name=reasoning has them)"
                )

    @property
    def regresses_from_language(self) -> bool:
        """Whether plans are regressed from what the language model makes of a request."""
        planning, planner = self.stages.planning, self.model.planner
        if planning is None or planner is None or planning.actions != "regression":
            return False
        return "language" in (planning.planner_reads or planner.reads)

    def dialect_of(self, stage: str) -> Dialect:
        """The wording of a stage: plans may be written in another form than the dialect's own.

        Prompts are the same, and so is all that the stages before planning read and write.
        """
        planning, own = self.stages.planning, self.dialect
        if stage != "planning" or planning is None:
            return own
        if planning.actions == "" or planning.actions == "regression":
            return own
        return PlanDialect(own.name, own.without, own.labels, planning.actions)

    def stage_tree(self, stage: str) -> dict[str, Any]:
        """All settings that a stage's result depends on, besides what it starts from.

        Perception depends on nothing that concerns language, so that experiments which differ only
        there may share it.
        """
        common = {name: getattr(self.data, name) for name in COMMON}
        language = {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "dialect": self.dialect,
            "dialect_sha256": self.dialect.wording.sha256,
        }
        vision = {"encoder": self.model.encoder, "queries": self.model.queries}
        settings = {
            "seed": self.seed,
            **(vision if stage == "perception" else language),
            "stage": self.stages.of(stage),
            "data": getattr(self.data, stage),
            "common": common,
            "precision": self.trainer.precision,
            "devices": self.trainer.processes,
        }
        return without(to_tree(settings), (*SPEED_SETTINGS, "root", "language_root"))

    def stage_hash(self, stage: str) -> str:
        """Hash of stage_tree."""
        return config_hash(self.stage_tree(stage))


def without(tree: Any, names: tuple[str, ...]) -> Any:
    """A tree less the entries of these names, at any depth."""
    if isinstance(tree, dict):
        return {key: without(value, names) for key, value in tree.items() if key not in names}
    if isinstance(tree, list):
        return [without(item, names) for item in tree]
    return tree
