"""DriveLM in hand-written files: what is read, how it is asked, and every damage that is named."""

import json
import re

import pytest

from datamodules.drivelm import TOPICS, DriveLMConfig, parse_key_object
from datamodules.index_file import load_index
from datamodules.multiple_choice import INSTRUCTION
from odvla.errors import UserError
from odvla.language.prompts import Dialect

CAR = "<c1,CAM_BACK,1088.3,497.5>"
BEHAVIORS = [
    f"The ego vehicle is {steering}. The ego vehicle is {pace}."
    for steering in ("going straight", "steering to the left")
    for pace in ("not moving", "driving fast", "driving slowly")
]


def qa(question, answer, **more):
    return {"Q": question, "A": answer, "C": None, "con_up": None, "con_down": None,
            "cluster": None, "layer": None, **more}  # fmt: skip


def key_frame(number):
    return {
        "key_object_infos": {
            CAR: {
                "Category": "Vehicle",
                "Status": None,
                "Visual_description": "Brown SUV.",
                "2d_bbox": [966.6, 403.3, 1224.1, 591.7],
            }
        },
        "QA": {
            "perception": [
                qa("What matters?", f"A brown SUV, {CAR}."),
                qa(f"What is the moving status of object {CAR}?", "Turn left."),
            ],
            "prediction": [qa(f"Is {CAR} a traffic sign?", "No.")],
            "planning": [],
            "behavior": [
                qa("Predict the behavior of the ego vehicle.", BEHAVIORS[number % len(BEHAVIORS)])
            ],
        },
        "image_paths": {"CAM_FRONT": "../nuscenes/samples/CAM_FRONT/a.jpg"},
    }


def write_files(folder, index):
    """All key-frames of train in the published form; of val in the challenge's, without answers."""
    content = {"train": {}, "val": {}}
    for scene in index.scenes:
        if scene.split not in content:
            continue
        frames = {f.token: key_frame(f.number) for f in index.frames[scene.first : scene.last]}
        if scene.split == "val":
            for record in frames.values():
                del record["key_object_infos"]
                for questions in record["QA"].values():
                    for asked in questions:
                        asked.update(A="", tag=[0])
        content[scene.split][scene.token] = {"scene_description": "a", "key_frames": frames}
    for name, scenes in (("v1_1_train_nus", "train"), ("v1_1_val_nus_q_only", "val")):
        path = folder / "drivelm" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content[scenes]))
    return content


@pytest.fixture(scope="module")
def root(circles, tmp_path_factory):
    root = circles.write_root(tmp_path_factory.mktemp("drivelm"))
    write_files(root / "language", load_index(root, "v1.0-mini"))
    return root


def build(root, **changes):
    return DriveLMConfig(str(root), image_size=(16, 9), **changes).build(dialect=Dialect("compact"))


def test_every_question_becomes_a_conversation_with_the_challenge_s_name(root):
    data = build(root)
    train = list(data.conversations("train"))
    assert len(train) == 13 * 4
    scene = data.index.scenes_of("train")[0]
    frame = data.index.frames[scene.first]
    first = [c for c in train if c.sample_token == frame.token]
    assert [c.id for c in first] == [f"{scene.token}_{frame.token}_{k}" for k in range(4)]
    # The graph: perception, prediction, planning (empty here), behavior; numbers go through.
    assert [(c.meta["topic"], c.meta["number"]) for c in first] == [
        ("perception", "0"), ("perception", "1"), ("prediction", "2"), ("behavior", "3"),
    ]  # fmt: skip
    # Key objects stay text, in question and answer.
    assert first[0].reference == f"A brown SUV, {CAR}."
    assert first[1].turns[-2].text.endswith(f"What is the moving status of object {CAR}?")
    assert {c.kind for c in train} == {"drivelm"}
    assert first[0].meta["tags"] == ""


def test_questions_without_answers_are_asked_in_evaluation_only(root):
    data = build(root)
    val = list(data.conversations("val"))
    assert len(val) == 13 * 4
    for conversation in val:
        assert conversation.turns[-1].role == "user"
        assert conversation.reference == ""
        assert conversation.meta["tags"] == "0"
    files = ("drivelm/v1_1_val_nus_q_only.json", "drivelm/v1_1_val_nus_q_only.json")
    with pytest.raises(UserError, match=r"perception 0: field 'A' must be a text, not ''"):
        build(root, drivelm_files=files).source("train")


