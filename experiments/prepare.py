"""From a config to the things a stage needs: data root, tokenizer, model, data module."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from datamodules.conversations import LanguageDataModule
from datamodules.nuscenes import NuScenesDataModule
from experiments.schema import ExperimentConfig, TownSettings
from odvla.config import to_tree
from odvla.errors import UserError
from odvla.language.model_folder import model_folder
from odvla.language.tokenizer import ChatTokenizer, train_tokenizer
from odvla.token_memory import check_frozen_vision
from odvla.vla import DrivingVLA
from odvla.weights import write_atomically

log = logging.getLogger(__name__)
MADE_FOR = "made_for.json"


def settle_root(config: ExperimentConfig) -> ExperimentConfig:
    """Settle on a data root: the given one, or a town inside it; nothing is made.

    Returns:
        The config with data.root set.

    Raises:
        UserError: the given root holds no data of the version, and the town is of another.
    """
    root = config.data.folder
    if root.is_file():
        raise UserError(f"the data root {root} is a file, not a folder")
    if not (root / config.data.version).is_dir() and config.town is not None:
        if config.town.version != config.data.version:
            raise UserError(
                f"{root} holds no {config.data.version}, and the experiment's town of "
                f"{config.town.scenes} scenes would be {config.town.version}"
            )
        root = root / config.town.folder_name
    return replace(config, data=replace(config.data, root=str(root)))


def prepare_data(config: ExperimentConfig, *, progress: bool = True) -> ExperimentConfig:
    """Settle on a data root; its town and its index are made if they are not there.

    Returns:
        The config with data.root set.

    Raises:
        UserError: the given root holds no data of the version, and the experiment has no town.
    """
    given, config = config.data.folder, settle_root(config)
    root = config.data.folder
    if root != given and config.town is not None and not (root / config.data.version).is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        # Whoever comes second waits, and finds the town made.
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not (root / config.data.version).is_dir():
                make_town_at(root, config.town, progress=progress)
    if not root.is_dir():
        raise UserError(f"the data root {root} does not exist")
    index_with_bar(root, config.data.version, progress=progress)
    return config


def index_with_bar(
    root: Path, version: str, out: Path | None = None, *, progress: bool = True
) -> Path:
    """Make a root's index with a progress bar.

    Args:
        root: the data root.
        version: of the tables.
        out: where to write it, whatever is there; None: in its usual place, if none there fits.
        progress: show the bar.

    Returns:
        The index's file.
    """
    from datamodules.index_file import build_index, ensure_index

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not progress, transient=out is None) as bar:
        # Shown when there is something to do: mostly the index is there.
        task = bar.add_task("index", total=None, visible=False)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, visible=True)

        if out is None:
            return ensure_index(root, version, advance)
        build_index(root, version, out, advance)
    return out


def make_town_at(root: Path, town: TownSettings, *, progress: bool = True) -> Path:
    """Generate a town with a progress bar."""
    from datamodules.town.make import TownConfig, make_town

    settings = TownConfig(
        out=str(root),
        scenes=town.scenes,
        image_size=town.image_size,
        seed=town.seed,
        workers=town.workers,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), disable=not progress) as bar:
        task = bar.add_task(f"making {root.name}", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return make_town(settings, progress=advance)


def data_module(
    config: ExperimentConfig, stage: str, tokenizer: ChatTokenizer | None
) -> NuScenesDataModule:
    """A stage's data module.

    Without a tokenizer, as where a vocabulary is made of its texts, plans are worded as the dialect
    has them: experiments that differ in the format of actions alone then share a vocabulary.
    """
    encoder_grid = getattr(config.model.encoder, "grid", None)
    own = config.data.of_stage(stage, config.seed, encoder_grid)
    if getattr(config.model.encoder, "needs_lidar", False):
        own = replace(own, lidar=True)
    planning = config.stages.planning
    if stage == "planning" and planning is not None and planning.pays_for_collisions:
        own = replace(own, targets=(*{*own.targets, "traffic"},))
    if stage == "perception":
        return own.build(tokenizer)
    dialect = config.dialect if tokenizer is None else config.dialect_of(stage)
    return own.build(tokenizer, dialect)


def build_tokenizer(config: ExperimentConfig) -> ChatTokenizer:
    """The vocabulary of a pretrained language model, or one learned from the training texts.

    Raises:
        UserError: the folder has no tokenizer, or a data file is missing.
    """
    settings = config.tokenizer
    if settings.pretrained is not None:
        folder = model_folder(settings.pretrained, "tokenizer.pretrained", "tokenizer.json")
        return ChatTokenizer.load(
            folder, add_tags=settings.add_tags, action_tokens=settings.action_tokens
        )

    def texts() -> Iterator[str]:
        for stage in config.run:
            module = data_module(config, stage, None)
            if isinstance(module, LanguageDataModule):
                yield from module.texts("train", settings.max_conversations)

    return train_tokenizer(texts(), settings.vocab_size, settings.action_tokens)


def kept_tokenizer(
    config: ExperimentConfig, folder: Path, fingerprint: str, *, write: bool
) -> ChatTokenizer:
    """The tokenizer in `folder` if it was made for the same settings and data, or a new one.

    Args:
        config: the experiment.
        folder: where it is kept.
        fingerprint: of the data root.
        write: keep a new one.
    """
    made_for = json.dumps(
        {
            "tokenizer": to_tree(config.tokenizer),
            "dialect": to_tree(config.dialect),
            "run": list(config.run),
            "data": fingerprint,
        },
        sort_keys=True,
    )
    note = folder / MADE_FOR
    if note.is_file() and note.read_text() == made_for:
        return ChatTokenizer.load(folder)
    tokenizer = build_tokenizer(config)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        write_atomically(note, made_for.encode())
    return tokenizer


def build_model(config: ExperimentConfig, tokenizer: ChatTokenizer) -> DrivingVLA:
    """The model with its first weights, which depend on the experiment's seed alone."""
    model = config.model
    if config.trainer.gradient_checkpointing:
        language = replace(model.language, gradient_checkpointing=True)
        model = replace(model, language=language)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return model.build(tokenizer)


def check_kept_tokens(config: ExperimentConfig, stages: Sequence[str], vla: DrivingVLA) -> None:
    """Refuse stages that keep tokens and train what makes them, before the first one begins.

    Args:
        config: the experiment.
        stages: those of it that are to run.
        vla: its model, with or without memory.

    Raises:
        UserError: naming the stage and its setting.
    """
    for stage in stages:
        settings = config.stages.of(stage)
        for switch in ("remember_tokens", "feature_cache"):
            if getattr(settings, switch, False):
                trained = settings.freeze.trainable(vla)
                check_frozen_vision(trained, f"stages.{stage}.{switch}")
