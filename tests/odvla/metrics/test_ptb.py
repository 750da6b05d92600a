"""The tokenizer against output of the Java program, recorded, and live where Java is there."""

import shutil
import subprocess
from pathlib import Path

import pytest

from odvla.metrics.ptb import DROPPED, tokenise, tokenise_all

# Texts of our own, and what pycocoevalcap's Java tokenizer made of them.
RECORDED = {
    "The car isn't moving, it's waiting at the traffic light.": (
        "the car is n't moving it 's waiting at the traffic light"
    ),
    "A black car is about 12.5 meters away in the front-left of the ego car.": (
        "a black car is about 12.5 meters away in the front-left of the ego car"
    ),
    "Don't stop! Can't you see? They're turning; we've passed (the truck).": (
        "do n't stop ca n't you see they 're turning we 've passed -lrb- the truck -rrb-"
    ),
    "The truck's trailer is 3.5m long and costs $5,000.": (
        "the truck 's trailer is 3.5 m long and costs $ 5,000"
    ),
    'He said "stop" and went.': "he said stop and went",
    "left/right and/or 50% of cars.": "left/right and/or 50 % of cars",
    "cannot go. gonna turn.": "can not go gon na turn",
    "Mr. Smith lives in the U.S. and drives. He drives at 5 p.m. daily.": (
        "mr. smith lives in the u.s. and drives he drives at 5 p.m. daily"
    ),
    "The BEV coordinate is (-20.15,41.87).": "the bev coordinate is -lrb- -20.15,41.87 -rrb-",
    "x=3 and y=4 at 10:30 on 5/12/2019": "x = 3 and y = 4 at 10:30 on 5/12/2019",
    "No. 5 is at 5th avenue, approx. 30 km/h vs. 40 km/h": (
        "no. 5 is at 5th avenue approx 30 km/h vs. 40 km/h"
    ),
    "A bus-stop [sign] {brace} <tag> is visible": (
        "a bus-stop -lsb- sign -rsb- -lcb- brace -rcb- <tag> is visible"
    ),
    "#hashtag @user 100,000.50 -5 +5 1/2 3-4 2x4 c++ 20mph 3rd": (
        "#hashtag @user 100,000.50 -5 +5 1/2 3-4 2x4 c++ 20mph 3rd"
    ),
    "The car,which is red,stops.The truck goes.": "the car which is red stops.the truck goes",
    "What's going on?!": "what 's going on ?!",
    "hello\u2014world and en\u2013dash\u2026 done": "hello world and en dash done",
    "'tis the season; rock 'n' roll; the '90s": "'t is the season rock 'n' roll the '90s",
    "a car is parked at 14 m. It is red.": "a car is parked at 14 m it is red",
    "she'd've gone to St. John's": "she 'd 've gone to st. john 's",
}


# Lines of one file, in order, with what the Java program made of them: a letter with a full stop is
# an initial unless a word of its list begins what follows, in the same line or the next one.
FILE = {
    "It is parked at 24.5 m.": "it is parked at 24.5 m.",
    "Behind it are two cars at 28.7 m. Two more are at 30 m.": (
        "behind it are two cars at 28.7 m. two more are at 30 m"
    ),
    "However far, at 3 m. Here it stops, at 3.5m.": "however far at 3 m here it stops at 3.5 m",
    "A car at 4 m., a truck at 5 m. It waits.": "a car at 4 m. a truck at 5 m it waits",
    "it is 4m. The plan b.": "it is 4m the plan b.",
    "": "",
    "another one, at 9 m.": "another one at 9 m.",
}


def test_the_next_caption_decides_on_a_last_letter():
    assert tokenise_all(list(FILE)) == list(FILE.values())
    assert tokenise_all(["at 9 m.", "", "A car"]) == ["at 9 m", "", "a car"]
    assert tokenise("at 9 m.") == "at 9 m."


@pytest.mark.parametrize("text", RECORDED)
def test_tokens_equal_the_java_tokenizer(text):
    assert tokenise(text) == RECORDED[text]


@pytest.mark.skipif(shutil.which("java") is None, reason="no java here")
def test_tokens_equal_the_java_tokenizer_now(tmp_path):
    import pycocoevalcap.tokenizer.ptbtokenizer as theirs

    folder = Path(theirs.__file__).parent
    (tmp_path / "texts").write_text("\n".join(RECORDED))
    command = ["java", "-cp", theirs.STANFORD_CORENLP_3_4_1_JAR]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(
        [*command, str(tmp_path / "texts")], cwd=folder, capture_output=True, text=True, check=True
    )
    for text, line in zip(RECORDED, done.stdout.splitlines(), strict=True):
        kept = [token for token in line.split() if token not in theirs.PUNCTUATIONS]
        assert tokenise(text).split() == kept
    assert set(theirs.PUNCTUATIONS) == DROPPED


@pytest.mark.skipif(shutil.which("java") is None, reason="no java here")
def test_a_file_is_tokenised_as_pycocoevalcap_does_now():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    for texts in (list(FILE), ["at 9 m.", "", "A car"]):
        found = PTBTokenizer().tokenize({n: [{"caption": t}] for n, t in enumerate(texts)})
        assert tokenise_all(texts) == [found[number][0] for number in range(len(texts))]
