"""The released prompts out of a checkout whose code is parsed and never run."""

import json
from pathlib import Path

import pytest

from experiments.released_dialect import (
    BUILDER,
    CONSTANTS,
    CONVERSATION,
    plan_request,
    read_released_dialect,
    system_text,
)
from odvla.errors import UserError
from odvla.language.dialect_file import checked_wording, write_dialect
from odvla.language.prompts import Dialect
from odvla.language.released import SYSTEM_HEAD, request_of_example

TAGS = ("SCENE", "TRACK", "MAP")


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "j_prompts.json").read_text())


def write_checkout(folder, golden, mark, style="messages"):
    """A checkout with the recorded texts, whose modules would make a file if they were run."""
    trap = f"open({str(mark)!r}, 'w').close()\n"
    request = request_of_example(golden["records"][0]["question"])
    constants = {
        f"{tag}{end}": f"<{tag.lower()}{end.lower()}>" for tag in TAGS for end in ("_START", "_END")
    }
    constants |= {tag: f"<{tag}>" for tag in TAGS}
    if style == "messages":
        ego = request.split("Ego states: ")[1].split("\n")[0]
        body = request.replace(ego, "{ego}").replace("[{history}]", "{past}")
        body = body.replace("{command}", "{aim}")
        for name, tag in constants.items():
            body = body.replace(tag, "{" + name + "}")
        words = "".join(f"    ego += f{part!r}\n" for part in (ego[:40], ego[40:]))
        points = ",".join(f"({{x{n}:.2f}},{{y{n}:.2f}})" for n in range(4))
        source = (
            f"{trap}import torch\ndef words(record):\n    '''Says it.'''\n    ego = ''\n"
            f"    vx = record['v'] * 0.5\n{words}"
            f"    past = f'[{points}]'\n"
            "    if record['right'] > 0:\n        goal = 'turn right'\n"
            "    else:\n        goal = 'keep forward'\n"
            "    aim = f'{goal}'\n    return ego, past, aim\n"
            f"def build(sample, records):\n    ego, past, aim = words(records[sample['id']])\n"
            f"    sample['conversations'][0]['value'] = (\n"
            + "".join(f"        f{line!r}\n" for line in body.splitlines(keepends=True))
            + "    )\n    return sample\n"
        )
    else:
        source = f"{trap}def build(r):\n    return f{request!r}\n"
    named = "".join(f"{name} = {tag!r}\n" for name, tag in constants.items())
    conversation = (
        f"{trap}import dataclasses\n\nother = Conversation(system='Be kind.', roles=('a', 'b'))\n"
        f"conv_qwen_planning_oriented_vlm = Conversation(\n"
        f"    system={golden['system_prompt']!r},\n    roles=('<|im_start|>user',),\n)\n"
    )
    for name, text in ((BUILDER, source), (CONSTANTS, named), (CONVERSATION, conversation)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("style", ["messages", "one f-string"])
def test_the_texts_are_found_and_nothing_is_run(golden, tmp_path, style):
    mark = tmp_path / "was-run"
    checkout = write_checkout(tmp_path / "checkout", golden, mark, style)
    content = read_released_dialect(checkout, tmp_path)
    assert not mark.exists()
    wording = checked_wording(content, "released")
    assert wording.system == golden["system_prompt"].removeprefix(SYSTEM_HEAD)
    lines = [wording.lines[name] for name in wording.requests["plan"]]
    assert "\n".join(lines) == request_of_example(golden["records"][0]["question"])
    write_dialect(content, tmp_path / "dialect.yaml")
    assert Dialect(str(tmp_path / "dialect.yaml")).wording.content == content


def test_a_system_text_in_pieces_is_found(golden, tmp_path):
    checkout = write_checkout(tmp_path, golden, tmp_path / "mark")
    text = golden["system_prompt"]
    (checkout / CONVERSATION).write_text(
        f"c = C(system={text[:99]!r} {text[99:200]!r} + {text[200:]!r})"
    )
    assert system_text(checkout) == text.removeprefix(SYSTEM_HEAD)


def test_other_texts_are_refused(golden, tmp_path):
    checkout = write_checkout(tmp_path, golden, tmp_path / "mark")
    for name, find in ((CONVERSATION, "safe"), (BUILDER, "Map information")):
        path = checkout / name
        path.write_text(path.read_text().replace(find, "Other"))
    with pytest.raises(UserError, match="does not hold the system text"):
        system_text(checkout)
    with pytest.raises(UserError, match="does not hold the wording of plans"):
        plan_request(checkout)


def test_what_is_no_checkout_is_named(golden, tmp_path):
    with pytest.raises(UserError, match=r"no checkout of OpenDriveVLA: it has no llava/conv"):
        system_text(tmp_path)
    checkout = write_checkout(tmp_path, golden, tmp_path / "mark")
    (checkout / BUILDER).write_text("def (")
    with pytest.raises(UserError, match=r"build_llava_conversation\.py is not Python"):
        plan_request(checkout)


def test_our_sources_hold_none_of_the_text(golden):
    """Hashes only."""
    root = Path(__file__).resolve().parents[2]
    system = golden["system_prompt"].removeprefix(SYSTEM_HEAD)
    sentences = [line for line in system.split("\n") if len(line) > 60]
    assert sentences
    for package in ("odvla", "experiments", "datamodules", "stages", "callbacks", "docs"):
        for path in (root / package).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md"):
                text = path.read_text()
                assert not any(sentence in text for sentence in sentences), path
