"""The released dialect is made of texts that are found elsewhere, and of no others."""

import json

import pytest

from odvla.errors import UserError
from odvla.language.dialect_file import checked_wording
from odvla.language.released import (
    SYSTEM_HEAD,
    default_system_of,
    released_dialect,
    request_of_example,
    request_of_source,
)

NUMBERS = "a ({},{}) b {} c ({},{}) d ({},{}) e {} f {}"
EXAMPLE = (
    NUMBERS.format(*["-1.25"] * 9) + "\npast [(0.00,-1.00),(1.00,2.00),(3.00,4.00),(5.00,-0.00)]"
    "\nso: turn left!\n{braces}"
)
TEMPLATE = (
    "a ({vx},{vy}) b {v_yaw} c ({ax},{ay}) d ({can_x},{can_y}) e {speed} f {steering}\n"
    "past [{history}]\nso: {command}!\n{{braces}}"
)


@pytest.fixture
def golden(shared):
    return json.loads((shared / "golden" / "j_prompts.json").read_text())


def test_an_example_becomes_a_template():
    assert request_of_example(EXAMPLE) == TEMPLATE
    for spoiled, message in (
        (EXAMPLE.replace("(5.00", "(5"), "no 4 points of history"),
        (EXAMPLE.replace("-1.25", "x", 1), "tells 8 numbers, not 9"),
        (EXAMPLE.replace("turn left", "fly"), "none of turn right"),
    ):
        with pytest.raises(UserError, match=message):
            request_of_example(spoiled)


def test_only_the_known_texts_are_taken(golden):
    request = request_of_example(golden["records"][0]["question"])
    content = released_dialect(golden["system_prompt"], request)
    wording = checked_wording(content, "released")
    assert wording.system == golden["system_prompt"].removeprefix(SYSTEM_HEAD)
    assert wording.requests["plan"]
    assert wording.requests["qa"][-1] == "question"
    assert "agent" not in wording.requests
    assert wording.training.doubled_system_head
    with pytest.raises(UserError, match="system text is not the one"):
        released_dialect(golden["system_prompt"] + " ", request)
    with pytest.raises(UserError, match="request for plans is not the one"):
        released_dialect(golden["system_prompt"], request.replace(":", ";"))
    more = released_dialect(
        golden["system_prompt"], request, requests={"agent": "<OBJECT>\nWhere to?"}
    )
    assert [more["lines"][n] for n in more["requests"]["agent"]] == ["<OBJECT>", "Where to?"]


@pytest.mark.parametrize("style", ["one f-string", "piece by piece", "joined history"])
def test_a_programs_source_is_read_and_not_run(golden, style):
    request = request_of_example(golden["records"][0]["question"])
    points = ",".join(f"({{x[{n}]:.2f}},{{y[{n}]:.2f}})" for n in range(4))
    history = "{past}" if style == "joined history" else points
    body = request.replace("{history}", history)
    if style == "piece by piece":
        lines = [f"    text += f{line + chr(10)!r}" for line in body.split("\n")]
        lines[-1] = lines[-1].replace("\\n", "")
        text = "\n".join(["    text = 'Other words'", *lines])
    else:
        text = f"    text = f{body!r}"
    source = (
        f'import nowhere\ndef words(record):\n    """Says it."""\n{text}\n    return text\n1 / 0\n'
    )
    assert request_of_source(source, "x.py") == request
    with pytest.raises(UserError, match=r"x\.py does not hold"):
        request_of_source(source.replace("goal", "aim"), "x.py")
    with pytest.raises(UserError, match=r"x\.py is not Python"):
        request_of_source("def (", "x.py")


def test_the_system_message_that_a_template_adds():
    said = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert default_system_of(said) == "Be kind."
    assert default_system_of("<|im_start|>user\nHi<|im_end|>\n") == ""
