"""The language files of the hand-made root, written by hand, too."""

import json
import pickle

import numpy as np
import pytest
import torch

from datamodules.index_file import load_index
from odvla.types import Talk

QA = "nuscenes_qa/NuScenes_{}_questions.json"


def _caption_record(sample, caption, velocity=(1, 2, 3)):
    x_vel, y_vel, bev_vel = velocity
    return {
        "sample_token": sample,
        "final_caption": caption,
        "instance_token": "i",
        "attribute_caption": {"attribute_caption": "Thing"},
        "depth_caption": {"depth": 7.5, "depth_caption": "near"},
        "localization_caption": {
            "localization_caption": "ahead",
            "x_offset": 1.5,
            "y_offset": 7,
            "localization_theta": 12.0,
        },
        "motion_caption": {
            "motion_caption": "standing",
            "x_vel": x_vel,
            "y_vel": y_vel,
            "bev_vel": bev_vel,
        },
        "map_caption": {"map_caption": ""},
        "relation_caption": "none",
    }


def _tod3cap(index):
    nan = (float("nan"),) * 3
    return {
        token.decode(): _caption_record(
            index.frames[frame].token, f"Thing {row} stands still.", nan
        )
        for row, (token, frame) in enumerate(
            zip(index.annotations.token, index.annotations.frame, strict=True)
        )
    }


def _cached():
    future = np.stack([np.arange(7) * 0.1, np.arange(7) * 2.0], axis=1)
    return {
        "gt_ego_his_trajs": np.array([[0.0, -2.0 * k] for k in (4, 3, 2, 1, 0)]),
        "gt_ego_his_diff": np.tile([0.0, 2.0], (4, 1)),
        "gt_ego_fut_trajs": future,
        "gt_ego_fut_diff": np.diff(future, axis=0),
        "gt_ego_fut_masks": np.array([1.0, 1, 1, 1, 0, 0]),
        "gt_ego_fut_cmd": np.array([1.0, 0.0, 0.0]),
        "gt_ego_lcf_feat": np.arange(9.0),
        "gt_names": ["car"],
    }


def _write_language(root):
    index = load_index(root, "v1.0-mini")
    files: dict[str, object] = {"final_caption_bbox_token.json": _tod3cap(index)}
    for split in ("train", "val"):
        tokens = [f.token for s in index.scenes_of(split) for f in index.frames[s.first : s.last]]
        files[f"nucaption/{split}.json"] = [
            {
                "sample_token": token,
                "question": f"What is around? {k}",
                "answer": f"A {split} road {k}.",
                "answer_lidar": "A road.",
            }
            for token in [*tokens, "of-another-root"]
            for k in range(3)
        ]
        files[QA.format(split)] = {
            "info": {},
            "questions": [
                {
                    "sample_token": token,
                    "question": f"How many cars? {k}",
                    "answer": 2 if k else "yes",
                    "template_type": "count",
                    "num_hop": k % 2,
                }
                for token in tokens
                for k in range(4)
            ],
        }
        files[f"nux/Nu_X_{split}.json"] = {
            token: {"narration": "the car goes on.", "reasoning": "because the road is free"}
            for token in tokens
        }
    train = [f.token for s in index.scenes_of("train") for f in index.frames[s.first : s.last]]
    files["gpt_driver/split.json"] = {"train": train[:3], "val": []}
    for name, content in files.items():
        (root / "language" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "language" / name).write_text(json.dumps(content))
    cache = {f.token: _cached() for f in index.frames}
    (root / "language/gpt_driver/cached_nuscenes_info.pkl").write_bytes(pickle.dumps(cache))
    return root


@pytest.fixture(scope="session")
def root(circles, tmp_path_factory):
    """The hand-made root with the language files; nobody may change it."""
    return _write_language(circles.write_root(tmp_path_factory.mktemp("talk")))


class _Counter:
    """Stands in for a tokenizer: one id a conversation."""

    def tokenise(self, conversations, frame_index, stream=None):
        rows = len(conversations)
        ids = torch.zeros(rows, 1, dtype=torch.int64)
        return Talk(
            input_ids=ids,
            labels=ids,
            mask=ids == 0,
            prompt_length=ids[:, 0],
            frame_index=torch.tensor(frame_index),
            object_boxes=torch.zeros(rows, 9),
            conversations=tuple(conversations),
        )


@pytest.fixture(scope="session")
def build():
    """Makes the data module of a config class on a root."""

    def made(config_class, root, **changes):
        settings = {"image_size": (16, 9), "batch_size": 4, "eval_batch_size": 2} | changes
        return config_class(str(root), **settings).build(_Counter())

    return made


@pytest.fixture(scope="session")
def cached_info():
    """The info that GPT-Driver's cache has of every key-frame."""
    return _cached()


@pytest.fixture(scope="session")
def caption_record():
    """Makes a record of TOD3Cap's file."""
    return _caption_record
