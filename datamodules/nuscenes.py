"""nuScenes key-frames as Batches: the same code for a generated town, v1.0-mini and v1.0-trainval.

The language data sets build on this module; see conversations.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import cv2
import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from datamodules.agents import agent_targets
from datamodules.collate import Collate, Observation, Sample, Targets, Tokenises
from datamodules.ego_state import ego_state, plan_targets
from datamodules.frames import FrameLoader
from datamodules.image_geometry import ImageGeometry
from datamodules.index_file import ensure_index, load_index
from datamodules.map_raster import map_targets
from datamodules.occupancy import FrameOccupancy, traffic_targets
from datamodules.picking import ConversationSource, Picker
from datamodules.records import FrameRecord, Index, SceneRecord
from datamodules.sampling import (
    ClipRequest,
    ClipSampler,
    PlainLoader,
    ResumableLoader,
    StreamBatchSampler,
)
from odvla.errors import UserError
from odvla.language.dialect_file import PLAIN
from odvla.types import Batch, BevGrid, Conversation, EgoState, PlanTargets

log = logging.getLogger(__name__)
Split = Literal["train", "val", "test"]
TARGETS = ("agents", "map", "traffic")
DEFAULT_GRID = BevGrid(-32.0, -32.0, 2.0, 32, 32)


@dataclass(frozen=True)
class NuScenesDataConfig:
    """Settings of NuScenesDataModule; the language data sets add theirs."""

    root: str = ""  # "" means the folder named by ODVLA_DATA, or ./data
    version: str = "v1.0-mini"
    image_size: tuple[int, int] = (320, 180)  # width, height; files of another size are resized
    crop_top: int = 0  # rows cut off at the top after that
    pad_multiple: int = 1  # black at the bottom and the right, up to a multiple of so many pixels
    # So many images may be missing or broken before the run stops. Each is named, and its key-frame
    # becomes a row that does not count (never another key-frame).
    broken_images: int = 0
    lidar: bool = False  # read the key-frames' lidar sweeps, too; set for encoders that need them
    clip_length: int = 1  # key-frames of a training clip, "now" included
    batch_size: int = 8
    eval_batch_size: int = 8  # scenes streamed side by side
    targets: tuple[str, ...] = ()  # of TARGETS; egos and plans are always given
    grid: BevGrid = DEFAULT_GRID  # must be the encoder's
    agent_range_m: float = 0.0  # agents within +- this in x and y are targets; 0: those on the grid
    num_workers: int = 0
    cache_images: bool = False  # keep decoded images in memory
    cache_limit_gb: float = 2.0  # a process; what does not fit is read from disk every time
    train_scenes: int = 0  # use only the first so many scenes; 0: all
    eval_scenes: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check values that would fail late.

        Raises:
            UserError: naming the setting and its value.
        """
        for name in ("clip_length", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        unknown = set(self.targets) - set(TARGETS)
        if unknown:
            raise UserError(f"targets knows {', '.join(TARGETS)}, not {sorted(unknown)[0]!r}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(f"data.image_size must be (width, height), not {self.image_size}")
        if self.broken_images < 0:
            raise UserError(f"data.broken_images must be 0 or more, not {self.broken_images}")
        _ = self.image_geometry  # checks crop_top and pad_multiple

    @property
    def folder(self) -> Path:
        """The data root."""
        return Path(self.root or os.environ.get("ODVLA_DATA", "data")).expanduser()

    @property
    def agent_extent_m(self) -> tuple[float, float, float, float]:
        """x_min, x_max, y_min, y_max of the agents that are targets."""
        reach = self.agent_range_m
        return (-reach, reach, -reach, reach) if reach > 0 else self.grid.extent_m

    @property
    def image_geometry(self) -> ImageGeometry:
        """What is done to every image."""
        width, height = self.image_size
        return ImageGeometry((width, height), self.crop_top, self.pad_multiple)

    def build(self, tokenizer: Tokenises | None = None) -> NuScenesDataModule:
        """The data module."""
        return NuScenesDataModule(self, tokenizer)


@dataclass(frozen=True)
class EvaluationFrame:
    """What evaluation and baselines need to know about one key-frame."""

    sample_token: str
    scene_name: str
    position: int  # in its scene
    plan: PlanTargets  # one row, from the poses
    ego: EgoState  # one row


# Samples without images that are kept, a few kilobytes each: a planning stage comes back to each
# of a small town's seven times. Of more key-frames, the first so many that are asked for.
KEPT_SAMPLES = 10_000


class FrameDataset(Dataset[Sample]):
    """Key-frames by ClipRequest. Workers can have copies: it starts with arrays only."""

    def __init__(
        self,
        index: Index,
        config: NuScenesDataConfig,
        loader: FrameLoader,
        source: ConversationSource | None = None,
        *,
        unseen: bool = False,
    ) -> None:
        self.index = index
        self.config = config
        self.loader = loader
        self.source = source
        self.unseen = unseen
        self._kept: dict[ClipRequest, Sample] = {}

    def __getitem__(self, request: ClipRequest) -> Sample:
        """Read one row.

        Raises:
            UserError: an image or a map is missing or broken; the sentence names it.
        """
        sample = self._kept.get(request)
        if sample is None:
            sample = self.read(request, self.config.targets)
            if self.unseen and len(self._kept) < KEPT_SAMPLES:
                self._kept[request] = sample
        return sample

    def read(
        self,
        request: ClipRequest,
        targets: Sequence[str],
        conversations: tuple[Conversation, ...] | None = None,
    ) -> Sample:
        """One row with the given targets, and with given conversations or the source's."""
        frame = self.index.frames[request.frame]
        frames = self.clip_frames(frame, request.steps)
        clip = tuple(
            self.loader.load(
                f,
                # A repeated first frame starts again and again, so that a clip at a scene's start
                # gives the state that streaming the scene gives.
                scene_start=f.position == 0 or (step == 0 and not request.carried),
                blank=not request.valid,
                unseen=self.unseen,
            )
            for step, f in enumerate(frames)
        )
        ego = ego_state(self.index, frame)
        # A key-frame with a broken image is not learned from and not talked about.
        valid = request.valid and all(self.loader.is_whole(f) for f in frames)
        if conversations is None or valid < request.valid:
            conversations = ()
            if self.source is not None and valid == request.valid:
                make = partial(self.source.make, frame.number, ego=ego)
                conversations = tuple(make(number) for number in request.conversations)
        extent_m = self.config.agent_extent_m
        return Sample(
            Observation(clip, ego),
            Targets(
                plan=plan_targets(self.index, frame),
                agents=tuple(agent_targets(self.index, f, extent_m) for f in frames)
                if "agents" in targets
                else (),
                map=map_targets(self.index, frame, self.config.grid) if "map" in targets else None,
                traffic=traffic_targets(self.index, frame) if "traffic" in targets else None,
            ),
            conversations,
            valid,
        )

    def clip_frames(self, frame: FrameRecord, steps: int) -> list[FrameRecord]:
        """The last `steps` key-frames up to `frame`; a scene's first one repeats for older ones."""
        frames = [frame]
        while len(frames) < steps:
            oldest = frames[0]
            frames.insert(0, self.index.frames[oldest.prev] if oldest.prev >= 0 else oldest)
        return frames


class NuScenesDataModule(lightning.LightningDataModule):
    """Random clips of the train split, streamed scenes of the val and test split.

    Use it with Trainer(use_distributed_sampler=False): its samplers share out the work themselves.
    The test split of v1.0-mini and v1.0-trainval is their val split, as in the literature.

    Args:
        config: see NuScenesDataConfig.
        tokenizer: turns conversations into tensors; not needed where there are none.
    """

    def __init__(self, config: NuScenesDataConfig, tokenizer: Tokenises | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.training = PLAIN  # how conversations of the train split are cut up
        self.unseen = False  # training clips come without images: what they show is known already
        self._sources: dict[str, ConversationSource | None] = {}

    @cached_property
    def index(self) -> Index:
        """The root's index: a memory-mapped file, built at the first use.

        Kept, because every look for it checks that its sources are still the same.

        Raises:
            UserError: the root is incomplete or inconsistent.
        """
        return load_index(self.config.folder, self.config.version)

    @cached_property
    def loader(self) -> FrameLoader:
        """Reads images; shared by all loaders of this module, and so is its memory of images."""
        limit_gb = self.config.cache_limit_gb if self.config.cache_images else 0.0
        geometry, budget = self.config.image_geometry, self.config.broken_images
        return FrameLoader(self.index, geometry, limit_gb, budget, lidar=self.config.lidar)

    def prepare_data(self) -> None:
        """Make the index where there is none: once on each machine, before any process reads."""
        ensure_index(self.config.folder, self.config.version)

    def setup(self, stage: str) -> None:
        """Read the tables and the conversations of the splits a stage needs."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.scenes(split)
            self.source(split)

    def make_source(self, split: str) -> ConversationSource | None:
        """Conversations of a split; None here, language data sets override it."""
        return None

    def source(self, split: str) -> ConversationSource | None:
        """Conversations of a split, read once."""
        key = "train" if split == "train" else "val"
        if key not in self._sources:
            self._sources[key] = self.make_source(key)
        return self._sources[key]

    def picker(self, split: str) -> Picker:
        """Chooses frames and conversations of a split."""
        return Picker(
            self.index, self.frame_numbers(split), self.source(split), seed=self.config.seed
        )

    def frame_numbers(self, split: str) -> list[int]:
        """Every key-frame of a split, scene by scene."""
        return [n for scene in self.scenes(split) for n in range(scene.first, scene.last)]

    @property
    def tests_on_val(self) -> bool:
        """Whether the test split is the val split: all versions but v1.0-test."""
        return self.config.version != "v1.0-test"

    def scenes(self, split: str) -> tuple[SceneRecord, ...]:
        """Scenes of a split in table order, cut to train_scenes or eval_scenes."""
        limit = self.config.train_scenes if split == "train" else self.config.eval_scenes
        if split == "test" and self.tests_on_val:
            split = "val"
        return self.index.scenes_of(split)[: limit or None]

    def train_dataloader(self) -> ResumableLoader:
        """Clips at random; an epoch visits every key-frame (that has conversations) once."""
        sampler = ClipSampler(
            self.picker("train"), self.config.clip_length, self.config.seed, *self._place()
        )
        batches = BatchSampler(sampler, self.config.batch_size, drop_last=False)
        settings = self._loader_settings("train")
        settings["dataset"].unseen = self.unseen
        return ResumableLoader(batch_sampler=batches, **settings)

    def train_clips(
        self, known: Container[int] = (), *, place: tuple[int, int] = (0, 1)
    ) -> DataLoader:
        """Every clip that training may draw, in order, without conversations.

        Args:
            known: frames that need not be given; a batch is left out where all of its are.
            place: rank and number of processes that share out what is left.
        """
        frames, size = self.frame_numbers("train"), self.config.batch_size
        groups = [frames[k : k + size] for k in range(0, len(frames), size)]
        wanted = [group for group in groups if not all(frame in known for frame in group)]
        rank, world_size = place
        requests = [
            [ClipRequest(frame, self.config.clip_length) for frame in group]
            for group in wanted[rank::world_size]
        ]
        return PlainLoader(batch_sampler=requests, **self._loader_settings("train"))

    def val_dataloader(self) -> DataLoader:
        """Val scenes streamed side by side, one key-frame a batch."""
        return self.stream("val")

    def test_dataloader(self) -> DataLoader:
        """Test scenes streamed side by side, one key-frame a batch."""
        return self.stream("test")

    def stream(
        self,
        split: str,
        *,
        talk: bool = True,
        known: Container[int] | None = None,
        place: tuple[int, int] | None = None,
    ) -> DataLoader:
        """Any split streamed as in evaluation.

        Args:
            split: train, val or test.
            talk: with the conversations about its key-frames.
            known: frames that need not be given, see StreamBatchSampler.
            place: rank and number of the processes that share out the scenes; None: as in training.
        """
        bounds = [(scene.first, scene.last) for scene in self.scenes(split)]
        picker = self.picker(split) if talk else Picker(self.index, self.frame_numbers(split))
        place = place or self._place()
        batches = StreamBatchSampler(bounds, self.config.eval_batch_size, picker, *place, known)
        return PlainLoader(batch_sampler=batches, **self._loader_settings(split))

    def frame(
        self,
        sample_token: str,
        conversations: tuple[Conversation, ...] = (),
        *,
        clip_length: int = 1,
    ) -> Batch:
        """One key-frame as a batch of one row, with all targets the root has for it.

        Args:
            sample_token: any sample of the root, whatever its split.
            conversations: put into batch.talk (needs the tokenizer).
            clip_length: key-frames of the clip.

        Raises:
            UserError: no such sample, or a broken image.
        """
        record = self.index.frame(sample_token)
        dataset = FrameDataset(self.index, self.config, self.loader)
        request = ClipRequest(record.number, clip_length)
        sample = dataset.read(request, self._available(record), conversations)
        return Collate(self.tokenizer)([sample])

    def evaluation_frames(self, split: str, *, height_m: float = 0.0) -> Iterator[EvaluationFrame]:
        """Ground truth and ego state of every key-frame of a split, scene by scene.

        Args:
            split: train, val or test.
            height_m: ego_state.UNIAD_PLAN_POINT_M gives the ground truth of UniAD's evaluation,
                0 the path of the lidar.
        """
        for scene in self.scenes(split):
            for number in range(scene.first, scene.last):
                record = self.index.frames[number]
                yield EvaluationFrame(
                    record.token,
                    scene.name,
                    record.position,
                    plan_targets(self.index, record, height_m),
                    ego_state(self.index, record),
                )

    def occupancy(self, sample_token: str, *, pedestrians: bool = False) -> Tensor:
        """Cells other road users will fill in the next 3 s, in the lidar frame of t0.

        Args:
            sample_token: t0.
            pedestrians: with pedestrians (VAD's map), or vehicles only (UniAD's).

        Returns:
            Bool [6, 200, 200]: row 0 at y = -50 m, column 0 at x = -50 m, cells of 0.5 m.
        """
        return torch.from_numpy(
            self._occupancy(self.index.frame(sample_token), pedestrians=pedestrians)
        )

    @cached_property
    def _occupancy(self) -> FrameOccupancy:
        return FrameOccupancy(self.index)

    def _available(self, record: FrameRecord) -> tuple[str, ...]:
        mapped = self.index.location(record) in self.index.maps
        return tuple(name for name in TARGETS if name != "map" or mapped)

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _loader_settings(self, split: str) -> dict:
        workers = self.config.num_workers
        source = self.source(split)
        if source is not None and self.tokenizer is None:
            raise UserError(f"{type(self).__name__} needs a tokenizer to make batches")
        return {
            "dataset": FrameDataset(self.index, self.config, self.loader, source),
            "collate_fn": Collate(self.tokenizer, self.training if split == "train" else PLAIN),
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": start_worker,
            # Nothing random happens in workers; the seed only keeps torch's global state untouched.
            "generator": torch.Generator().manual_seed(self.config.seed),
        }


def start_worker(_worker: int) -> None:
    """One thread a worker: the workers are the parallelism."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    np.seterr(all="warn")
