"""`data describe`: its numbers against the files of a town, its tables, its JSON."""

import json
from collections import Counter

import pytest

from experiments.cli import main
from experiments.describe import DATA_SETS, describe_data

VERSION = "v1.0-trainval"


def _describe(name, root, split="val", changes=(), **more):
    return describe_data(name, root, VERSION, split, list(changes), progress=False, **more)


def test_the_numbers_are_those_of_the_file(town_root):
    path = town_root / "language" / "nuscenes_qa" / "NuScenes_val_questions.json"
    questions = json.loads(path.read_text())["questions"]
    found = _describe("nuscenes_qa", town_root, examples=4)
    assert found.conversations == len(questions)
    assert found.counts["template_type"] == Counter(q["template_type"] for q in questions)
    assert found.counts["num_hop"] == Counter(str(q["num_hop"]) for q in questions)
    answers = Counter(str(q["answer"]) for q in questions)
    assert found.common_answers["qa"] == dict(answers.most_common(8))
    lengths = {row.text: row for row in found.lengths}
    sizes = sorted(len(q["question"]) for q in questions)
    asked = lengths["question"]
    assert (asked.characters.shortest, asked.characters.longest) == (sizes[0], sizes[-1])
    assert asked.characters.total == sum(sizes)
    assert asked.words.total == sum(len(q["question"].split()) for q in questions)
    assert asked.tokens is None
    assert len({e.id for e in found.examples}) == 4
    texts = {(q["sample_token"], q["question"], str(q["answer"])) for q in questions}
    assert {(e.sample_token, e.question, e.answer) for e in found.examples} <= texts
    assert found.frames == found.frames_with == len({q["sample_token"] for q in questions})


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_is_described(town_root, name, capsys):
    command = ["data", "describe", name, "--root", str(town_root), "--examples", "1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"{name}  train of {VERSION}" in shown
    assert "example 1: " in shown
    assert "text lengths" in shown
    assert ("in the file" in shown) == (name != "agent_trajectories")


def test_json_holds_the_joins_and_settings_are_taken(town_root, capsys):
    command = ["data", "describe", "tod3cap", "--root", str(town_root), "--json"]
    assert main([*command, "sampling=first:10%"]) == 0
    tree = json.loads(capsys.readouterr().out)
    captions = json.loads((town_root / "language" / "final_caption_bbox_token.json").read_text())
    (report,) = tree["reports"]
    left = sum(part["count"] for part in report["left_out"])
    assert report["records"] == len(captions) == report["joined"] + left
    assert tree["conversations"] == report["kept"] == -(-report["joined"] // 10)
    assert tree["counts"]["kind"] == {"caption_object": report["kept"]}


def test_tokens_are_counted_where_there_is_a_tokenizer(town_root, shared):
    from odvla.language.tokenizer import ChatTokenizer

    folder = shared / "tokenizer" / "qwen2.5"
    found = _describe("nux", town_root, tokenizer=folder, examples=0)
    assert found.examples == ()
    texts = json.loads((town_root / "language" / "nux" / "Nu_X_val.json").read_text())
    chat = ChatTokenizer.load(folder)
    said = [
        f"Narration: {r['narration'].rstrip('.')}. Reasoning: {r['reasoning'].rstrip('.')}."
        for r in texts.values()
    ]
    (answers,) = (row for row in found.lengths if row.text == "answer")
    assert answers.tokens.total == sum(len(chat.text_ids(text)) for text in said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nuscens_qa"], "did you mean 'nuscenes_qa'"),
        (["nux", "nux_fils=[a,b]"], "did you mean 'nux_files'"),
        (["nux", "nux_files=[no.json,no.json]"], "no.json does not exist"),
        (["nux", "sampling=some"], "sampling must be all"),
    ],
)
def test_mistakes_are_one_sentence(town_root, arguments, message, capsys):
    assert main(["data", "describe", *arguments, "--root", str(town_root)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
