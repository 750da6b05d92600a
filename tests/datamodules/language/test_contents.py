"""The language data sets in hand-written files: what is read."""

import itertools
import json

import numpy as np
import pytest

from datamodules.agent_trajectories import AgentTrajectoriesConfig
from datamodules.alignment import AlignmentConfig, map_text
from datamodules.description import describe
from datamodules.gpt_driver import GPTDriverConfig
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
from odvla.language.waypoints import format_waypoints, parse_future

# data set -> (config, conversations a key-frame)
COUNTS = {
    "nucaption": (NuCaptionConfig, 3),
    "qa": (NuScenesQAConfig, 4),
    "nux": (NuXConfig, 1),
    "mixture": (MixtureConfig, 8),
    "plans": (GPTDriverConfig, 1),
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_record_becomes_a_conversation(root, name, build):
    config_class, per_frame = COUNTS[name]
    data = build(config_class, root)
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


def test_contents_arrive(root, build, cached_info):
    caption = next(
        build(NuCaptionConfig, root, nucaption_answer="answer_lidar").conversations("val")
    )
    assert (caption.kind, caption.reference) == ("caption", "A road.")
    assert "What is around? 0" in caption.turns[-2].text
    questions = list(itertools.islice(build(NuScenesQAConfig, root).conversations("val"), 2))
    assert [q.reference for q in questions] == ["yes", "2"]
    assert questions[1].meta["num_hop"] == "1"
    told = next(build(NuXConfig, root).conversations("train"))
    assert told.reference == ("Narration: the car goes on. Reasoning: because the road is free.")
    plan = next(build(GPTDriverConfig, root).conversations("train"))
    cached = cached_info["gt_ego_fut_trajs"][1:]
    assert plan.reference == format_waypoints(cached)
    assert plan.meta["known_waypoints"] == "4"


def test_plans_are_thought_over(root, build, cached_info):
    plain = next(build(GPTDriverConfig, root).conversations("train"))
    data = GPTDriverConfig(str(root), image_size=(16, 9), thoughts=True).build(
        None, Dialect("reasoning")
    )
    plan = next(data.conversations("train"))
    said = [turn.text for turn in plan.turns if turn.role == "assistant"]
    cached = cached_info["gt_ego_fut_trajs"][1:]
    assert plan.sample_token == plain.sample_token
    described = next(build(NuCaptionConfig, root).conversations("train"))
    assert said[0].startswith(described.reference)
    assert said[1] == plan.meta["decision"]
    last_step = data.frame(plan.sample_token).ego.last_step[0]
    assert plan.meta["decision"] == decision_of(cached, last_step)
    assert said[2] == plan.reference
    asked = data.plan_request(plan.sample_token)
    told = [turn.text for turn in asked.turns if turn.role == "user"]
    assert told == [turn.text for turn in plan.turns if turn.role == "user"]
    assert not any(turn.text for turn in asked.turns if turn.role == "assistant")


def test_action_bins_are_those_of_the_train_split(root, build):
    data = build(GPTDriverConfig, root)
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


def test_object_captions_hold_the_box(root, build):
    data = build(TOD3CapConfig, root)
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


def test_agent_futures_are_told(root, build):
    data = build(AgentTrajectoriesConfig, root)
    conversations = list(data.conversations("train"))
    car = conversations[0]
    assert car.meta["class"] == "car"
    speed = np.hypot(3, 1)
    points = ",".join(f"(0.00,{0.5 * speed * k:.2f})" for k in range(1, 7))
    assert f"[{points}]" in car.reference
    walker = next(c for c in conversations if c.meta["class"] == "pedestrian")
    assert walker.reference.count("UN,UN") == 3
    known = [x is not None for x, _ in json.loads(walker.meta["driven"])]
    assert known == parse_future(walker.reference).known.tolist()
    # What metrics compare with is no text: a text of one decimal says 1.6 m.
    rough = AgentTrajectoriesConfig(root=str(root)).build(None, Dialect("compact"))
    told = next(rough.conversations("train"))
    driven = [[0.0, round(0.5 * speed * k, 3)] for k in range(1, 7)]
    assert np.abs(np.array(json.loads(told.meta["driven"])) - driven).max() < 1e-3
    assert "(0.0,1.6)" in told.reference
    # Nothing is asked about agents that are not seen again.
    last = data.index.frames[8].token
    assert not [c for c in conversations if c.sample_token == last]


def test_alignment_covers_the_streams(root, build):
    data = build(AlignmentConfig, root)
    kinds = [c.kind for c in data.conversations("train")]
    assert kinds.count("caption_map") == kinds.count("caption_scene") == 13
    assert kinds.count("caption_object") == len(
        list(build(TOD3CapConfig, root).conversations("train"))
    )
    assert "2 edges of the road" in map_text((0, 1, 2))
    assert map_text((0, 1, 2)).startswith(
        "Around the car there are no lane or road dividers, 1 ped"
    )
    scene = next(c for c in data.conversations("train") if c.kind == "caption_scene")
    assert scene.reference == "A train road 0. A train road 1."
    only_map = build(AlignmentConfig, root, streams=("map",))
    assert {c.kind for c in only_map.conversations("val")} == {"caption_map"}


def test_batches_hold_their_conversations(root, build):
    data = build(MixtureConfig, root, conversations_per_frame=3, eval_conversations_per_frame=2)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert len(batch.talk.conversations) == 3 * len(batch.valid)
        for row, conversation in zip(batch.talk.frame_index, batch.talk.conversations, strict=True):
            assert batch.clip[-1].sample_tokens[int(row)] == conversation.sample_token
    thinned = build(MixtureConfig, root, eval_conversations_per_frame=2, eval_frames_stride=3)

    def evaluated(seed):
        thinned = build(
            MixtureConfig, root, eval_conversations_per_frame=2, eval_frames_stride=3, seed=seed
        )
        talks = [batch.talk for batch in thinned.test_dataloader() if batch.talk is not None]
        return [c.id for talk in talks for c in talk.conversations]

    assert evaluated(0) == evaluated(1)
    positions = [k for s in thinned.scenes("val") for k in range(2, s.last - s.first, 3)]
    assert len(evaluated(0)) == 2 * len(positions)


def test_all_conversations_are_visited(root, build):
    data = build(MixtureConfig, root, conversations_per_frame=3)
    picker = data.picker("train")
    visited = {c for epoch in range(3) for c in picker.train(5, 0, epoch)}
    assert visited == set(range(8))
    every = Picker(data.index, picker.frames, picker.source, per_frame=3, every=True)
    items = every.items()
    assert len(items) == 13 * 3
    seen = [(frame, c) for frame, part in items for c in every.train(frame, part, epoch=7)]
    assert sorted(seen) == [(frame, c) for frame in range(13) for c in range(8)]


def test_only_whole_futures_and_cached_egos(root, build):
    data = build(GPTDriverConfig, root, whole_futures_only=True, ego_from_cache=True)
    assert len(list(data.conversations("train"))) == 3
    assert len(list(data.conversations("val"))) == 13
    conversation = next(data.conversations("train"))
    assert conversation.meta["command"] == "turn right"  # the cache says so, the poses do not
    ego = next(iter(data.plans("train").records.values()))[0].ego()
    np.testing.assert_array_equal(ego.velocity[0], [0, 1])
    assert (ego.yaw_rate.item(), ego.heading_speed.item(), ego.steering.item()) == (4, 7, 8)


def test_a_question_needs_a_tokenizer(root):
    data = NuXConfig(str(root), image_size=(16, 9)).build()
    with pytest.raises(UserError, match="NuXDataModule needs a tokenizer"):
        data.train_dataloader()


def test_left_out_objects_and_whole_futures_are_counted(root, build):
    """The hand-made root: per key-frame a car and sometimes a walker count, three others do not."""
    data = build(TOD3CapConfig, root)
    objects = len(list(data.conversations("train")))
    (report,) = data.join_reports("train")
    index = data.index
    split = [index.scenes[index.frames[f].scene].split for f in index.annotations.frame]
    assert report.records == len(split)
    counts = {left.reason: left.count for left in report.left_out}
    assert counts.pop("its sample belongs to the val split") == split.count("val")
    assert list(counts.values()) == [split.count("train") - objects]
    assert report.joined == objects
    data = build(GPTDriverConfig, root, whole_futures_only=True)
    data.source("train")
    cache, listing = data.join_reports("train")
    assert (cache.joined, listing.records, listing.joined) == (3, 3, 3)
    assert {left.reason: left.count for left in cache.left_out} == {
        "its sample belongs to the val split": 13,
        "split.json does not list it for training": 10,
    }


def test_a_view_that_a_question_has_is_told(root, tmp_path, build):
    """BEV-LLM's variant of nuCaption."""
    records = json.loads((root / "language/nucaption/train.json").read_text())
    records = [record for record in records if record["sample_token"] != "of-another-root"]
    for record in records[::2]:
        record["view"] = "front left"
    name = "nuCaptionLidarView_{}.json"
    (tmp_path / name.format("train")).write_text(json.dumps(records))
    files = (name.format("train"), name.format("val"))
    data = build(NuCaptionConfig, root, language_root=str(tmp_path), nucaption_files=files)
    told = [conversation.meta.get("view", "") for conversation in data.conversations("train")]
    assert sorted(told) == sorted(record.get("view", "") for record in records)
    assert describe(data, "train").counts["view"] == {"front left": -(-len(records) // 2)}
