"""What one experiment needs besides the data root: language files, model files, the right data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datamodules.conversations import LanguageDataModule
from datamodules.gpt_driver_thoughts import UNJOINED
from experiments.doctor.findings import Finding, green, red, yellow
from experiments.prepare import data_module
from experiments.schema import ExperimentConfig
from odvla.config import flat
from odvla.errors import UserError

# Settings that name a file or folder of a model.
MODEL_SETTINGS = ("pretrained", "weights", "checkpoint")
MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def data_place(config: ExperimentConfig) -> tuple[Path, Finding | None]:
    """The root an experiment will read, and a finding where it will be made first."""
    root, version = config.data.folder, config.data.version
    if (root / version).is_dir() or config.town is None:
        return root, None
    town = root / config.town.folder_name
    if (town / version).is_dir():
        return town, None
    if config.town.version != version:
        found = f"{root} holds no {version}, and the experiment's town would be another version"
        return root, red("data root", found, "set data.version, or ODVLA_DATA to another root")
    found = f"{root} holds no {version}"
    advice = f"the first run will make {town} ({config.town.scenes} scenes)"
    return root, yellow("data root", found, advice)


def check_language(config: ExperimentConfig) -> Iterator[Finding]:
    """Read every language file as the stages will, training and evaluation parts."""
    for stage in config.run:
        module = data_module(config, stage, None)
        if not isinstance(module, LanguageDataModule):
            continue
        try:
            counts = []
            for split in ("train", "val"):
                source = module.source(split)
                assert source is not None
                frames = module.frame_numbers(split)
                counts.append(f"{sum(source.count(n) for n in frames)} {split}")
        except UserError as error:
            advice = "mend that, or leave the stage out; published files go to data.language_root"
            yield red(f"texts of {stage}", str(error), advice)
            continue
        if counts[0].startswith("0 "):
            found = f"no conversation for training ({', '.join(counts)})"
            yield red(f"texts of {stage}", found, "do the files belong to this data root?")
        else:
            yield green(f"texts of {stage}", f"conversations: {', '.join(counts)}")
        for report in module.join_reports("train"):
            if any(left.reason in UNJOINED for left in report.left_out):
                advice = (
                    "they are not learned from: write them anew from the infos and the list there"
                )
                yield yellow(f"lines for {stage}", report.brief, advice)


def check_models(config: ExperimentConfig) -> Iterator[Finding]:
    """Every file or folder of weights that the settings name."""
    named = {
        key: value
        for key, value in flat(config).items()
        if key.rsplit(".", 1)[-1] in MODEL_SETTINGS and isinstance(value, str) and value
    }
    if not named:
        yield green("model files", "the experiment starts from nothing and names no file")
    for key, value in named.items():
        path = Path(value).expanduser()
        if path.is_file() and path.stat().st_size:
            yield green("model files", f"{key}: {path}, {path.stat().st_size / 1e6:.0f} MB")
        elif path.is_dir() and any((path / name).is_file() for name in MODEL_FILES):
            there = ", ".join(p.name for p in sorted(path.iterdir()) if p.is_file())
            yield green("model files", f"{key}: {path} ({there[:80]})")
        elif path.exists():
            advice = f"one of {', '.join(MODEL_FILES)} must lie there"
            yield red("model files", f"{key}: {path} holds no model", advice)
        elif value.count("/") == 1 and not value.startswith((".", "/", "~")):
            advice = "the files must be on this machine already: nothing is downloaded"
            yield yellow("model files", f"{key}: {value} is no folder; a hub id?", advice)
        else:
            yield red("model files", f"{key}: {path} does not exist", "correct the setting")
