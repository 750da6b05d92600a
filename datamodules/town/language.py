"""Writes the seven language data sets of the town, each in its own file format."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nuscenes.utils.splits import create_splits_scenes

from datamodules.town.captions import object_captions
from datamodules.town.descriptions import described
from datamodules.town.drivelm import GraphRecords, as_file, graph_records
from datamodules.town.fine_tuning import fine_tuning_line
from datamodules.town.log import KEYFRAMES_PER_SCENE, SceneLog
from datamodules.town.narration import narrate_keyframe
from datamodules.town.omnidrive import frame_files
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
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)  # TOD3Cap's, by scene name
    ledger: Ledger = field(default_factory=Ledger)
    graphs: dict[str, dict[str, GraphRecords]] = field(default_factory=dict)  # scene, sample
    scenes: dict[str, str] = field(default_factory=dict)  # scene token -> description
    omnidrive: dict[str, dict[str, Any]] = field(default_factory=dict)  # sample, folder


def write_language(
    root: Path,
    version: str,
    logs: Sequence[SceneLog],
    tokens: TokenIndex,
    seed: int,
    pool: Executor | None = None,
) -> None:
    """Write all seven data sets under root/language.

    The tables (and the CAN bus, which the cache quotes) must be written before.

    Args:
        root: the town's data root.
        version: v1.0-mini or v1.0-trainval, the folder of the tables.
        logs: the scenes, in the order of the tables.
        tokens: the tokens used in the tables.
        seed: of the town; chooses words and questions.
        pool: processes that share the work; None: everything is done here. The bytes are the same.

    Raises:
        UserError: a table is missing, or a scene belongs to no official split.
    """
    of_split = {
        split: [log for log in logs if split_of(log.name, version) == split] for split in SPLITS
    }
    # A split's questions are balanced over all of its scenes: it is told by one process.
    if pool is None:
        told = {split: tell_split(root, version, of_split[split], tokens, seed) for split in SPLITS}
        write_gpt_driver(root, version, logs, tokens)
    else:
        plans = pool.submit(write_gpt_driver, root, version, logs, tokens)
        val = pool.submit(tell_split, root, version, of_split["val"], tokens, seed)
        train = tell_split(root, version, of_split["train"], tokens, seed)
        told = {"train": train, "val": val.result()}
        plans.result()
    folder = root / "language"
    objects = {name: own for text in told.values() for name, own in text.objects.items()}
    _write_json(
        folder / "final_caption_bbox_token.json",
        {token: record for log in logs for token, record in objects[log.name].items()},
    )
    for split, text in told.items():
        _write_json(folder / "nucaption" / f"{split}.json", text.nucaption)
        _write_json(
            folder / "nuscenes_qa" / f"NuScenes_{split}_questions.json",
            {"info": INFO, "questions": text.questions},
        )
        _write_json(folder / "nux" / f"Nu_X_{split}.json", text.nux)
    _write_drivelm(folder / "drivelm", told)
    for split, text in told.items():
        for token, files in text.omnidrive.items():
            for part, content in files.items():
                _write_json(folder / "omnidrive" / part / split / f"{token}.json", content)


def tell_split(
    root: Path, version: str, logs: Sequence[SceneLog], tokens: TokenIndex, seed: int
) -> SplitTexts:
    """Compose the texts of a split's scenes; see write_language."""
    recorded = read_recorded(root, version)
    texts = SplitTexts()
    for log in logs:
        texts.objects[log.name] = add_scene(log, texts, tokens, recorded, seed)
    return texts


def write_gpt_driver(
    root: Path, version: str, logs: Sequence[SceneLog], tokens: TokenIndex
) -> None:
    """Write GPT-Driver's cached info of all scenes, its splits and its lines of training."""
    recorded = read_recorded(root, version)
    cache: dict[str, dict[str, Any]] = {}
    plans: dict[str, list[str]] = {split: [] for split in SPLITS}
    for log in logs:
        cache |= scene_infos(log, tokens, recorded)
        split = split_of(log.name, version)
        plans[split] += (
            whole_future_tokens(log.name, tokens)
            if split == "train"
            else [tokens.sample(log.name, k) for k in range(KEYFRAMES_PER_SCENE)]
        )
    folder = root / "language" / "gpt_driver"
    _write_json(folder / "split.json", plans)
    path = folder / "cached_nuscenes_info.pkl"
    path.write_bytes(pickle.dumps(cache, protocol=PICKLE_PROTOCOL))
    lines = [json.dumps(fine_tuning_line(cache[token])) for token in plans["train"]]
    (folder / "train.json").write_text("\n".join(lines), encoding="utf-8")


def add_scene(
    log: SceneLog, texts: SplitTexts, tokens: TokenIndex, recorded: Recorded, seed: int
) -> dict[str, dict[str, Any]]:
    """Append one scene's records to its split's texts; return its TOD3Cap records."""
    scene = SceneFacts(log)
    objects: dict[str, dict[str, Any]] = {}
    dice = Dice(np.random.default_rng([seed, zlib.crc32(log.name.encode())]))
    # The later data sets throw dice of their own: the texts of the others stay what they were.
    own_dice = Dice(np.random.default_rng([seed, zlib.crc32(log.name.encode()), 1]))
    graphs = texts.graphs.setdefault(tokens.scene(log.name), {})
    texts.scenes[tokens.scene(log.name)] = log.description
    for keyframe in range(KEYFRAMES_PER_SCENE):
        facts = scene.at(keyframe, tokens.annotated[log.name, keyframe])
        token = tokens.sample(log.name, keyframe)
        objects |= object_captions(facts, recorded.samples[token], tokens, dice)
        texts.nucaption += described(facts, token, dice)
        texts.questions += keyframe_questions(facts, token, texts.ledger, dice)
        texts.nux[token] = narrate_keyframe(facts, dice)
        graph = graph_records(facts, log, recorded.samples[token], own_dice)
        if graph is not None:
            graphs[token] = graph
        files = frame_files(facts, own_dice)
        if files:
            texts.omnidrive[token] = files
    return objects


def _write_drivelm(folder: Path, texts: Mapping[str, SplitTexts]) -> None:
    """The published train file, the challenge's questions of val, and these with answers."""
    train, val = texts["train"], texts["val"]
    trained = {
        scene: {token: graph.train for token, graph in found.items()}
        for scene, found in train.graphs.items()
    }
    _write_json(folder / "v1_1_train_nus.json", as_file(trained, train.scenes))
    for name, with_answers in (("v1_1_val_nus_q_only.json", False), ("test_eval.json", True)):
        asked = {
            scene: {
                token: graph.test if with_answers else graph.questions
                for token, graph in found.items()
            }
            for scene, found in val.graphs.items()
        }
        _write_json(folder / name, as_file(asked))


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
