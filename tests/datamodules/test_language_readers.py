"""The five language data sets in hand-written files: what is read, and what is refused."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from datamodules.agent_trajectories import AgentTrajectoriesConfig
from datamodules.alignment import AlignmentConfig, map_text
from datamodules.array_pickles import load_arrays
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.index_file import load_index
from datamodules.mixture import MixtureConfig
from datamodules.nucaption import NuCaptionConfig
from datamodules.nuscenes_qa import NuScenesQAConfig
from datamodules.nux import NuXConfig
from datamodules.picking import Picker
from datamodules.tod3cap import TOD3CapConfig
from odvla.errors import UserError
from odvla.language.action_bins import ActionBins
from odvla.language.decisions import decision_of
from odvla.language.prompts import Dialect, PlanDialect
from odvla.language.waypoints import format_waypoints
from odvla.types import Talk

QA = "nuscenes_qa/NuScenes_{}_questions.json"


def _tod3cap(index):
    return {
        token.decode(): {
            "sample_token": index.frames[frame].token,
            "final_caption": f"Thing {row} stands still.",
            "instance_token": index.instance_tokens[index.annotations.instance[row]],
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
                "x_vel": float("nan"),
                "y_vel": float("nan"),
                "bev_vel": float("nan"),
            },
            "map_caption": {"map_caption": ""},
            "relation_caption": "none",
        }
        for row, (token, frame) in enumerate(
            zip(index.annotations.token, index.annotations.frame, strict=True)
        )
    }


def _cached(index, frame):
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


def write_language(root: Path) -> Path:
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
    cache = {f.token: _cached(index, f) for f in index.frames}
    (root / "language/gpt_driver/cached_nuscenes_info.pkl").write_bytes(pickle.dumps(cache))
    return root


@pytest.fixture(scope="module")
def root(circles, tmp_path_factory):
    return write_language(circles.write_root(tmp_path_factory.mktemp("talk")))


class _Counter:
    """Stands in for a tokenizer: one id a conversation."""

    def tokenise(self, conversations, frame_index, stream=None):
        import torch

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


def _build(config_class, root, **changes):
    settings = {"image_size": (16, 9), "batch_size": 4, "eval_batch_size": 2} | changes
    return config_class(str(root), **settings).build(_Counter())


# data set -> (config, conversations a key-frame)
COUNTS = {
    "nucaption": (NuCaptionConfig, 3),
    "qa": (NuScenesQAConfig, 4),
    "nux": (NuXConfig, 1),
    "mixture": (MixtureConfig, 8),
    "plans": (GPTDriverConfig, 1),
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_record_becomes_a_conversation(root, name):
    config_class, per_frame = COUNTS[name]
    data = _build(config_class, root)
    for split, frames in (("train", 13), ("val", 13)):
        conversations = list(data.conversations(split))
        assert len(conversations) == frames * per_frame
        assert len({c.id for c in conversations}) == len(conversations)
        for conversation in conversations:
            assert conversation.turns[-1].role == "assistant"
            assert conversation.reference in conversation.turns[-1].text
            assert conversation.turns[-2].role == "user"
    texts = list(data.texts("train"))
    assert len(texts) >= 2 * 13 * per_frame
    # Every third of the 13 key-frames, from the first to the last.
    some = list(data.texts("train", 13 * per_frame // 3 + 1))
    assert 0.25 * len(texts) < len(some) < 0.5 * len(texts)
    assert set(some) <= set(texts)
    assert some[-1] == texts[-1]


def test_contents_arrive(root):
    index = load_index(root, "v1.0-mini")
    caption = next(
        _build(NuCaptionConfig, root, nucaption_answer="answer_lidar").conversations("val")
    )
    assert (caption.kind, caption.reference) == ("caption", "A road.")
    assert "What is around? 0" in caption.turns[-2].text
    questions = list(itertools.islice(_build(NuScenesQAConfig, root).conversations("val"), 2))
    assert [q.reference for q in questions] == ["yes", "2"]
    assert questions[1].meta["num_hop"] == "1"
    told = next(_build(NuXConfig, root).conversations("train"))
    assert told.reference == ("Narration: the car goes on. Reasoning: because the road is free.")
    plan = next(_build(GPTDriverConfig, root).conversations("train"))
    cached = _cached(index, None)["gt_ego_fut_trajs"][1:]
    assert plan.reference == format_waypoints(cached)
    assert plan.meta["known_waypoints"] == "4"


def test_plans_are_thought_over(root):
    index = load_index(root, "v1.0-mini")
    plain = next(_build(GPTDriverConfig, root).conversations("train"))
    data = GPTDriverConfig(str(root), image_size=(16, 9), thoughts=True).build(
        None, Dialect("reasoning")
    )
    plan = next(data.conversations("train"))
    said = [turn.text for turn in plan.turns if turn.role == "assistant"]
    cached = _cached(index, None)["gt_ego_fut_trajs"][1:]
    assert plan.sample_token == plain.sample_token
    described = next(_build(NuCaptionConfig, root).conversations("train"))
    assert said[0].startswith(described.reference)
    assert said[1] == plan.meta["decision"]
    last_step = data.frame(plan.sample_token).ego.last_step[0]
    assert plan.meta["decision"] == decision_of(cached, last_step)
    assert said[2] == plan.reference
    asked = data.plan_request(plan.sample_token)
    told = [turn.text for turn in asked.turns if turn.role == "user"]
    assert told == [turn.text for turn in plan.turns if turn.role == "user"]
    assert not any(turn.text for turn in asked.turns if turn.role == "assistant")


def test_action_bins_are_those_of_the_train_split(root):
    data = _build(GPTDriverConfig, root)
    waypoints, mask = data.driven("train")
    assert len(waypoints) == len(mask) == 13
    bins = ActionBins.of(waypoints, 32)
    with pytest.raises(UserError, match="no whole future to take action bins from"):
        data.action_bins(32)  # the cache of this root knows four waypoints of each plan
    data.driven = lambda split: (waypoints, mask | (split == "train"))
    assert data.action_bins(32) == bins
    data = GPTDriverConfig(root=str(root)).build(None, PlanDialect("odvla", values="tokens"))
    with pytest.raises(UserError, match="needs action bins"):
        next(data.conversations("train"))
    data.use_bins(bins)
    plan = next(data.conversations("train"))
    assert plan.reference.count("<action_") == 12
    assert plan.meta["form"] == "tokens"


def test_object_captions_hold_the_box(root):
    data = _build(TOD3CapConfig, root)
    conversations = list(data.conversations("train"))
    agents = {f.token: data.frame(f.token).agents[0] for f in data.index.frames[:13]}
    assert len(conversations) == sum(int(a.mask.sum()) for a in agents.values())
    for conversation in conversations:
        assert conversation.kind == "caption_object"
        assert "<OBJECT>" in conversation.turns[-2].text
        boxes = agents[conversation.sample_token].boxes[0].numpy()
        match = np.flatnonzero((boxes == np.float32(conversation.object_box)).all(1))
        assert len(match) == 1
        x, y = boxes[match[0], :2]
        assert f"({x:.2f},{y:.2f})" in conversation.reference
        assert conversation.meta["caption"] in conversation.reference


def test_agent_futures_are_told(root):
    data = _build(AgentTrajectoriesConfig, root)
    conversations = list(data.conversations("train"))
    car = conversations[0]
    assert car.meta["class"] == "car"
    speed = np.hypot(3, 1)
    points = ",".join(f"(0.00,{0.5 * speed * k:.2f})" for k in range(1, 7))
    assert f"[{points}]" in car.reference
    walker = next(c for c in conversations if c.meta["class"] == "pedestrian")
    assert walker.reference.count("UN,UN") == 3
    # Nothing is asked about agents that are not seen again.
    last = data.index.frames[8].token
    assert not [c for c in conversations if c.sample_token == last]


def test_alignment_covers_the_streams(root):
    data = _build(AlignmentConfig, root)
    kinds = [c.kind for c in data.conversations("train")]
    assert kinds.count("caption_map") == kinds.count("caption_scene") == 13
    assert kinds.count("caption_object") == len(
        list(_build(TOD3CapConfig, root).conversations("train"))
    )
    assert "2 edges of the road" in map_text((0, 1, 2))
    assert map_text((0, 1, 2)).startswith(
        "Around the car there are no lane or road dividers, 1 ped"
    )
    scene = next(c for c in data.conversations("train") if c.kind == "caption_scene")
    assert scene.reference == "A train road 0. A train road 1."
    only_map = _build(AlignmentConfig, root, streams=("map",))
    assert {c.kind for c in only_map.conversations("val")} == {"caption_map"}


def test_batches_hold_their_conversations(root):
    data = _build(MixtureConfig, root, conversations_per_frame=3, eval_conversations_per_frame=2)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert len(batch.talk.conversations) == 3 * len(batch.valid)
        for row, conversation in zip(batch.talk.frame_index, batch.talk.conversations, strict=True):
            assert batch.clip[-1].sample_tokens[int(row)] == conversation.sample_token
    thinned = _build(MixtureConfig, root, eval_conversations_per_frame=2, eval_frames_stride=3)

    def evaluated(seed):
        thinned = _build(
            MixtureConfig, root, eval_conversations_per_frame=2, eval_frames_stride=3, seed=seed
        )
        talks = [batch.talk for batch in thinned.test_dataloader() if batch.talk is not None]
        return [c.id for talk in talks for c in talk.conversations]

    assert evaluated(0) == evaluated(1)
    positions = [k for s in thinned.scenes("val") for k in range(2, s.last - s.first, 3)]
    assert len(evaluated(0)) == 2 * len(positions)


def test_all_conversations_are_visited(root):
    data = _build(MixtureConfig, root, conversations_per_frame=3)
    picker = data.picker("train")
    visited = {c for epoch in range(3) for c in picker.train(5, 0, epoch)}
    assert visited == set(range(8))
    every = Picker(data.index, picker.frames, picker.source, per_frame=3, every=True)
    items = every.items()
    assert len(items) == 13 * 3
    seen = [(frame, c) for frame, part in items for c in every.train(frame, part, epoch=7)]
    assert sorted(seen) == [(frame, c) for frame in range(13) for c in range(8)]


def test_only_whole_futures_and_cached_egos(root):
    data = _build(GPTDriverConfig, root, whole_futures_only=True, ego_from_cache=True)
    assert len(list(data.conversations("train"))) == 3
    assert len(list(data.conversations("val"))) == 13
    conversation = next(data.conversations("train"))
    assert conversation.meta["command"] == "turn right"  # the cache says so, the poses do not
    _, ego = next(data.cached_egos("train"))
    np.testing.assert_array_equal(ego.velocity[0], [0, 1])
    assert (ego.yaw_rate.item(), ego.heading_speed.item(), ego.steering.item()) == (4, 7, 8)


def test_a_question_needs_a_tokenizer(root):
    data = NuXConfig(str(root), image_size=(16, 9)).build()
    with pytest.raises(UserError, match="NuXDataModule needs a tokenizer"):
        data.train_dataloader()


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
    QA.format("train"): (
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
                lambda c: next(iter(c.values()))["motion_caption"].update(bev_vel="fast"),
                r"field 'motion_caption.bev_vel' must be a number, not 'fast'",
            ),
        ],
    ),
}


@pytest.mark.parametrize(
    ("name", "config_class", "change", "message"),
    [(n, c, change, m) for n, (c, cases) in BROKEN.items() for change, m in cases],
)
def test_bad_records_are_named(root, tmp_path, name, config_class, change, message):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((root / "language" / name).read_text())
    _change(path, change)
    with pytest.raises(UserError, match=message):
        _build(config_class, root, language_root=str(tmp_path)).source("train")


def test_missing_and_broken_files_are_named(root, tmp_path):
    data = _build(NuXConfig, root, language_root=str(tmp_path))
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


def test_a_pickle_cannot_run_code(root, tmp_path):
    path = tmp_path / "gpt_driver" / "cached_nuscenes_info.pkl"
    path.parent.mkdir()
    target = tmp_path / "touched"
    path.write_bytes(pickle.dumps({"token": _Attack(target)}))
    data = _build(GPTDriverConfig, root, language_root=str(tmp_path))
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


def test_a_key_that_comes_twice_is_named(root, tmp_path):
    """Python's reader would keep the last of two values and say nothing."""
    path = tmp_path / "nux" / "Nu_X_train.json"
    path.parent.mkdir()
    text = (root / "language/nux/Nu_X_train.json").read_text()
    token = next(iter(json.loads(text)))
    path.write_text(f'{text[:-1]}, "{token}": {{"narration": "a", "reasoning": "b"}}}}')
    with pytest.raises(
        UserError, match=rf"Nu_X_train\.json: an object has the key '{token}' twice"
    ):
        _build(NuXConfig, root, language_root=str(tmp_path)).source("train")


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
def test_broken_cache_records_are_named(root, tmp_path, change, message):
    cache = pickle.loads((root / "language" / CACHE).read_bytes())
    change(cache, next(iter(cache)))
    (tmp_path / "gpt_driver").mkdir()
    (tmp_path / CACHE).write_bytes(pickle.dumps(cache))
    with pytest.raises(UserError, match=message):
        _build(GPTDriverConfig, root, language_root=str(tmp_path)).source("train")


