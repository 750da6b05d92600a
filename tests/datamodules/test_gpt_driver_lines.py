"""GPT-Driver's fine-tuning lines in hand-written files: read, joined, thought over, refused."""

import json
import pickle

import numpy as np
import pytest

from datamodules.gpt_driver import GPTDriverConfig
from datamodules.gpt_driver_lines import Forecast, Notable, read_lines
from datamodules.gpt_driver_thoughts import BY_ORDER, DOUBLED, NOBODY, NOT_CACHED, SEVERAL
from datamodules.index_file import load_index
from odvla.errors import UserError
from odvla.language.decisions import all_decisions, meta_action_of
from odvla.language.prompts import Dialect, answers_of

USER = """
Perception and Prediction:
 - car at (-1.73,9.40), moving to (-1.60,18.05).
 - pushable_pullable at (7.00,-0.20), moving to unknown location.
Ego-States:
 - Velocity (vx,vy): (-0.00,4.01)
 - Heading Angular Velocity (v_yaw): (0.01)
 - Acceleration (ax,ay): (0.05,-0.36)
 - Can Bus: (-0.24,1.93)
 - Heading Speed: (4.07)
 - Steering: (-1.31)
Historical Trajectory (last 2 seconds): \
[(-0.40,-16.30), (-0.21,-12.00), (-0.10,-8.01), (-0.02,-4.00)]
Mission Goal: LEFT
"""
ASSISTANT = """Thoughts:
 - Notable Objects from Perception: car at (-1.73,9.40)
   Potential Effects from Prediction: \
within the safe zone of the ego-vehicle at the 1.0-second timestep
 - Notable Objects from Perception: adult at (0.00,12.00)
   Potential Effects from Prediction: \
within the safe zone of the ego-vehicle at the 2.5-second timestep
Meta Action: CHANE LANE TO LEFT WITH A DECELERATION
Trajectory:
[(-0.05,3.70), (-0.31,7.02), (-0.80,9.99), (-1.41,12.60), (-2.10,14.85), (-2.90,16.80)]"""


def written(user=USER, assistant=ASSISTANT, roles=("system", "user", "assistant")):
    texts = dict(zip(("system", "user", "assistant"), ("Drive.", user, assistant), strict=True))
    return {"messages": [{"role": role, "content": texts[role]} for role in roles]}


