"""OmniDrive in hand-written folders: what is read, how plans are told, every damage named."""

import json
import math

import pytest

from datamodules.index_file import load_index
from datamodules.omnidrive import PARTS, OmniDriveConfig
from odvla.errors import UserError
from odvla.language.omnidrive_plan import parse_rear_axle_plan
from odvla.language.prompts import Dialect

FOLDERS = {
    "keywords": lambda k: f"go on {k}",
    "desc": lambda k: {"description": f"A road {k}.", "action": "driving"},
    "vqa": lambda k: [{"question": f"Watch {k}?", "answer": "A car."}] * 2,
    "conv": lambda k: [{"question": f"Rain {k}?", "answer": "No."}],
}


def write_folders(folder, index):
    for split in ("train", "val"):
        for scene in index.scenes_of(split):
            for frame in index.frames[scene.first : scene.last]:
                for part, content in FOLDERS.items():
                    path = folder / "omnidrive" / part / split / f"{frame.token}.json"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(content(frame.position)))


@pytest.fixture(scope="module")
def root(circles, tmp_path_factory):
    root = circles.write_root(tmp_path_factory.mktemp("omnidrive"))
    write_folders(root / "language", load_index(root, "v1.0-mini"))
    return root


def build(root, **changes):
    config = OmniDriveConfig(str(root), image_size=(16, 9), **changes)
    return config.build(dialect=Dialect("compact"))


def test_every_record_becomes_a_conversation(root):
    data = build(root)
    for split in ("train", "val"):
        found = list(data.conversations(split))
        # 13 key-frames, 5 questions each; plans of those that six more key-frames follow.
        whole = sum(max(s.last - s.first - 6, 0) for s in data.scenes(split))
        assert len(found) == 13 * 5 + whole
        assert len({c.id for c in found}) == len(found)
        assert [c.kind for c in found].count("omnidrive_plan") == whole > 0
        for conversation in found:
            place = data.index.location(data.index.frame(conversation.sample_token))
            city = place.split("-")[0]
            question = conversation.meta["question"]
            told = conversation.turns[-2].text
            assert told.endswith(f"You are driving in {city}. {question}")
            assert conversation.turns[-1].text == conversation.reference


def test_plans_are_the_rear_axle_s_circle(root, circles):
    data = build(root, omnidrive_parts=("planning",))
    found = list(data.conversations("train"))
    assert found
    for conversation in found:
        frame = data.index.frame(conversation.sample_token)
        _, _, speed, rate = circles.SCENES[data.index.scenes[frame.scene].name]
        points = parse_rear_axle_plan(conversation.reference)
        assert conversation.reference.startswith("Here is the planning trajectory [PT, (+")
        assert conversation.reference.endswith(")].")
        for step, (ahead, left) in enumerate(points, start=1):
            angle = rate * 0.5 * step
            assert ahead == pytest.approx(speed / rate * math.sin(angle), abs=0.0151)
            assert left == pytest.approx(speed / rate * (1 - math.cos(angle)), abs=0.0151)


def test_parts_are_chosen(root):
    data = build(root, omnidrive_parts=("vqa", "desc"))
    assert [c.meta["part"] for c in data.conversations("val")][:3] == ["desc", "vqa", "vqa"]
    assert len(data.join_reports("val")) == 2
    with pytest.raises(UserError, match="omnidrive_parts must be some of planning, keywords"):
        build(root, omnidrive_parts=("lanes",))


def test_a_whole_key_frame_is_one_conversation_in_training(root):
    data = build(root, omnidrive_multi_turn=True)
    train = list(data.conversations("train"))
    assert len(train) == 13
    first = train[0]
    assert first.meta["part"] == "planning keywords desc vqa vqa conv"
    users = [turn.text for turn in first.turns if turn.role == "user"]
    assert "You are driving in singapore. Please provide the planning" in users[0]
    assert not any("You are driving" in text for text in users[1:])
    assert [turn.text for turn in first.turns if turn.role == "assistant"][1:] == [
        "go on 0", "A road 0.", "A car.", "A car.", "No.",
    ]  # fmt: skip
    assert len(list(data.conversations("val"))) > 13 * 5


def test_files_may_be_missing_and_foreign_ones_are_counted(root, tmp_path):
    index = load_index(root, "v1.0-mini")
    write_folders(tmp_path, index)
    folder = tmp_path / "omnidrive" / "conv" / "train"
    frame = index.frames[index.scenes_of("train")[0].first]
    (folder / f"{frame.token}.json").unlink()
    (folder / "another-root.json").write_text("not even JSON: it is not opened")
    data = build(root, language_root=str(tmp_path))
    reports = {r.file.parent.name: r for r in data.join_reports("train")}
    assert (reports["conv"].records, reports["conv"].joined) == (13, 12)
    assert reports["conv"].left_out[0].example == "another-root.json"
    parts = [c.meta["part"] for c in data.conversations("train") if c.sample_token == frame.token]
    assert parts == ["planning", "keywords", "desc", "vqa", "vqa"]
    # Plans of key-frames near a scene's end are counted, too.
    plans = data.join_reports("train")[0]
    assert plans.records == 13
    assert plans.left_out[0].count == 13 - plans.joined > 0


DAMAGE = [
    ("keywords", {"action": "go"}, "must hold a text, not {'action': 'go'}"),
    ("keywords", " ", "must hold a text, not ' '"),
    ("desc", {"action": "go"}, "the file: field 'description' is missing"),
    ("desc", ["A road."], "the file: expected an object with 'description', not a list"),
    ("vqa", {"question": "a", "answer": "b"}, "must hold a list of records, not an object"),
    ("vqa", [{"question": "a"}], "record 0: field 'answer' is missing"),
    ("conv", [{"question": "", "answer": "b"}], "record 0: field 'question' must be a text"),
    ("conv", None, "must hold a list of records"),
]


@pytest.mark.parametrize(("part", "content", "message"), DAMAGE)
def test_damage_is_named(root, tmp_path, part, content, message):
    index = load_index(root, "v1.0-mini")
    write_folders(tmp_path, index)
    token = index.frames[index.scenes_of("train")[0].first + 1].token
    path = tmp_path / "omnidrive" / part / "train" / f"{token}.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        build(root, language_root=str(tmp_path)).source("train")
    assert str(path) in str(error.value)
    path.write_text("{")
    with pytest.raises(UserError, match=f"{token}.json is not JSON"):
        build(root, language_root=str(tmp_path)).source("train")


def test_missing_and_empty_folders_are_named(root, tmp_path):
    data = build(root, language_root=str(tmp_path))
    with pytest.raises(UserError, match=r"keywords/train does not exist"):
        data.source("train")
    (tmp_path / "omnidrive" / "keywords" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"keywords/train holds no <sample token>\.json"):
        build(root, language_root=str(tmp_path)).source("train")
    # Plans alone need no files.
    assert list(
        build(root, language_root=str(tmp_path), omnidrive_parts=("planning",)).conversations("val")
    )


def test_a_part_of_each_kind_may_be_trained_on(root):
    """Sampling takes its share of the plans, too, and evaluation has all."""
    whole, half = build(root), build(root, sampling="first:50%")
    for part in PARTS:
        count, kept = (
            sum(c.meta["part"] == part for c in data.conversations("train"))
            for data in (whole, half)
        )
        assert kept == math.ceil(count / 2) > 0
    assert len(list(half.conversations("val"))) == len(list(whole.conversations("val")))