def test_unknown_tokens_of_a_cache_are_counted(root, tmp_path):
    cache = pickle.loads((root / "language" / CACHE).read_bytes())
    cache["of-another-root"] = next(iter(cache.values()))
    (tmp_path / "gpt_driver").mkdir()
    (tmp_path / CACHE).write_bytes(pickle.dumps(cache))
    data = _build(GPTDriverConfig, root, language_root=str(tmp_path))
    (report,) = data.join_reports("val")
    told = {left.reason: (left.count, left.example) for left in report.left_out}
    assert (report.records, report.joined) == (27, 13)
    assert told["its sample is not in this root"] == (1, "of-another-root")
    assert told["its sample belongs to the train split"][0] == 13


def test_left_out_objects_and_whole_futures_are_counted(root):
    """The hand-made root: per key-frame a car and sometimes a walker count, three others do not."""
    data = _build(TOD3CapConfig, root)
    objects = len(list(data.conversations("train")))
    (report,) = data.join_reports("train")
    index = data.index
    split = [index.scenes[index.frames[f].scene].split for f in index.annotations.frame]
    assert report.records == len(split)
    counts = {left.reason: left.count for left in report.left_out}
    assert counts.pop("its sample belongs to the val split") == split.count("val")
    assert list(counts.values()) == [split.count("train") - objects]
    assert report.joined == objects
    data = _build(GPTDriverConfig, root, whole_futures_only=True)
    data.source("train")
    cache, listing = data.join_reports("train")
    assert (cache.joined, listing.records, listing.joined) == (3, 3, 3)
    assert {left.reason: left.count for left in cache.left_out} == {
        "its sample belongs to the val split": 13,
        "split.json does not list it for training": 10,
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("field", ["gt_ego_fut_masks", "gt_ego_fut_trajs"])
def test_cached_fields_are_checked(root, tmp_path, field, protocol):
    path = tmp_path / "gpt_driver" / "cached_nuscenes_info.pkl"
    path.parent.mkdir()
    cache = pickle.loads((root / "language/gpt_driver/cached_nuscenes_info.pkl").read_bytes())
    token = next(iter(cache))
    cache[token][field] = cache[token][field][:-1]
    path.write_bytes(pickle.dumps(cache, protocol=protocol))
    with pytest.raises(UserError, match=rf"{token}: field '{field}' must be"):
        _build(GPTDriverConfig, root, language_root=str(tmp_path)).source("train")