def test_topics_are_chosen_and_the_others_counted(root):
    data = build(root, drivelm_topics=("behavior", "prediction"))
    train = list(data.conversations("train"))
    assert [c.meta["topic"] for c in train[:2]] == ["prediction", "behavior"]
    assert [c.meta["number"] for c in train[:2]] == ["2", "3"]  # the file's own numbers
    (report,) = data.join_reports("train")
    assert (report.records, report.joined) == (52, 26)
    with pytest.raises(UserError, match="drivelm_topics must be some of perception"):
        build(root, drivelm_topics=("driving",))


def test_a_whole_key_frame_is_one_conversation_in_training(root):
    data = build(root, drivelm_multi_turn=True)
    train = list(data.conversations("train"))
    assert len(train) == 13
    asked = [turn.text for turn in train[0].turns if turn.role == "user"]
    answers = [turn.text for turn in train[0].turns if turn.role == "assistant"]
    assert [turn.role for turn in train[0].turns] == ["user", "assistant"] * 4
    assert "<SCENE>" in asked[0]
    assert asked[1:] == [
        f"What is the moving status of object {CAR}?",
        f"Is {CAR} a traffic sign?",
        "Predict the behavior of the ego vehicle.",
    ]
    assert answers == [f"A brown SUV, {CAR}.", "Turn left.", "No.", train[0].reference]
    assert len(list(data.conversations("val"))) == 13 * 4  # one by one


