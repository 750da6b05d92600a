"""Language files that are missing, damaged or of another root: what is said of them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from datamodules.array_pickles import load_arrays
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.nucaption import NuCaptionConfig
from datamodules.nuscenes_qa import NuScenesQAConfig
from datamodules.nux import NuXConfig
from datamodules.tod3cap import TOD3CapConfig
from odvla.errors import UserError


def _change(path, change):
    content = json.loads(path.read_text())
    result = change(content)
    path.write_text(json.dumps(result if isinstance(result, list | dict) else content))


BROKEN = {
    "nucaption/train.json": (
        NuCaptionConfig,
        [
            (lambda c: c[4].pop("answer"), r"train\.json, record 4: field 'answer' is missing"),
            (
                lambda c: c[2].update(question=5),
                r"record 2: field 'question' must be a text, not 5",
            ),
            (
                lambda c: c[3].update(answer_lidar=" "),
                r"record 3: field 'answer_lidar' must be a text",
            ),
            (lambda c: {"a": 1}, r"must hold a list of records, not an object"),
            (lambda c: c[-1:], r"none of its 1 records belongs to a sample"),
        ],
    ),
    "nuscenes_qa/NuScenes_train_questions.json": (
        NuScenesQAConfig,
        [
            (lambda c: c["questions"][7].update(num_hop=3), r"record 7: field 'num_hop'"),
            (
                lambda c: c["questions"][0].update(template_type="why"),
                r"unknown template_type 'why'",
            ),
            (lambda c: c["questions"][7].update(num_hop=True), r"record 7: field 'num_hop'"),
            *(
                (
                    lambda c, answer=answer: c["questions"][3].update(answer=answer),
                    r"record 3: field 'answer' must be a word or number",
                )
                for answer in (None, "", " \n", True, ["yes"])
            ),
            (lambda c: c["questions"], r"an object with a list 'questions'"),
        ],
    ),
    "nux/Nu_X_train.json": (
        NuXConfig,
        [(lambda c: next(iter(c.values())).pop("reasoning"), r"field 'reasoning' is missing")],
    ),
    "final_caption_bbox_token.json": (
        TOD3CapConfig,
        [
            (
                lambda c: next(iter(c.values())).update(final_caption=" "),
                r"'final_caption' must be a",
            ),
            (
                lambda c: next(iter(c.values())).update(sample_token="x"),
                r"sample_token is 'x', but",
            ),
            (
                lambda c: next(iter(c.values())).pop("relation_caption"),
                r"field 'relation_caption' is missing",
            ),
            (
                lambda c: next(iter(c.values())).update(map_caption="on a road"),
                r"field 'map_caption.map_caption' is missing",
            ),
            (
                lambda c: next(iter(c.values()))["depth_caption"].update(depth=True),
                r"field 'depth_caption.depth' must be a number, not True",
            ),
            (
                lambda c: next(iter(c.values()))["localization_caption"].update(
                    x_offset=float("nan")
                ),
                r"field 'localization_caption.x_offset' must be a number, not nan",
            ),
            (
                lambda c: next(iter(c.values()))["motion_caption"].pop("bev_vel"),
                r"field 'motion_caption.bev_vel' is missing",
            ),
        ],
    ),
}


@pytest.mark.parametrize(
    ("name", "config_class", "change", "message"),
    [(n, c, change, m) for n, (c, cases) in BROKEN.items() for change, m in cases],
)
def test_bad_records_are_named(root, tmp_path, name, config_class, change, message, build):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((root / "language" / name).read_text())
    _change(path, change)
    with pytest.raises(UserError, match=message):
        build(config_class, root, language_root=str(tmp_path)).source("train")


def test_missing_and_broken_files_are_named(root, tmp_path, build):
    data = build(NuXConfig, root, language_root=str(tmp_path))
    with pytest.raises(UserError, match=r"Nu_X_train\.json does not exist"):
        data.source("train")
    path = tmp_path / "nux" / "Nu_X_train.json"
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(UserError, match=r"Nu_X_train\.json is not JSON"):
        data.source("train")


class _Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_cannot_run_code(root, tmp_path, build):
    path = tmp_path / "gpt_driver" / "cached_nuscenes_info.pkl"
    path.parent.mkdir()
    target = tmp_path / "touched"
    path.write_bytes(pickle.dumps({"token": _Attack(target)}))
    data = build(GPTDriverConfig, root, language_root=str(tmp_path))
    with pytest.raises(UserError, match=r"cached_nuscenes_info\.pkl is refused: it names"):
        data.source("train")
    assert not target.exists()
    path.write_bytes((root / "language/gpt_driver/cached_nuscenes_info.pkl").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cached_nuscenes_info\.pkl is not a whole pickle"):
        data.source("train")


class _Huge:
    def __reduce__(self):
        return (np.ndarray, ((10**15,),))


def test_a_pickle_that_cannot_be_held_or_read_is_named(tmp_path):
    path = tmp_path / "plans.pkl"
    path.write_bytes(pickle.dumps({"token": _Huge()}))
    with pytest.raises(UserError, match=r"plans\.pkl asks for more memory than there is"):
        load_arrays(path)
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        load_arrays(tmp_path)


def test_a_key_that_comes_twice_is_named(root, tmp_path, build):
    """Python's reader would keep the last of two values and say nothing."""
    path = tmp_path / "nux" / "Nu_X_train.json"
    path.parent.mkdir()
    text = (root / "language/nux/Nu_X_train.json").read_text()
    token = next(iter(json.loads(text)))
    path.write_text(f'{text[:-1]}, "{token}": {{"narration": "a", "reasoning": "b"}}}}')
    with pytest.raises(
        UserError, match=rf"Nu_X_train\.json: an object has the key '{token}' twice"
    ):
        build(NuXConfig, root, language_root=str(tmp_path)).source("train")


