"""Callbacks on a trainer that is only pretended."""

import json
from types import SimpleNamespace

import pytest
import torch

from callbacks.guards import NonFiniteLossGuard
from callbacks.predictions import WritePredictions
from callbacks.progress import StageProgress
from odvla.encoders.protocol import fake_frames
from odvla.errors import UserError
from odvla.types import Batch

TESTING = SimpleNamespace(fn="test")
TRAINER = SimpleNamespace(global_step=7, is_global_zero=True, world_size=1, state=TESTING)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_names_stage_step_and_samples(value):
    guard = NonFiniteLossGuard("planning")
    batch = Batch((fake_frames(2),), torch.ones(2, dtype=torch.bool))
    guard.on_train_batch_start(TRAINER, None, batch, 0)
    guard.on_before_backward(TRAINER, None, torch.tensor(1.0))
    with pytest.raises(UserError, match=r"planning is .* at step 7 \(samples: fake-0-0, fake-1-0"):
        guard.on_before_backward(TRAINER, None, torch.tensor(float(value)))


def test_predictions_are_sorted_and_appear_whole(tmp_path):
    path = tmp_path / "stage" / "predictions.jsonl"
    writer = WritePredictions(path)
    records = [
        {"sample_token": token, "id": str(n), "kind": "qa", "text": "é"}
        for token, n in (("b", 2), ("a", 9), ("b", 1))
    ]
    writer.on_test_epoch_start(TRAINER, None)
    writer.on_test_batch_end(TRAINER, None, {"records": records[:2]}, None, 0)
    assert not path.exists()
    writer.on_test_batch_end(TRAINER, None, {"records": records[2:]}, None, 1)
    writer.on_test_epoch_end(TRAINER, None)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [records[1], records[2], records[0]]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_progress_counts_steps_not_batches(capsys):
    bar = StageProgress("alignment")
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(
        is_global_zero=True, max_steps=10, global_step=4, callback_metrics={}, state=state
    )
    bar.on_train_start(trainer, None)
    bar.on_validation_start(SimpleNamespace(**vars(trainer), num_val_batches=[3]), None)
    trainer.global_step = 5
    trainer.callback_metrics = {"train/loss": torch.tensor(0.25)}
    bar.on_train_batch_end(trainer, None, None, None, 99)
    bar.on_validation_end(trainer, None)
    bar.on_train_end(trainer, None)
    assert "alignment: training" in (said := capsys.readouterr().out)
    assert "5/10" in said
    assert "loss 0.250" in said