def test_all_answers_of_a_whole_key_frame_are_learned(root):
    """Every answer has labels, no question has; generation starts behind the last question."""
    from odvla.fake_batch import fake_tokenizer
    from odvla.types import IGNORE_INDEX

    tokenizer = fake_tokenizer()
    conversation = next(build(root, drivelm_multi_turn=True).conversations("train"))
    encoded = tokenizer.encode(conversation)
    learned, run = [], []
    for label in [*encoded.labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            learned.append(tokenizer.decode(run))
            run = []
    assert learned == [t.text for t in conversation.turns if t.role == "assistant"]
    assert tokenizer.decode(encoded.ids[encoded.prompt_length :]).strip() == conversation.reference


def test_four_options_one_of_them_right_always_the_same(root):
    data = build(root, drivelm_multiple_choice=True)
    train = [c for c in data.conversations("train") if INSTRUCTION in c.meta["question"]]
    assert len(train) == 13 * 2
    letters = set()
    plain = {c.id: c.reference for c in build(root).conversations("train")}
    for conversation in train:
        told = conversation.meta["question"].split(INSTRUCTION)[1]
        options = dict(re.findall(r"([A-D])\. (.*?)(?= [A-D]\. |$)", told))
        assert sorted(options) == ["A", "B", "C", "D"]
        assert len(set(options.values())) == 4
        assert options[conversation.reference] == plain[conversation.id]
        letters.add(conversation.reference)
    assert len(letters) > 2
    again = build(root, drivelm_multiple_choice=True, seed=5)
    assert [c.turns for c in again.conversations("train")] == [
        c.turns for c in data.conversations("train")
    ]
    # Evaluation asks what the file asks.
    assert not any(INSTRUCTION in c.meta["question"] for c in data.conversations("val"))


def test_options_need_answers_to_choose_from(root, tmp_path):
    content = json.loads((root / "language/drivelm/v1_1_train_nus.json").read_text())
    for record in frames_of(content):
        record["QA"]["behavior"][0]["A"] = BEHAVIORS[0]
    (tmp_path / "drivelm").mkdir()
    (tmp_path / "drivelm" / "v1_1_train_nus.json").write_text(json.dumps(content))
    data = build(root, language_root=str(tmp_path), drivelm_multiple_choice=True)
    with pytest.raises(UserError, match=r"needs 4 different answers to 'Predict.*file has 1"):
        data.source("train")


def test_joins_are_reported_and_training_leaks_refused(root, tmp_path):
    files = {
        split: json.loads((root / "language/drivelm" / name).read_text())
        for split, name in (
            ("train", "v1_1_train_nus.json"),
            ("val", "v1_1_val_nus_q_only.json"),
        )
    }
    (tmp_path / "drivelm").mkdir()
    path = tmp_path / "drivelm" / "v1_1_train_nus.json"
    elsewhere = {"scene-of-another-root": {"key_frames": {"sample": key_frame(0)}}}
    path.write_text(json.dumps(files["train"] | elsewhere))
    data = build(root, language_root=str(tmp_path))
    (report,) = data.join_reports("train")
    assert (report.records, report.joined) == (56, 52)
    assert report.left_out[0].count == 4
    leaking = dict(files["train"])
    for scene, record in files["val"].items():
        leaking[scene] = {"key_frames": {token: key_frame(0) for token in record["key_frames"]}}
    path.write_text(json.dumps(leaking))
    with pytest.raises(UserError, match=r"perception: a training record is about scene-0"):
        build(root, language_root=str(tmp_path)).source("train")
    left = build(root, language_root=str(tmp_path), leaks="leave_out")
    assert len(list(left.conversations("train"))) == 52


def test_key_objects_are_parsed():
    one = parse_key_object(CAR)
    assert (one.name, one.camera, one.x_px, one.y_px, one.inside) == (
        "c1", "CAM_BACK", 1088.3, 497.5, True,
    )  # fmt: skip
    assert not parse_key_object("<c12,CAM_FRONT_LEFT,1600.5,3>").inside
    for text in ("c1,CAM_BACK,1,2", "<c1,CAM_TOP,1.0,2.0>", "<c1,CAM_BACK,-1.0,2.0>", f"{CAR} "):
        with pytest.raises(ValueError, match="expected <c1,CAMERA,x,y>"):
            parse_key_object(text)


def frames_of(content):
    return [record for scene in content.values() for record in scene["key_frames"].values()]


def _first(content):
    return frames_of(content)[0]


def _scene(content):
    return next(iter(content.values()))


def _swap_scenes(content):
    first, second = list(content)
    content[first], content[second] = content[second], content[first]


DAMAGE = [
    (lambda c: [c], r"must hold an object keyed by token, not a list"),
    (lambda c: _scene(c).pop("key_frames"), r"scene \w{32}: field 'key_frames' must be an object"),
    (
        lambda c: _scene(c)["key_frames"].update(dict.fromkeys(_scene(c)["key_frames"], 3)),
        r"scene \w{32}, sample \w{32}: expected an object",
    ),
    (_swap_scenes, r"sample \w{32}: the sample belongs to scene '\w{32}'"),
    (lambda c: _first(c).update(key_object_infos=[]), r"'key_object_infos' must be an object"),
    (
        lambda c: _first(c).update(key_object_infos={"<c1,CAM_TOP,1.0,2.0>": {}}),
        r"key_object_infos: expected <c1,CAMERA,x,y> .* not '<c1,CAM_TOP,1.0,2.0>'",
    ),
    (
        lambda c: _first(c)["key_object_infos"].update({CAR: "Vehicle"}),
        rf"key_object_infos, {re.escape(CAR)}: expected an object",
    ),
    (lambda c: _first(c)["QA"].pop("planning"), r"field 'QA' must be an object of perception"),
    (lambda c: _first(c).pop("QA"), r"field 'QA' must be an object .* not None"),
    (lambda c: _first(c)["QA"].update(behavior={}), r"field 'QA.behavior' must be a list"),
    (lambda c: _first(c)["QA"]["perception"].append("?"), r"perception 2: expected an object"),
    (lambda c: _first(c)["QA"]["perception"][1].pop("Q"), r"perception 1: field 'Q' is missing"),
    (lambda c: _first(c)["QA"]["behavior"][0].update(A=3), r"behavior 0: field 'A' must be a text"),
    (
        lambda c: _first(c)["QA"]["prediction"][0].update(tag=2),
        r"prediction 0: field 'tag' must be a list of 0, 1, 2, 3, not 2",
    ),
    (lambda c: _first(c)["QA"]["prediction"][0].update(tag=[9]), r"'tag' must be .* not \[9\]"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_damage_is_named(root, tmp_path, change, message):
    content = json.loads((root / "language/drivelm/v1_1_train_nus.json").read_text())
    changed = change(content)
    (tmp_path / "drivelm").mkdir()
    path = tmp_path / "drivelm" / "v1_1_train_nus.json"
    path.write_text(json.dumps(changed if changed == [content] else content))
    with pytest.raises(UserError, match=message) as error:
        build(root, language_root=str(tmp_path)).source("train")
    assert str(path) in str(error.value)


def test_odd_objects_are_told(root, tmp_path, caplog):
    content = json.loads((root / "language/drivelm/v1_1_train_nus.json").read_text())
    infos = _first(content)["key_object_infos"]
    infos["<c2,CAM_BACK,1700.0,10.0>"] = infos[CAR]
    _first(content)["QA"]["planning"].append(qa("Is <c3,CAM_FRONT,1.0,2.0> near?", f"{CAR} is."))
    (tmp_path / "drivelm").mkdir()
    (tmp_path / "drivelm" / "v1_1_train_nus.json").write_text(json.dumps(content))
    build(root, language_root=str(tmp_path)).source("train")
    assert "1 key objects lie outside of their 1600x900 images" in caplog.text
    assert "1 times a text names an object that its key-frame does not list" in caplog.text
    caplog.clear()
    build(root).source("train")
    assert "text" not in caplog.text


def test_topics_are_the_graph_s_order():
    assert TOPICS == ("perception", "prediction", "planning", "behavior")
