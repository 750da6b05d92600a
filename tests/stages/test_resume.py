"""A stage that was killed ends in exactly the weights of one that was not."""

import pytest
import torch

from callbacks.freeze import FreezeByName
from callbacks.resume import LAST, ResumeCheckpoint, remove_checkpoint
from stages.planning import PlanningStageConfig

STEPS = 7  # of 3 batches an epoch: 5 clips in pairs


class KilledError(Exception):
    """Stands for the end of the process."""


def fit(vla, data, trainer_of, folder, *, every, accumulate, val_every, stop_after=None):
    config = PlanningStageConfig(steps=STEPS, accumulate=accumulate)
    stage = config.build(vla, STEPS, seed=3)
    batches = 0
    plain = stage.training_step

    def step(batch, batch_idx):
        nonlocal batches
        batches += 1
        if stop_after is not None and batches > stop_after:
            raise KilledError
        # Something random in the step: dropout on the loss.
        return plain(batch, batch_idx) * (1 + torch.rand(()))

    stage.training_step = step
    last = folder / LAST
    trainer = trainer_of(
        FreezeByName(vla, config.freeze),
        ResumeCheckpoint(folder, every),
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=None,
        val_check_interval=val_every or None,
        limit_val_batches=2 if val_every else 0,
    )
    trainer.fit(stage, data, ckpt_path=last if last.is_file() else None)
    return {name: tensor.clone() for name, tensor in vla.state_dict().items()}


@pytest.fixture(scope="module")
def undisturbed():
    """Weights of stages that were not killed, by number of batches a step."""
    return {}


@pytest.mark.parametrize(
    ("every", "stop_after", "accumulate", "val_every"),
    [
        (1, 0, 1, 0),  # before the first step
        (1, 2, 1, 0),  # inside the first epoch
        (1, 3, 1, 0),  # at its end
        (2, 5, 1, 0),  # a step after a checkpoint
        (3, 4, 1, 0),  # a checkpoint at an epoch's end
        (2, 5, 1, 2),  # with validations in between
        (2, 5, 1, 3),
        (2, 9, 2, 0),  # steps of two batches
    ],
)
def test_a_killed_stage_ends_the_same(
    every,
    stop_after,
    accumulate,
    val_every,
    undisturbed,
    make_vla,
    make_data,
    make_trainer,
    tmp_path,
):
    settings = {"every": every, "accumulate": accumulate, "val_every": val_every}
    if accumulate not in undisturbed:
        whole = {"every": 99, "accumulate": accumulate, "val_every": 0}
        undisturbed[accumulate] = fit(
            make_vla(), make_data("plan"), make_trainer, tmp_path / "whole", **whole
        )
    whole = undisturbed[accumulate]
    folder = tmp_path / "cut"
    with pytest.raises(KilledError):
        fit(make_vla(), make_data("plan"), make_trainer, folder, stop_after=stop_after, **settings)
    # A new process starts from a new model.
    cut = fit(make_vla(), make_data("plan"), make_trainer, folder, **settings)
    assert all(whole[name].equal(cut[name]) for name in whole)


def test_a_stage_that_was_trained_to_its_end_stays_as_it_is(
    make_vla, make_data, make_trainer, tmp_path
):
    settings = {"every": 3, "accumulate": 1, "val_every": 0}
    whole = fit(make_vla(), make_data("plan"), make_trainer, tmp_path, **settings)
    again = fit(make_vla(), make_data("plan"), make_trainer, tmp_path, **settings)
    assert all(whole[name].equal(again[name]) for name in whole)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_a_checkpoint_may_be_a_folder_as_deepspeeds_is(tmp_path):
    class Trainer:
        global_step, max_steps, is_global_zero = 0, 9, True

        def save_checkpoint(self, path, weights_only):
            (path / "checkpoint").mkdir(parents=True)
            (path / "checkpoint" / "step").write_text(str(self.global_step))

    trainer, callback = Trainer(), ResumeCheckpoint(tmp_path, 2)
    for step in (2, 4):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert (tmp_path / LAST / "checkpoint" / "step").read_text() == "4"
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    remove_checkpoint(tmp_path)
    remove_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())
