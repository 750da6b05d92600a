"""A small model and a data module of noise that samples, streams and resumes as the real one."""

from dataclasses import replace

import lightning
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from datamodules.nuscenes import NuScenesDataConfig
from datamodules.sampling import ClipSampler, ResumableLoader, StreamBatchSampler
from odvla.encoders.deformable_bev import DeformableBEVConfig
from odvla.encoders.image_backbone import ImageBackboneConfig
from odvla.fake_batch import fake_batch, fake_tokenizer
from odvla.language.causal_lm import LanguageConfig
from odvla.queries.agent import AgentQueriesConfig
from odvla.queries.map import MapQueriesConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.types import BevGrid, Talk
from odvla.vla import VLAConfig

GRID = BevGrid(-32.0, -32.0, 8.0, 8, 8)
SIZE = (48, 32)


class Picker:
    """Frames without a choice of conversations."""

    def __init__(self, frames):
        self.frames = frames

    def items(self):
        return [(frame, 0) for frame in range(self.frames)]

    def train(self, frame, part, epoch):
        return ()

    def evaluation(self, frame):
        return ()


class Requests:
    """A data set whose items are the requests themselves."""

    def __getitem__(self, request):
        return request


class NoiseData(lightning.LightningDataModule):
    """`frames` clips to learn from; evaluation streams scenes of 3 and 2 key-frames."""

    def __init__(self, tokenizer, kinds, frames=5, rows=2):
        super().__init__()
        self.tokenizer, self.kinds, self.frames, self.rows = tokenizer, kinds, frames, rows
        self.config = NuScenesDataConfig()

    def place(self):
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self):
        sampler = ClipSampler(Picker(self.frames), 1, 0, *self.place())
        batches = BatchSampler(sampler, self.rows, drop_last=False)
        return ResumableLoader(Requests(), batch_sampler=batches, collate_fn=self.batch)

    def val_dataloader(self):
        batches = StreamBatchSampler([(0, 3), (3, 5), (5, 7)], 1, Picker(7), *self.place())
        return DataLoader(Requests(), batch_sampler=batches, collate_fn=self.batch)

    test_dataloader = val_dataloader

    def batch(self, requests):
        seed, rows = requests[0].frame, len(requests)
        text_only = self.kinds == ("text",)
        made = fake_batch(
            self.tokenizer, rows=rows, image_size=SIZE, grid=GRID, kinds=self.kinds, seed=seed
        )
        valid = torch.tensor([request.valid for request in requests])
        frames = made.clip[-1]
        start = torch.tensor([not request.carried for request in requests])
        tokens = tuple(f"sample-{request.frame}" for request in requests)
        frames = replace(frames, scene_start=start, sample_tokens=tokens)
        talk = self.told_by(made.talk, tokens) if bool(valid.any()) else None
        return replace(made, clip=() if text_only else (frames,), valid=valid, talk=talk)

    @staticmethod
    def told_by(talk: Talk, tokens):
        owners = [tokens[row] for row in talk.frame_index.tolist()]
        named = [
            replace(c, sample_token=owner, id=f"{owner}-{c.kind}")
            for c, owner in zip(talk.conversations, owners, strict=True)
        ]
        return replace(talk, conversations=tuple(named))


@pytest.fixture(scope="session")
def tokenizer():
    return fake_tokenizer(vocab_size=320)


@pytest.fixture
def make_vla(tokenizer):
    def make(seed=0):
        config = VLAConfig(
            encoder=DeformableBEVConfig(
                backbone=ImageBackboneConfig(widths=(8, 8, 8, 8)),
                dim=8,
                rows=GRID.rows,
                columns=GRID.columns,
                cell_m=GRID.cell_m,
                layers=1,
                heads=1,
            ),
            queries=(
                SceneSamplerConfig(source="bev", rows=2, columns=2),
                # Every query is a token, so that every object finds one.
                AgentQueriesConfig(
                    queries=4, carried=4, max_tokens=8, layers=1, heads=1, score_threshold=0.0
                ),
                MapQueriesConfig(queries=4, max_tokens=4, layers=1, heads=1),
            ),
            language=LanguageConfig(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=32),
            object_match_m=1e6,
        )
        torch.manual_seed(seed)
        return config.build(tokenizer)

    return make


@pytest.fixture
def make_data(tokenizer):
    return lambda *kinds, **settings: NoiseData(tokenizer, kinds, **settings)


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **settings):
        return lightning.Trainer(
            **{
                "accelerator": "cpu",
                "logger": False,
                "max_epochs": -1,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "limit_val_batches": 0,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "enable_progress_bar": False,
                "default_root_dir": tmp_path,
                "callbacks": list(callbacks),
                **settings,
            }
        )

    return make
