"""What the documents show is executed."""

import json
import re
import runpy
from pathlib import Path

import pytest

from experiments.cli import main

ROOT = Path(__file__).resolve().parents[1]


def code_block(document: str) -> str:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found, document
    return found.group(1)


def test_an_encoder_in_one_new_file_trains_stage_1(tmp_path, town_root, forked):
    (tmp_path / "my_encoder.py").write_text(code_block("plug-in-an-encoder.md"))
    checked = forked(runpy.run_path, "my_encoder.py", None, "__main__", folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    settings = ["data.version=v1.0-trainval", f"--data={town_root}", "--runs=runs"]
    trained = forked(main, ["fit", "my_encoder:patches", *settings], folder=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]
    card = json.loads((tmp_path / "runs" / "patches" / "alignment" / "card.json").read_text())
    assert card["stage"] == "alignment"
    assert (tmp_path / "runs" / "patches" / "alignment" / "vla.safetensors").is_file()


def test_the_experiment_of_the_document_is_an_experiment(tmp_path, forked):
    (tmp_path / "my_experiments.py").write_text(code_block("add-an-experiment.md"))
    shown = forked(main, ["show", "my_experiments:tiny_blind_to_maps"], folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "name: tiny_blind_to_maps" in shown.stdout


@pytest.mark.parametrize("document", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_files_that_documents_name_exist(document):
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    for name in re.findall(
        r"\b((?:odvla|datamodules|experiments|stages|callbacks)/[\w/]+\.\w+)", text
    ):
        assert (ROOT / name).is_file(), f"{document} names {name}"
