"""Writes the five language data sets of the town, each in its own file format."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nuscenes.utils.splits import create_splits_scenes

from datamodules.town.captions import object_captions
from datamodules.town.descriptions import described
from datamodules.town.log import KEYFRAMES_PER_SCENE, SceneLog
from datamodules.town.narration import narrate_keyframe
from datamodules.town.phrasing import Dice
from datamodules.town.planning_cache import scene_infos, whole_future_tokens
from datamodules.town.questions import INFO, Ledger, keyframe_questions
from datamodules.town.recorded import Recorded, read_recorded
from datamodules.town.scene_facts import SceneFacts
from odvla.errors import UserError

if TYPE_CHECKING:
    from datamodules.town.tokens import TokenIndex

SPLITS = ("train", "val")
PICKLE_PROTOCOL = 4  # readable from Python 3.4 on


@dataclass
class SplitTexts:
    """What the scenes of one split have given so far."""

    nucaption: list[dict[str, Any]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    nux: dict[str, dict[str, str]] = field(default_factory=dict)
    plans: list[str] = field(default_factory=list)  # sample tokens of split.json
    ledger: Ledger = field(default_factory=Ledger)


def write_language(
    root: Path, version: str, logs: Sequence[SceneLog], tokens: TokenIndex, seed: int
) -> None:
    """Write all five data sets under root/language.

    The tables (and the CAN bus, which the cache quotes) must be written before.

    Args:
        root: the town's data root.
        version: v1.0-mini or v1.0-trainval, the folder of the tables.
        logs: the scenes, in the order of the tables.
        tokens: the tokens used in the tables.
        seed: of the town; chooses words and questions.

    Raises:
        UserError: a table is missing, or a scene belongs to no official split.
    """
    recorded = read_recorded(root, version)
    texts = {split: SplitTexts() for split in SPLITS}
    objects: dict[str, dict[str, Any]] = {}
    cache: dict[str, dict[str, Any]] = {}
    for log in logs:
        split = split_of(log.name, version)
        objects |= add_scene(log, texts[split], tokens, recorded, seed)
        cache |= scene_infos(log, tokens, recorded)
        texts[split].plans += (
            whole_future_tokens(log.name, tokens)
            if split == "train"
            else [tokens.sample(log.name, k) for k in range(KEYFRAMES_PER_SCENE)]
        )
    folder = root / "language"
    _write_json(folder / "final_caption_bbox_token.json", objects)
    for split, text in texts.items():
        _write_json(folder / "nucaption" / f"{split}.json", text.nucaption)
        _write_json(
            folder / "nuscenes_qa" / f"NuScenes_{split}_questions.json",
            {"info": INFO, "questions": text.questions},
        )
        _write_json(folder / "nux" / f"Nu_X_{split}.json", text.nux)
    plans = {split: text.plans for split, text in texts.items()}
    _write_json(folder / "gpt_driver" / "split.json", plans)
    path = folder / "gpt_driver" / "cached_nuscenes_info.pkl"
    path.write_bytes(pickle.dumps(cache, protocol=PICKLE_PROTOCOL))


def add_scene(
    log: SceneLog, texts: SplitTexts, tokens: TokenIndex, recorded: Recorded, seed: int
) -> dict[str, dict[str, Any]]:
    """Append one scene's nuCaption, NuScenes-QA and nuX records; return its TOD3Cap records."""
    scene = SceneFacts(log)
    objects: dict[str, dict[str, Any]] = {}
    dice = Dice(np.random.default_rng([seed, zlib.crc32(log.name.encode())]))
    for keyframe in range(KEYFRAMES_PER_SCENE):
        facts = scene.at(keyframe, tokens.annotated[log.name, keyframe])
        token = tokens.sample(log.name, keyframe)
        objects |= object_captions(facts, recorded.samples[token], tokens, dice)
        texts.nucaption += described(facts, token, dice)
        texts.questions += keyframe_questions(facts, token, texts.ledger, dice)
        texts.nux[token] = narrate_keyframe(facts, dice)
    return objects


def split_of(scene_name: str, version: str) -> str:
    """The official split of a scene: it depends on the version (scene-0553 trains in mini only).

    Raises:
        UserError: the version has no such scene in train or val.
    """
    splits = create_splits_scenes()
    prefix = "mini_" if version == "v1.0-mini" else ""
    for split in SPLITS:
        if scene_name in splits[prefix + split]:
            return split
    raise UserError(f"scene {scene_name!r} is in neither the train nor the val split of {version}")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
