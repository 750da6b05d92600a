"""What the documents show is executed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def code_block(document: str) -> str:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found, document
    return found.group(1)


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_an_encoder_in_one_new_file_trains_stage_1(tmp_path, town_root):
    (tmp_path / "my_encoder.py").write_text(code_block("plug-in-an-encoder.md"))
    checked = run("my_encoder.py", folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    trained = run(
        str(ROOT / "lightning_app.py"),
        "fit",
        "my_encoder:patches",
        "data.version=v1.0-trainval",
        f"--data={town_root}",
        f"--runs={tmp_path / 'runs'}",
        folder=tmp_path,
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
    card = json.loads((tmp_path / "runs" / "patches" / "alignment" / "card.json").read_text())
    assert card["stage"] == "alignment"
    assert (tmp_path / "runs" / "patches" / "alignment" / "vla.safetensors").is_file()


def test_the_experiment_of_the_document_is_an_experiment(tmp_path):
    (tmp_path / "my_experiments.py").write_text(code_block("add-an-experiment.md"))
    shown = run(
        str(ROOT / "lightning_app.py"),
        "show",
        "my_experiments:tiny_blind_to_maps",
        folder=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    assert "name: tiny_blind_to_maps" in shown.stdout


@pytest.mark.parametrize("document", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_files_that_documents_name_exist(document):
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    for name in re.findall(
        r"\b((?:odvla|datamodules|experiments|stages|callbacks)/[\w/]+\.\w+)", text
    ):
        assert (ROOT / name).is_file(), f"{document} names {name}"
