"""Imports point one way: odvla <- callbacks, datamodules, stages <- experiments <- the script."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN = {"odvla", "callbacks", "datamodules", "stages", "experiments", "lightning_app"}
ALLOWED = {
    "odvla": {"odvla"},
    "callbacks": {"callbacks", "odvla"},
    "datamodules": {"datamodules", "odvla"},
    "stages": {"stages", "odvla"},
    "experiments": OWN - {"lightning_app"},
}
# The mathematics of the model knows neither the training framework nor a data set.
FOREIGN_TO_ODVLA = {"lightning", "mlflow", "nuscenes", "rich"}


def imported(path):
    """Top-level names of all imports of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_stands_on(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        names = set(imported(path))
        wrong = (names & OWN) - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
        if package == "odvla":
            assert not names & FOREIGN_TO_ODVLA, path


def test_the_script_is_short_and_hands_over():
    script = ROOT / "lightning_app.py"
    assert len(script.read_text().splitlines()) <= 40
    assert set(imported(script)) == {"experiments"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["fit", "--help"], ["weights", "convert", "--help"], ["list"]]
)
def test_help_and_list_come_without_heavy_imports(arguments):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['lightning_app.py', *{arguments!r}]\n"
        "try:\n"
        "    runpy.run_path('lightning_app.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'mlflow', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout or "smoke" in done.stdout


def test_a_process_that_makes_scenes_imports_neither_torch_nor_the_devkit():
    code = (
        "import sys, datamodules.town.scene_job\n"
        "print({'torch', 'nuscenes', 'matplotlib', 'datamodules.town.language'} & {*sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
