"""What a dialect says: units as named, nothing hidden, mistakes named."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from odvla.errors import UserError
from odvla.language import dialect_file
from odvla.language.dialect_file import ASKED_LIKE, shipped_dialects, write_dialect
from odvla.language.dialect_file import KINDS as ALL_KINDS
from odvla.language.prompts import THINKING, Dialect, PlanDialect, answers_of
from odvla.types import EgoState

KINDS = tuple(kind for kind in ALL_KINDS if kind not in THINKING)

UNITS = {"velocity": "m/s", "heading_speed": "m/s", "acceleration": "m/s^2"}
TRAINING = {"labels": "answer_only", "doubled_system_head": False, "default_system": ""}


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


def test_the_default_dialect_tells_the_car_state_in_the_units_it_names():
    system, user = Dialect().turns("plan", None, ego_state())
    assert system.role == "system"
    motion = next(line for line in user.text.splitlines() if line.startswith("Own motion"))
    # EgoState's acceleration is metres a step and step: 4 times as much in m/s2.
    assert "velocity (0.50,3.25) m/s" in motion
    assert "acceleration (0.00,3.00) m/s2" in motion
    assert "speed 6.50 m/s" in motion
    assert "[(-4.00,-3.00),(-2.00,-2.00),(-1.00,-1.00),(0.00,-0.50)]" in user.text
    assert user.text.endswith("Wanted: turn left\nYour plan: <trajectory>")


def test_units_commands_and_signed_zeros_are_the_files(tmp_path):
    content = dict(Dialect().wording.content)
    units = {"velocity": "m/(0.5 s)", "heading_speed": "m/s", "acceleration": "m/(0.5 s)^2"}
    content |= {"units": units, "signed_zero": True, "commands": ["a", "b", "c"]}
    write_dialect(content, tmp_path / "odd.yaml")
    dialect = Dialect(str(tmp_path / "odd.yaml"))
    fields = dialect.ego_fields(ego_state())
    assert (fields["vx"], fields["vy"], fields["speed"]) == ("0.25", "1.62", "6.50")
    assert (fields["ax"], fields["ay"]) == ("-0.00", "0.75")
    assert fields["command"] == "b"
    plan = [[-0.001, 1.0]] * 6
    assert dialect.plan_answer(plan, (0.0, 0.0)).count("(-0.00,1.00)") == 6
    assert Dialect().plan_answer(plan, (0.0, 0.0)).count("(0.00,1.00)") == 6


def test_no_text_of_the_paper_is_shipped(shared):
    case = json.loads((shared / "golden" / "j_prompts.json").read_text())
    theirs = {line.strip(" -:") for line in case["system_prompt"].splitlines()}
    theirs |= {re.split(r"[:(]", line)[0] for line in case["records"][0]["question"].splitlines()}
    theirs = {text for text in theirs if len(text.split()) > 1}
    for name in shipped_dialects():
        text = (Path(dialect_file.__file__).parent / f"{name}.yaml").read_text()
        assert [line for line in theirs if line in text] == []


def test_the_compact_dialect_tells_everything_a_plan_needs():
    (user,) = Dialect("compact").turns("plan", None, ego_state())
    assert user.text.endswith("<EGO>v(0.50,3.25)\ngoal turn left\nplan<trajectory>")


@pytest.mark.parametrize("name", ["odvla", "compact", "reasoning"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_question_and_object_and_never_its_answer(name, kind):
    turns = Dialect(name).turns(kind, "the answer", ego_state(), "Is it raining?")
    user = turns[-2].text
    assert turns[-1].text == "the answer"
    assert "the answer" not in user
    asks = ASKED_LIKE.get(kind, kind) in ("caption", "qa", "narration", "text")
    assert ("Is it raining?" in user) == asks
    assert ("<OBJECT>" in user) == (kind in ("agent", "caption_object"))
    assert "{" not in user


def test_drivelm_is_asked_like_captions_until_a_dialect_words_it(tmp_path):
    shipped = Dialect("compact")
    asked = [shipped.request(kind, ego_state(), "Safe?") for kind in ("drivelm", "caption")]
    assert asked[0] == asked[1]
    content = dict(shipped.wording.content)
    content["requests"] = content["requests"] | {"drivelm": ["scene", "question"]}
    write_dialect(content, tmp_path / "own.yaml")
    own = Dialect(str(tmp_path / "own.yaml"))
    assert own.request("drivelm", None, "Safe?") == "<scene_start><SCENE><scene_end>\nSafe?"
    assert own.request("omnidrive", ego_state(), "Safe?") == asked[1]
    del content["requests"]["caption"], content["requests"]["drivelm"]
    write_dialect(content, tmp_path / "mute.yaml")
    with pytest.raises(UserError, match="no request of kind 'drivelm'"):
        Dialect(str(tmp_path / "mute.yaml")).request("drivelm", ego_state(), "Safe?")


def test_a_plan_that_is_thought_over_is_three_requests_and_their_answers():
    dialect = Dialect("reasoning")
    whole = dialect.thinking_turns(("A road.", "stop, go straight.", "the plan"), ego_state())
    assert [turn.role for turn in whole] == ["user", "assistant"] * 3
    first, second, third = (turn.text for turn in whole[::2])
    assert "<SCENE>" in first
    assert "v(0.50,3.25)" in first
    assert first.endswith("describe")
    assert "<SCENE>" not in second + third
    for known in range(3):
        turns = dialect.thinking_turns(("A road.", "stop, go straight.")[:known], ego_state())
        assert turns == whole[: 2 * known + 1]  # the request for what is not known, no answer
    # What is not known, among what is, is left out; its request is not.
    gap = dialect.thinking_turns((None, "stop, go straight.", "the plan"), ego_state())
    assert gap == whole[:1] + whole[2:]
    assert answers_of(gap) == [None, "stop, go straight.", "the plan"]
    assert answers_of(whole[:5]) == ["A road.", "stop, go straight.", None]
    silent = Dialect("reasoning", without=("ego",)).thinking_turns((), ego_state())
    assert "v(" not in silent[0].text
    with pytest.raises(UserError, match="'compact' has no request of kind 'describe'"):
        Dialect("compact").thinking_turns((), ego_state())


def test_another_form_of_plans_leaves_prompts_alone_and_is_refused_in_its_place():
    own, offsets = Dialect("compact"), PlanDialect("compact", values="offsets")
    assert own.request("plan", ego_state()) == offsets.request("plan", ego_state())
    assert offsets.plan_form.decimals == own.plan_form.decimals
    assert offsets.plan_answer([[0, k] for k in range(1, 7)], (0, 0)).count("(0.0,1.0)") == 6
    offsets.check_same(offsets.identity(), "it")
    with pytest.raises(UserError, match="it has learned to write plans as offsets of 1 decimals"):
        own.check_same(offsets.identity(), "it")
    older = {k: v for k, v in own.identity().items() if k != "plan"}
    offsets.check_same(older, "it")  # cards from before told nothing about it


def test_an_ablation_leaves_its_part_out_and_nothing_else():
    whole = Dialect().request("plan", ego_state()).splitlines()
    for part, start in (
        ("ego", "Own motion"),
        ("history", "Own places"),
        ("command", "Wanted"),
    ):
        lines = Dialect(without=(part,)).request("plan", ego_state()).splitlines()
        assert lines == [line for line in whole if not line.startswith(start)]


def test_object_captions_tell_the_place():
    text = Dialect().object_caption_answer("A red car is parked.", -20.149, 41.87)
    assert text == "A red car is parked. It is at (-20.15,41.87)."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signed_zero": "yes"}, "signed_zero must be a bool"),
        ({"units": {"velocity": "m/s"}}, "units must be those of velocity"),
        ({"units": UNITS | {"velocity": "km/h"}}, "velocity is m/s or m/.0.5 s., not 'km/h'"),
        ({"commands": ["left", "right"]}, "commands must be 3 texts"),
        ({"training": {"labels": "all"}}, "training must tell labels"),
        ({"training": TRAINING | {"labels": "all"}}, "answer_only or reference, not 'all'"),
        ({"more": 1}, "no others"),
        ({"requests": {"qa": ["scene"]}}, "requests must be plan"),
        ({"requests": {"plan": ["scene"], "song": ["scene"]}}, "requests must be plan"),
        ({"lines": {"scene": "{velocity}"}}, "unknown {velocity}"),
        ({"lines": {"scene": "{vx"}}, "unbalanced braces"),
        ({"lines": {"scene": "{vx:.3f}"}}, "'scene' must hold bare names in braces, not {vx:.3f}"),
        ({"lines": {"scene": "{vx!r}"}}, "not {vx!r}"),
        ({"lines": {"scene": "", 7: ""}}, "lines has a name that is no text, 7"),
        ({"lines": {"scene": "\ud83d"}}, "half a character"),
        ({"lines": {}}, "uses unknown line 'scene'"),
        ({"requests": {"plan": "scene"}}, "request 'plan' must be a list of names of lines"),
        ({"requests": {"plan": [["scene"]]}}, "request 'plan' must be a list of names of lines"),
        (
            {"answers": {"caption_object": "{caption}{x}{y}", "qa": ""}},
            "answers must be caption_obj",
        ),
        ({"units": UNITS | {"velocity": ["m/s"]}}, "velocity is m/s or"),
        ({"answers": {"caption_object": "{caption}"}}, "must tell caption, x and y"),
        ({"plan": {"values": "points"}}, "plan must tell values .str., decimals"),
        ({"plan": {"values": "curves", "decimals": 2}}, "not 'curves'"),
        ({"plan": {"values": "offsets", "decimals": 3}}, "1 or 2 decimals, not 3"),
        ({"plan": {"values": "leaps", "decimals": 1}}, "offsets, changes, tokens, not 'leaps'"),
        ({"plan": {"values": "tokens", "decimals": 1}}, "chosen by stages.planning.actions=tokens"),
    ],
)
def test_a_mistake_in_a_dialect_file_is_named(tmp_path, change, message):
    content = {
        "system": "",
        "lines": {"scene": "<SCENE>"},
        "requests": {kind: ["scene"] for kind in KINDS},
        "answers": {"caption_object": "{caption}{x}{y}"},
        "commands": ["right", "left", "on"],
        "units": UNITS,
        "signed_zero": False,
        "training": TRAINING,
        "plan": {"values": "points", "decimals": 2},
    }
    good = tmp_path / "good.yaml"
    good.write_text(yaml.safe_dump(content))
    assert Dialect(str(good)).request("qa", None) == "<SCENE>"
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(content | change))
    with pytest.raises(UserError, match=f"bad.yaml.*{message}"):
        Dialect(str(bad))


def test_an_entry_of_a_dialect_file_that_stands_there_twice_is_named(tmp_path):
    path = tmp_path / "twice.yaml"
    text = yaml.safe_dump(dict(Dialect().wording.content), allow_unicode=True)
    path.write_text(text.replace("lines:\n", "lines:\n  scene: other\n"))
    with pytest.raises(UserError, match=r"twice\.yaml.* 'scene' stands there twice"):
        Dialect(str(path))
    path.write_text(f"{text}\n? [a, list]\n: is no name\n")
    with pytest.raises(UserError, match=r"twice\.yaml.* a list or mapping is no name"):
        Dialect(str(path))


def test_what_cannot_be_said_is_refused():
    with pytest.raises(UserError, match="'klingon' is neither a file nor one of compact, odvla"):
        Dialect("klingon")
    with pytest.raises(UserError, match="not 'vision'"):
        Dialect(without=("vision",))
    with pytest.raises(UserError, match="'history', which dialect 'compact' does not tell"):
        Dialect("compact", without=("history",))
    with pytest.raises(UserError, match="no request of kind 'song'"):
        Dialect().turns("song", None, ego_state())
    with pytest.raises(UserError, match="ego state, which is missing"):
        Dialect().turns("plan", None, None)
    with pytest.raises(UserError, match=r"dialect\.labels is answer_only or reference, not 'all'"):
        Dialect(labels="all")


def test_another_dialect_is_another_identity(tmp_path):
    path = tmp_path / "mine.yaml"
    write_dialect(Dialect().wording.content, path)
    same = Dialect(str(path))
    kept = same.identity()
    Dialect().check_same(json.loads(json.dumps(kept)), "the weights w")  # as a card keeps it
    with pytest.raises(UserError, match=r"w was trained on dialect '.*mine\.yaml', .*'compact'"):
        Dialect("compact").check_same(kept, "the weights w")
    with pytest.raises(UserError, match="speaks 'odvla' without history"):
        Dialect(without=("history",)).check_same(kept, "the weights w")
    other = kept | {"name": "odvla", "sha256": "0"}
    with pytest.raises(UserError, match="'odvla' with other texts"):
        Dialect().check_same(other, "the weights w")