CACHE = "gpt_driver/cached_nuscenes_info.pkl"
BROKEN_CACHES = [
    (lambda c, t: c.update({7: c[t]}), r"its keys must be sample tokens, not 7"),
    (lambda c, t: c[t].update(gt_ego_fut_masks=np.full(6, 0.5)), r"must be 0s and 1s, not \[0\.5 "),
    (
        lambda c, t: c[t].update(gt_ego_fut_cmd=np.array([1, 1, 0])),
        r"a single 1, not \[1\. 1\. 0\.",
    ),
    (lambda c, t: c[t].update(gt_ego_fut_cmd=np.zeros(3)), r"a single 1, not \[0\. 0\. 0\."),
    (lambda c, t: c[t].update(gt_ego_fut_cmd=np.array([2, 0, -1])), r"must be 0s and 1s"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_CACHES)
def test_broken_cache_records_are_named(root, tmp_path, change, message, build):
    cache = pickle.loads((root / "language" / CACHE).read_bytes())
    change(cache, next(iter(cache)))
    (tmp_path / "gpt_driver").mkdir()
    (tmp_path / CACHE).write_bytes(pickle.dumps(cache))
    with pytest.raises(UserError, match=message):
        build(GPTDriverConfig, root, language_root=str(tmp_path)).source("train")


def test_unknown_tokens_of_a_cache_are_counted(root, tmp_path, build):
    cache = pickle.loads((root / "language" / CACHE).read_bytes())
    cache["of-another-root"] = next(iter(cache.values()))
    (tmp_path / "gpt_driver").mkdir()
    (tmp_path / CACHE).write_bytes(pickle.dumps(cache))
    data = build(GPTDriverConfig, root, language_root=str(tmp_path))
    (report,) = data.join_reports("val")
    told = {left.reason: (left.count, left.example) for left in report.left_out}
    assert (report.records, report.joined) == (27, 13)
    assert told["its sample is not in this root"] == (1, "of-another-root")
    assert told["its sample belongs to the train split"][0] == 13


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("field", ["gt_ego_fut_masks", "gt_ego_fut_trajs"])
def test_cached_fields_are_checked(root, tmp_path, field, protocol, build):
    path = tmp_path / "gpt_driver" / "cached_nuscenes_info.pkl"
    path.parent.mkdir()
    cache = pickle.loads((root / "language/gpt_driver/cached_nuscenes_info.pkl").read_bytes())
    token = next(iter(cache))
    cache[token][field] = cache[token][field][:-1]
    path.write_bytes(pickle.dumps(cache, protocol=protocol))
    with pytest.raises(UserError, match=rf"{token}: field '{field}' must be"):
        build(GPTDriverConfig, root, language_root=str(tmp_path)).source("train")
