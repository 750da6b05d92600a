"""Processes that torchrun starts on two machines, played by one, train one experiment."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.handoff import read_card
from experiments.processes import first_process_first, join_processes
from experiments.schema import TrainerConfig
from odvla.errors import UserError

ROOT = Path(__file__).parents[2]
SHORT = (
    "run=[alignment,planning]",
    "trainer.accelerator=cpu",
    "trainer.nodes=2",
    "town=null",
    "data.version=v1.0-trainval",
    "data.image_size=[96,54]",
    "data.eval_scenes=1",
    "stages.alignment.steps=2",
    "stages.planning.steps=2",
    "stages.planning.samples=1",
    "stages.planning.ablations=[]",
    "pictures=0",
    "baseline.epochs=1",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_machines_train_one_experiment(town_root, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
    ]
    script = ["lightning_app.py", "fit", "smoke", *SHORT]
    places = ["--data", str(town_root), "--runs", str(tmp_path)]
    machines = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", *script, *places],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]
    said = [machine.communicate(timeout=500)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert "stage planning: 2 steps" in said[0]
    assert "stage planning" not in said[1]  # the first process speaks
    cards = [read_card(tmp_path / "smoke" / stage) for stage in ("alignment", "planning")]
    assert [card.stage for card in cards] == ["alignment", "planning"]
    predictions = (tmp_path / "smoke" / "planning" / "predictions.jsonl").read_text()
    assert len(set(predictions.splitlines())) == len(predictions.splitlines()) > 0


def test_machines_that_nobody_started_are_named():
    with pytest.raises(UserError, match=r"^trainer\.nodes=2 needs torchrun or srun"):
        join_processes(TrainerConfig(nodes=2))


def test_another_number_of_processes_is_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^3 processes were started, .*makes 4$"):
        join_processes(TrainerConfig(nodes=2, devices=2))


def test_what_any_number_can_do_takes_any_number(monkeypatch):
    join_processes(TrainerConfig(nodes=2), any_number=True)  # nobody started others: one does it
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    joined = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **b: joined.append(b))
    join_processes(TrainerConfig(devices=2), any_number=True)
    assert joined[0]["world_size"] == 3


def test_one_process_waits_for_nobody():
    join_processes(TrainerConfig())
    with first_process_first():
        pass


def test_processes_are_counted_on_all_machines():
    settings = TrainerConfig(nodes=2, devices=4)
    assert (settings.processes, settings.sharing) == (8, "ddp")
    with pytest.raises(UserError, match=r"trainer\.nodes must be at least 1, not 0"):
        TrainerConfig(nodes=0)
