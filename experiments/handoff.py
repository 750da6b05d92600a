"""What a finished stage leaves: its weights, its tokenizer, and a card that vouches for them.

<run>/<stage>/vla.safetensors    all parameters and buffers
<run>/<stage>/tokenizer/         the vocabulary that the weights belong to
<run>/<stage>/card.json          written last: a stage without a card is not finished
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.schema import STAGES, ExperimentConfig
from odvla.config import diff
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.weights import file_sha256, load_weights, write_atomically

log = logging.getLogger(__name__)
WEIGHTS, CARD, TOKENIZER = "vla.safetensors", "card.json", "tokenizer"
VISION = ("encoder", "queries")
# What decides how an image looks to weights that have learned from it.
IMAGES = ("data.image_size", "data.crop_top", "data.pad_multiple")
FORMAT = 1
_WHOLE_FILE_BYTES = 1 << 22


@dataclass(frozen=True)
class Card:
    """Where weights come from and what was done to them."""

    experiment: str
    stage: str
    config: dict[str, Any]  # the whole experiment, as a tree
    stage_hash: str  # of the settings this stage depends on
    git_commit: str
    data_fingerprint: str
    weights_sha256: str
    tokenizer_sha256: str
    parent_stage: str | None
    parent_card_sha256: str | None
    seed: int
    steps: int
    seconds: float
    trained: dict[str, int]  # component -> parameters trained
    frozen_before: dict[str, str]  # SHA-256 of every frozen parameter and buffer
    frozen_after: dict[str, str]
    metrics: dict[str, float]
    # Dialect.identity() of the prompts that the weights have learned from; None: from none.
    dialect: dict[str, Any] | None = None
    # Weights of other projects that a first stage started from: what stands for their content, and
    # path, hashes and tensors of each component.
    init_identity: str | None = None
    init: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model that the weights stand for; (): all.

        Where perception comes first, language model and projectors still have their first weights.
        These are not handed over: whoever starts from here may have others.
        """
        alone = self.stage == "perception" and self.parent_stage is None
        return VISION if alone else ()

    def write(self, folder: Path) -> None:
        """Finish a stage."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        write_atomically(folder / CARD, text.encode())


def read_card(folder: Path) -> Card:
    """The card of a stage's folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / CARD
    if not path.is_file():
        raise UserError(f"{folder} holds no handoff: {path} does not exist")
    try:
        content = json.loads(path.read_text())
        card = Card(**content)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"the card {path} cannot be read: {error}") from error
    if card.format != FORMAT or card.stage not in STAGES:
        raise UserError(
            f"the card {path} is of format {card.format} and stage {card.stage!r}, which this "
            "version does not know"
        )
    return card


def card_sha256(folder: Path) -> str:
    """Identity of a finished stage."""
    return file_sha256(folder / CARD)


def check_handoff(folder: Path, stage: str) -> Card:
    """The card of a handoff that `stage` is to start from; its files are intact.

    Raises:
        UserError: a file is missing or has changed, or the handoff comes from a later stage.
    """
    card = read_card(folder)
    if STAGES.index(card.stage) >= STAGES.index(stage):
        raise UserError(
            f"stage {stage} cannot start from {folder}, which stage {card.stage} wrote: the order "
            f"is {', '.join(STAGES)}"
        )
    check_files(folder, card)
    return card


def check_files(folder: Path, card: Card) -> None:
    """Compare a handoff's files with its card.

    Raises:
        UserError: naming the file that is missing or differs.
    """
    for path, expected in (
        (folder / WEIGHTS, card.weights_sha256),
        (folder / TOKENIZER / "tokenizer.json", card.tokenizer_sha256),
    ):
        if not path.is_file():
            raise UserError(f"the handoff file {path} does not exist")
        if file_sha256(path) != expected:
            raise UserError(
                f"{path} is not the file that {folder / CARD} vouches for (its SHA-256 differs)"
            )


def check_dialect(folder: Path, card: Card, config: ExperimentConfig) -> None:
    """Refuse weights that speak another dialect than the experiment.

    Raises:
        UserError: naming both; not where the experiment forces its own.
    """
    if card.dialect is None:
        return
    try:
        config.dialect_of(card.stage).check_same(card.dialect, f"the handoff {folder}")
    except UserError as error:
        if not config.force_dialect:
            raise
        log.warning("forced: %s", error)


def learned_dialect(
    trained: Iterable[str], dialect: Dialect, parent: Card | None
) -> dict[str, Any] | None:
    """The dialect of a stage's weights: its own if it trained what reads prompts, or its parent's.

    Args:
        trained: components that the stage trained.
        dialect: of the experiment.
        parent: card of what the stage started from.
    """
    if {"projectors", "language"} & set(trained):
        return dialect.identity()
    return parent.dialect if parent is not None else None


def load_handoff(folder: Path, stage: str, vla: Any, config: ExperimentConfig) -> Card:
    """Fill the model with the weights that `stage` starts from, those of Card.parts.

    Args:
        folder: a finished stage.
        stage: the one that continues.
        vla: the model.
        config: the experiment; see load_checked.

    Raises:
        UserError: see check_handoff and check_dialect; or the weights do not fit the model.
    """
    card = check_handoff(folder, stage)
    load_checked(folder, card, vla, config)
    return card


def load_checked(folder: Path, card: Card, vla: Any, config: ExperimentConfig) -> None:
    """Fill the model with the weights of a stage whose files are intact, those of Card.parts.

    Args:
        folder: a finished stage.
        card: its card.
        vla: the model.
        config: the experiment; settings of the model and of its images that differ from the
            card's are logged.

    Raises:
        UserError: see check_dialect; or the weights do not fit the model.
    """
    check_dialect(folder, card, config)
    load_weights(vla, folder / WEIGHTS, card.parts)
    concerned = (*IMAGES, *(f"model.{part}" for part in card.parts or ("",)))
    changed = diff(
        {key: card.config.get(key, {}) for key in ("model", "data")},
        {"model": config.model, "data": config.data},
    )
    named = ", ".join(
        f"{key} {before} -> {now}"
        for key, (before, now) in sorted(changed.items())
        if key.startswith(concerned)
    )
    if named:
        log.warning("the handoff %s was made with another config: %s", folder, named)


def git_commit() -> str:
    """Commit of the source tree, "-dirty" with changes, "unknown" outside a repository."""
    here = Path(__file__).parent
    try:
        commit = _git("rev-parse", "HEAD", folder=here)
        changed = _git("status", "--porcelain", "--untracked-files=no", folder=here)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def fingerprint_of(config: ExperimentConfig) -> str:
    """Identity of the data of an experiment whose data root is settled."""
    language = Path(config.data.language_root) if config.data.language_root else None
    return data_fingerprint(config.data.folder, config.data.version, language)


def data_fingerprint(root: Path, version: str, language: Path | None = None) -> str:
    """Identity of a data root: names and sizes of all tables and texts, content of small ones.

    Args:
        root: the data root.
        version: of the tables.
        language: folder of the language data sets; None: <root>/language.
    """
    digest = hashlib.sha256(version.encode())
    for folder in (root / version, root / "maps", language or root / "language"):
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}\n".encode())
            if size <= _WHOLE_FILE_BYTES:
                digest.update(path.read_bytes())
    return digest.hexdigest()
