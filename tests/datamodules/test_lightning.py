"""The data module inside a Lightning Trainer: resuming, and two processes."""

import logging

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.nuscenes import NuScenesDataConfig


class _Recorder(lightning.LightningModule):
    """Trains one number and writes down what it saw."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.stop_after = stop_after
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, batch.clip[0].sample_tokens))
        if self.stop_after is not None and len(self.seen) > self.stop_after:
            raise KeyboardInterrupt
        return (self.weight * batch.clip[0].images.float().mean()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def _fit(root, folder, stop_after=None, checkpoint=None):
    module = _Recorder(stop_after)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)],
    )
    data = NuScenesDataConfig(str(root), image_size=(16, 9), batch_size=3).build()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except (KeyboardInterrupt, SystemExit):
        assert stop_after is not None
    return module.seen


@pytest.mark.parametrize("stop_after", [2, 5, 7])
def test_an_interrupted_epoch_goes_on_where_it_stopped(circle_root, tmp_path, stop_after):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    whole = _fit(circle_root, tmp_path / "a")
    assert len(whole) == 3 * 5
    first = _fit(circle_root, tmp_path / "b", stop_after)[:stop_after]
    rest = _fit(circle_root, tmp_path / "b", checkpoint=tmp_path / "b" / "last.ckpt")
    assert first + rest == whole