def put(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_a_line_is_read_whole(tmp_path):
    (line,) = read_lines(put(tmp_path / "train.json", [written()]))
    assert (line.number, line.system) == (1, "Drive.")
    assert line.objects == (
        Forecast("car", (-1.73, 9.40), (-1.60, 18.05)),
        Forecast("pushable_pullable", (7.0, -0.2), None),
    )
    assert line.states.tolist() == [0, 4.01, 0.01, 0.05, -0.36, -0.24, 1.93, 4.07, -1.31]
    assert line.history.tolist() == [[-0.4, -16.3], [-0.21, -12], [-0.1, -8.01], [-0.02, -4]]
    assert line.command == 1
    assert line.waypoints[0].tolist() == [-0.05, 3.7]
    assert line.waypoints[5].tolist() == [-2.9, 16.8]
    effect = "within the safe zone of the ego-vehicle at the {}-second timestep"
    assert line.notable == (
        Notable("car", (-1.73, 9.4), effect.format("1.0")),
        Notable("adult", (0.0, 12.0), effect.format("2.5")),
    )
    said = line.thoughts.split("\n")
    assert said[0] == "Notable Objects from Perception: car at (-1.73,9.40)"
    assert said[3] == f"Potential Effects from Prediction: {effect.format('2.5')}"
    assert line.decision == "change lane to left with a deceleration."


def test_nothing_around_and_nothing_to_think_of(tmp_path):
    user = "\n".join(row for row in USER.split("\n") if "moving to" not in row)
    assistant = "\n".join(
        [
            "Thoughts:",
            " - Notable Objects from Perception: None",
            "   Potential Effects from Prediction: None",
            "Meta Action: STOP",
            "Trajectory:",
            "[(0.00,-0.00), (-0.00,0.00), (-0.00,0.00), (0.00,0.00), (0.00,0.01), (0.00,0.02)]",
        ]
    )
    path = put(tmp_path / "train.json", [written(user, assistant), "", written(), ""])
    bare, full = read_lines(path)
    assert (bare.objects, bare.notable, bare.decision) == ((), (), "stop.")
    assert bare.thoughts.endswith("Potential Effects from Prediction: None")
    assert (full.number, full.command) == (3, 1)


def test_every_meta_action_is_known_in_both_spellings(tmp_path):
    told = [text.removesuffix(".").upper() for text in all_decisions("gpt_driver")]
    told += ["CHANE LANE TO LEFT WITH A CONSTANT SPEED"]
    action = "CHANE LANE TO LEFT WITH A DECELERATION"
    lines = [written(assistant=ASSISTANT.replace(action, text)) for text in told]
    found = [line.decision for line in read_lines(put(tmp_path / "train.json", lines))]
    expected = (*all_decisions("gpt_driver"), "change lane to left with a constant speed.")
    assert found == list(expected)


def damaged(of, old, new):
    text = {"user": USER, "assistant": ASSISTANT}[of]
    assert old in text
    return written(**{of: text.replace(old, new)})


DAMAGE = {
    "not JSON": ('{"messages": [', r"line 2 is not JSON"),
    "a list": ([written()], "expected an object with a list 'messages'"),
    "no messages": ({"prompt": "a"}, "expected an object with a list 'messages'"),
    "a key twice": ('{"messages": [], "messages": []}', "the key 'messages' twice"),
    "a role missing": (
        written(roles=("system", "assistant")),
        "field 'messages' must be those of system, user, assistant",
    ),
    "roles in another order": (written(roles=("user", "system", "assistant")), "field 'messages'"),
    "messages of text": ({"messages": ["a", "b", "c"]}, "expected an object with 'role'"),
    "an empty content": (written(user=" "), "field 'content' must be a text"),
    "no objects": (damaged("user", "Perception and", "Reception and"), "field 'user' must be"),
    "no states": (damaged("user", "Ego-States:", "States:"), "a text with 'Ego-States:'"),
    "an object without a goal": (
        damaged("user", ", moving to unknown location.", "."),
        "field 'user.Perception and Prediction'.*'- pushable_pullable at",
    ),
    "an object of one number": (
        damaged("user", "(-1.60,18.05)", "(-1.60)"),
        "field 'user.Perception and Prediction'",
    ),
    "a state of another name": (
        damaged("user", "Can Bus", "CAN"),
        r"field 'user.Can Bus' must be a line that begins with '- Can Bus:' .*not '- CAN:",
    ),
    "a number missing in a state": (
        damaged("user", "(-0.24,1.93)", "(-0.24)"),
        r"field 'user.Can Bus' must be numbers of two decimals .*2 of them, not '\(-0.24\)'",
    ),
    "a number that is none": (
        damaged("user", "(4.07)", "(nan)"),
        "field 'user.Heading Speed' must be numbers .* 1 of them, not '.nan.'",
    ),
    "three points of history": (
        damaged("user", "(-0.40,-16.30), ", ""),
        r"field 'user.Historical Trajectory \(last 2 seconds\)' must be 4 points .*not '3 in",
    ),
    "an unknown goal": (
        damaged("user", "Goal: LEFT", "Goal: BACK"),
        "field 'user.Mission Goal' must be one of RIGHT, LEFT, FORWARD, not 'BACK'",
    ),
    "no goal": (damaged("user", "Mission Goal: LEFT\n", ""), "field 'user.Mission Goal'"),
    "more behind the goal": (
        damaged("user", "Goal: LEFT", "Goal: LEFT\nDrive well."),
        "a text that ends with its 'Mission Goal', not 'Drive well.'",
    ),
    "the plan alone": (
        written(assistant=ASSISTANT.split("\n")[-1]),
        "field 'assistant' must be a text that begins with 'Thoughts:'",
    ),
    "no plan": (damaged("assistant", "Trajectory:", "Path:"), "field 'assistant' must be thoughts"),
    "seven points": (
        damaged("assistant", "(-2.90,16.80)", "(-2.90,16.80), (-3.00,18.00)"),
        "field 'assistant.Trajectory' must be 6 points .*not '7 in",
    ),
    "points of one decimal": (
        damaged("assistant", "(-0.05,3.70)", "(-0.05,3.7)"),
        "field 'assistant.Trajectory' must be 6 points",
    ),
    "an unknown action": (
        damaged("assistant", "A DECELERATION", "CARE"),
        "field 'assistant.Meta Action' must be one of GPT-Driver's .*WITH CARE'",
    ),
    "an object without a place": (
        damaged("assistant", "adult at (0.00,12.00)", "adult"),
        "field 'assistant.Notable Objects from Perception'",
    ),
    "an object without an effect": (
        damaged("assistant", "   Potential Effects from Prediction", "   Effects"),
        "field 'assistant.Potential Effects from Prediction'",
    ),
    "nothing among things": (
        damaged("assistant", "adult at (0.00,12.00)", "None"),
        "field 'assistant.Notable Objects from Perception'",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, name):
    line, message = DAMAGE[name]
    text = line if isinstance(line, str) else json.dumps(line)
    path = put(tmp_path / "train.json", [written(), text, written()])
    with pytest.raises(UserError, match=rf"train\.json.*{message}") as caught:
        list(read_lines(path))
    assert "line 2" in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"file .*train\.json does not exist"):
        list(read_lines(tmp_path / "train.json"))
    (tmp_path / "train.json").write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(UserError, match="is not text in UTF-8"):
        list(read_lines(tmp_path / "train.json"))


# The join, on a root whose key-frames all have numbers of their own, but for two that stand.
STANDING = (2, 3)


def info(frame):
    speed = 0.0 if frame in STANDING else 2.0 + 0.37 * frame
    bend = 0.0 if frame in STANDING else 0.05 * (frame - 12)
    steps = np.arange(7)
    future = np.stack([bend * steps**2 / 6, speed * steps * 0.9], axis=1).astype(np.float32)
    history = np.stack([0 * steps[:5], speed * (steps[:5] - 4.0)], axis=1).astype(np.float32)
    lcf = np.array([0, 2 * speed, 0.125 * frame, 0.5, 0, 4.084, 1.85, 2 * speed, 0.1], np.float32)
    if frame in STANDING:
        lcf[2] = 0.0
    x = future[6, 0]
    return {
        "gt_ego_his_trajs": history,
        "gt_ego_his_diff": np.diff(history, axis=0),
        "gt_ego_fut_trajs": future,
        "gt_ego_fut_diff": np.diff(future, axis=0),
        "gt_ego_fut_masks": np.ones(6, np.float32),
        "gt_ego_fut_cmd": np.array([x >= 2, x <= -2, abs(x) < 2], np.float32),
        "gt_ego_lcf_feat": lcf,
    }


def line_of(cached):
    """The line of a key-frame, worded here once more."""

    def path(points):
        return "[" + ", ".join(f"({x:.2f},{y:.2f})" for x, y in points) + "]"

    lcf, steps = cached["gt_ego_lcf_feat"], cached["gt_ego_his_diff"]
    ax, ay = steps[-1] - steps[-2]
    goal = ("RIGHT", "LEFT", "FORWARD")[int(cached["gt_ego_fut_cmd"].argmax())]
    plan = cached["gt_ego_fut_trajs"][1:]
    action = meta_action_of(plan, steps[-1]).removesuffix(".").upper()
    user = (
        "\nPerception and Prediction:\nEgo-States:\n"
        f" - Velocity (vx,vy): ({lcf[0] / 2:.2f},{lcf[1] / 2:.2f})\n"
        f" - Heading Angular Velocity (v_yaw): ({lcf[4]:.2f})\n"
        f" - Acceleration (ax,ay): ({ax:.2f},{ay:.2f})\n"
        f" - Can Bus: ({lcf[2]:.2f},{lcf[3]:.2f})\n"
        f" - Heading Speed: ({lcf[7] / 2:.2f})\n"
        f" - Steering: ({lcf[8]:.2f})\n"
        f"Historical Trajectory (last 2 seconds): {path(cached['gt_ego_his_trajs'][:4])}\n"
        f"Mission Goal: {goal}\n"
    )
    assistant = (
        "Thoughts:\n - Notable Objects from Perception: None\n"
        "   Potential Effects from Prediction: None\n"
        f"Meta Action: {action}\nTrajectory:\n{path(plan)}"
    )
    return written(user, assistant)


@pytest.fixture(scope="module")
def root(circles, tmp_path_factory):
    return circles.write_root(tmp_path_factory.mktemp("lines"))


@pytest.fixture(scope="module")
def tokens(root):
    """Of the train scenes and of the val scenes, in the order of the index."""
    index = load_index(root, "v1.0-mini")
    return {
        split: [f.token for s in index.scenes_of(split) for f in index.frames[s.first : s.last]]
        for split in ("train", "val")
    }


@pytest.fixture
def files(tmp_path, tokens):
    """Writes the three files; what is not given is as create_data.py would have it."""
    known = {token: info(n) for n, token in enumerate(tokens["train"] + tokens["val"])}

    def write(listed=None, lines=None, cached=None):
        folder = tmp_path / "gpt_driver"
        folder.mkdir(exist_ok=True)
        listed = tokens["train"] if listed is None else listed
        lines = listed if lines is None else lines
        cached = list(known) if cached is None else cached
        (folder / "split.json").write_text(json.dumps({"train": listed, "val": tokens["val"]}))
        content = {token: known[token] for token in cached}
        (folder / "cached_nuscenes_info.pkl").write_bytes(pickle.dumps(content))
        told = [line_of(known[line]) if isinstance(line, str) else line for line in lines]
        put(folder / "train.json", told)
        return tmp_path

    return write


def build(root, language, **changes):
    config = GPTDriverConfig(
        str(root),
        image_size=(16, 9),
        language_root=str(language),
        conversations_file="gpt_driver/train.json",
        **changes,
    )
    return config.build(None, Dialect("reasoning"))


def joined(data):
    """Tokens with thoughts, and the report about the lines."""
    found = [c.sample_token for c in data.conversations("train")]
    (report,) = (r for r in data.join_reports("train") if r.file.name == "train.json")
    return found, report


def left(report):
    return {part.reason: (part.count, part.example) for part in report.left_out}


def test_lines_are_joined_in_the_order_of_the_list(root, files, tokens):
    train = tokens["train"]
    found, report = joined(build(root, files()))
    assert found == train  # those that stand alike, too
    assert (report.records, report.joined, report.how) == (13, 13, BY_ORDER)
    listed = train[::-1][:8]
    found, report = joined(build(root, files(listed=listed)))
    assert sorted(found) == sorted(listed)
    # create_data.py may take the first part of the list only.
    found, report = joined(build(root, files(lines=train[:5])))
    assert (found, report.joined, report.how) == (train[:5], 5, BY_ORDER)


def test_lines_in_another_order_are_joined_by_their_numbers(root, files, tokens):
    train = tokens["train"]
    order = [7, 2, 0, 12, 3, 5]
    found, report = joined(build(root, files(lines=[train[n] for n in order])))
    assert sorted(found) == sorted(train[n] for n in (7, 0, 12, 5))
    assert left(report) == {SEVERAL: (2, "line 2")}
    assert "line 1 does not have those of its token" in report.how
    assert f"(train, by their numbers: {report.how.split(': ')[1]})" in str(report)


def test_every_line_arrives_at_its_own_key_frame(root, files, tokens):
    train = tokens["train"]
    data = build(root, files(lines=train[::-1]))
    index = data.index
    for conversation in data.conversations("train"):
        number = index.number_of_token[conversation.sample_token]
        cached = info(train.index(conversation.sample_token))
        record = data.plans("train").records[number][0]
        np.testing.assert_array_equal(record.waypoints, cached["gt_ego_fut_trajs"][1:])
        told = meta_action_of(cached["gt_ego_fut_trajs"][1:], cached["gt_ego_his_diff"][-1])
        assert conversation.meta["decision"] == told


def test_what_does_not_join_is_counted(root, files, tokens):
    train = tokens["train"]
    # A line of which somebody changed a number.
    lines = [*train[4:6], line_of(info(6)), *train[7:]]
    text = lines[2]["messages"][2]["content"]
    lines[2]["messages"][2]["content"] = text.replace(",3.80)", ",3.82)")
    found, report = joined(build(root, files(listed=train[4:], lines=lines)))
    assert found == train[4:6] + train[7:]
    assert left(report) == {NOBODY: (1, "line 3")}
    # A line that stands twice in the file.
    found, report = joined(build(root, files(listed=train[4:], lines=[*train[4:], train[5]])))
    assert found == train[4:]
    assert left(report) == {DOUBLED: (1, "line 10")}
    # A token twice in the list, and one that the cache does not have.
    listed = [*train, train[0]]
    found, report = joined(build(root, files(listed=listed, cached=[*train[:5], *train[6:]])))
    assert found == train[:5] + train[6:]
    assert left(report) == {NOT_CACHED: (1, "line 6"), DOUBLED: (1, "line 14")}
    cache = build(root, files(lines=train[:3])).join_reports("train")[0]
    assert left(cache)["no line of GPT-Driver's tells what to think of it"] == (10, train[3])


@pytest.mark.parametrize("by", ["order", "numbers"])
def test_training_lines_of_evaluation_scenes_are_refused(root, files, tokens, by):
    train, val = tokens["train"], tokens["val"]
    lines = [*train[4:7], val[0], *train[7:]]
    listed = lines if by == "order" else train[4:]
    language = files(listed=listed, lines=lines)
    scene = "scene-0103"
    message = rf"train\.json, line 4: a training record is about {scene}, a scene of the val split"
    with pytest.raises(UserError, match=message):
        build(root, language).source("train")
    found, report = joined(build(root, language, leaks="leave_out"))
    assert found == train[4:]
    assert left(report) == {"its sample belongs to the val split": (1, "line 4")}


def test_lines_of_other_data_are_refused(root, files, tokens):
    language = files(lines=[written()] * 3)
    with pytest.raises(UserError, match="none of its 3 records belongs to a sample of the train"):
        build(root, language).source("train")
    language = files(lines=[])
    with pytest.raises(UserError, match=r"train\.json holds no line"):
        build(root, language).source("train")


def test_a_plan_is_thought_over_as_its_line_does(root, files, tokens):
    """Prompt and plan stay ours; only what is said between them is the line's."""
    train, val = tokens["train"], tokens["val"]
    lines = [line_of(info(n)) for n in range(len(train))]
    lines[5]["messages"][2]["content"] = (
        lines[5]["messages"][2]["content"]
        .replace("Perception: None", "Perception: bicycle at (0.10,4.00)")
        .replace("Prediction: None", "Prediction: it may come closer")
    )
    data = build(root, files(lines=lines))
    plain = GPTDriverConfig(
        str(root), image_size=(16, 9), language_root=data.config.language_root
    ).build(None, Dialect("reasoning"))
    whole = {c.sample_token: c for c in data.conversations("train")}
    for conversation in plain.conversations("train"):
        thought = whole[conversation.sample_token]
        assert thought.reference == conversation.reference
        assert thought.turns[0].text.removesuffix("describe") == (
            conversation.turns[0].text.removesuffix("plan<trajectory>")
        )
    said = answers_of(whole[train[5]].turns)
    assert said[0] == (
        "Notable Objects from Perception: bicycle at (0.10,4.00)\n"
        "Potential Effects from Prediction: it may come closer"
    )
    assert said[1:] == [whole[train[5]].meta["decision"], whole[train[5]].reference]
    assert whole[train[5]].meta["thoughts"] == "gpt_driver"
    # GPT-Driver has no lines of val: what it would think is not made up.
    evaluated = {c.sample_token: c for c in data.conversations("val")}
    assert list(evaluated) == val
    description, decision, plan = answers_of(evaluated[val[0]].turns)
    cached = info(len(train))
    assert description is None
    assert decision == meta_action_of(cached["gt_ego_fut_trajs"][1:], (0, 2 + 0.37 * 13))
    assert plan == evaluated[val[0]].reference
    asked = data.plan_request(val[0])
    assert asked.meta["thoughts"] == "gpt_driver"
    requests = [turn.text for turn in evaluated[val[0]].turns if turn.role == "user"]
    assert [turn.text for turn in asked.turns if turn.role == "user"] == requests
