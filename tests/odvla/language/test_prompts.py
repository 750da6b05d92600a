"""What a dialect says: the paper's requests to the letter, nothing hidden, mistakes named."""

import json

import pytest
import torch
import yaml

from odvla.errors import UserError
from odvla.language.prompts import KINDS, Dialect
from odvla.language.waypoints import format_waypoints
from odvla.types import EgoState


def ego_state(**changes):
    fields = {
        "velocity": [[0.5, 3.25]],
        "yaw_rate": [0.125],
        "acceleration": [[-0.001, 0.75]],
        "can_accel": [[0.25, 9.81]],
        "heading_speed": [6.5],
        "steering": [-1.5],
        "history": [[[-4.0, -3.0], [-2.0, -2.0], [-1.0, -1.0], [0.0, -0.5]]],
    }
    tensors = {name: torch.tensor(value) for name, value in (fields | changes).items()}
    return EgoState(**tensors, command=torch.tensor([1]))


def test_the_reference_dialect_words_plans_as_the_released_code_does(shared):
    records = json.loads((shared / "golden" / "j_prompts.json").read_text())["records"]
    for case in records:
        record = case["record"]
        lcf = record["gt_ego_lcf_feat"]
        steps = torch.tensor(record["gt_ego_his_diff"], dtype=torch.float64)
        ego = EgoState(
            velocity=torch.tensor([lcf[:2]], dtype=torch.float64),
            yaw_rate=torch.tensor([lcf[4]], dtype=torch.float64),
            acceleration=(steps[-1] - steps[-2])[None],
            can_accel=torch.tensor([lcf[2:4]], dtype=torch.float64),
            heading_speed=torch.tensor([lcf[7]], dtype=torch.float64),
            steering=torch.tensor([lcf[8]], dtype=torch.float64),
            history=torch.tensor([record["gt_ego_his_trajs"][:4]], dtype=torch.float64),
            command=torch.tensor([int(torch.tensor(record["gt_ego_fut_cmd"]).argmax())]),
        )
        system, user, assistant = Dialect().turns(
            "plan", format_waypoints(record["gt_ego_fut_trajs"][1:]), ego
        )
        assert (system.role, user.role, assistant.role) == ("system", "user", "assistant")
        assert user.text == case["question"]
        assert assistant.text == case["answer"].replace("-0.00", "0.00")


def test_the_compact_dialect_tells_everything_a_plan_needs():
    (user,) = Dialect("compact").turns("plan", None, ego_state())
    assert user.text.endswith("<EGO>v(0.50,3.25)\ngoal turn left\nplan<trajectory>")


@pytest.mark.parametrize("name", ["reference", "compact"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_question_and_object_and_never_its_answer(name, kind):
    turns = Dialect(name).turns(kind, "the answer", ego_state(), "Is it raining?")
    user = turns[-2].text
    assert turns[-1].text == "the answer"
    assert "the answer" not in user
    assert ("Is it raining?" in user) == (kind in ("caption", "qa", "narration", "text"))
    assert ("<OBJECT>" in user) == (kind in ("agent", "caption_object"))
    assert "{" not in user


def test_an_ablation_leaves_its_part_out_and_nothing_else():
    whole = Dialect().request("plan", ego_state()).splitlines()
    for part, start in (
        ("ego", "Ego states"),
        ("history", "Historical"),
        ("command", "Mission"),
    ):
        lines = Dialect(without=(part,)).request("plan", ego_state()).splitlines()
        assert lines == [line for line in whole if not line.startswith(start)]


def test_object_captions_tell_the_place():
    text = Dialect().object_caption_answer("A red car is parked.", -20.149, 41.87)
    assert text == "A red car is parked. The BEV coordinate is (-20.15,41.87)."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed_scale": "fast"}, "speed_scale must be a float"),
        ({"more": 1}, "no others"),
        ({"requests": {"plan": ["scene"]}}, "requests must be plan"),
        ({"lines": {"scene": "{velocity}"}}, "unknown {velocity}"),
        ({"lines": {"scene": "{vx"}}, "unbalanced braces"),
        ({"lines": {}}, "uses unknown line 'scene'"),
        ({"answers": {"caption_object": "{caption}"}}, "must tell caption, x and y"),
        ({"plan": {"values": "points"}}, "plan must tell values and decimals"),
        ({"plan": {"values": "curves", "decimals": 2}}, "not 'curves'"),
        ({"plan": {"values": "steps", "decimals": 3}}, "1 or 2 decimals, not 3"),
    ],
)
def test_a_mistake_in_a_dialect_file_is_named(tmp_path, change, message):
    content = {
        "system": "",
        "lines": {"scene": "<SCENE>"},
        "requests": {kind: ["scene"] for kind in KINDS},
        "answers": {"caption_object": "{caption}{x}{y}"},
        "speed_scale": 1.0,
        "signed_zero": False,
        "plan": {"values": "points", "decimals": 2},
    }
    good = tmp_path / "good.yaml"
    good.write_text(yaml.safe_dump(content))
    assert Dialect(str(good)).request("qa", None) == "<SCENE>"
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(content | change))
    with pytest.raises(UserError, match=f"bad.yaml.*{message}"):
        Dialect(str(bad))


def test_what_cannot_be_said_is_refused():
    with pytest.raises(UserError, match="'klingon' is neither a file nor one of compact, refer"):
        Dialect("klingon")
    with pytest.raises(UserError, match="not 'vision'"):
        Dialect(without=("vision",))
    with pytest.raises(UserError, match="'history', which dialect 'compact' does not tell"):
        Dialect("compact", without=("history",))
    with pytest.raises(UserError, match="no request of kind 'song'"):
        Dialect().turns("song", None, ego_state())
    with pytest.raises(UserError, match="ego state, which is missing"):
        Dialect().turns("plan", None, None)
