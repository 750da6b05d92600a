"""Reading on many processes: every key-frame once, and nothing in a worker grows."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from datamodules.collate import Collate
from datamodules.ego_state import ego_state
from datamodules.nuscenes import FrameDataset, NuScenesDataConfig, start_worker
from datamodules.nuscenes_qa import NuScenesQAConfig
from datamodules.picking import Picker
from datamodules.sampling import ClipSampler, StreamBatchSampler
from odvla.language.prompts import Dialect

RANKS, WORKERS = 2, 4


def _own_memory():
    """Bytes that this process has written to and shares with no other (Linux).

    Not "Anonymous": what a worker inherits is in there from the start, whether it has copied it yet
    or not.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) * 1024


class Watched(FrameDataset):
    """Says of every sample which process read it, and how large that process is."""

    def __getitem__(self, request):
        sample = super().__getitem__(request)
        token = sample.observation.clip[-1].sample_tokens[0]
        return token, sample.valid, os.getpid(), _own_memory()


def _loader(data, sampler, workers=WORKERS, dataset=Watched, collate=list):
    return DataLoader(
        dataset(data.index, data.config, data.loader),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        persistent_workers=True,
    )


def _data(root):
    settings = {"image_size": (16, 9), "targets": ("agents", "map")}
    return NuScenesDataConfig(str(root), "v1.0-trainval", **settings).build()


@pytest.mark.parametrize("epoch", [0, 3])
def test_training_is_dealt_out_without_doubles_or_losses(town_root, epoch):
    """Two processes with four workers each, as DDP would run them."""
    data = _data(town_root)
    numbers = data.frame_numbers("train")
    seen, readers = [], set()
    for rank in range(RANKS):
        sampler = ClipSampler(Picker(data.index, numbers), 1, 7, rank, RANKS)
        sampler.set_epoch(epoch)
        own = [row for batch in _loader(data, BatchSampler(sampler, 4, False)) for row in batch]
        assert len(own) == len(numbers) // RANKS
        seen += [token for token, _, _, _ in own]
        readers |= {(rank, pid) for _, _, pid, _ in own}
    assert sorted(seen) == sorted(data.index.frames[n].token for n in numbers)
    assert len(readers) == RANKS * WORKERS


def test_evaluation_is_dealt_out_without_doubles_or_losses(town_root):
    data = _data(town_root)
    bounds = [(s.first, s.last) for s in data.scenes("train")]  # two scenes: one a process
    seen = []
    lengths = set()
    for rank in range(RANKS):
        picker = Picker(data.index, data.frame_numbers("train"))
        sampler = StreamBatchSampler(bounds, 1, picker, rank, RANKS)
        batches = list(_loader(data, sampler))
        lengths.add(len(batches))
        own = [token for batch in batches for token, valid, _, _ in batch if valid]
        # In order, whatever the worker: temporal state is carried from batch to batch.
        assert own == [data.index.frames[n].token for n in range(*bounds[rank])]
        seen += own
    assert sorted(seen) == sorted(data.index.frames[n].token for n in data.frame_numbers("train"))
    assert len(lengths) == 1


def test_nothing_in_a_worker_grows_over_epochs(town_root):
    """Memory that is a worker's own, after each of three epochs over all key-frames."""
    data = _data(town_root)
    sampler = ClipSampler(Picker(data.index, range(len(data.index.frames))), 2, 0)
    loader = _loader(data, BatchSampler(sampler, 4, False), workers=2)
    after = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        sizes = {}
        for batch in loader:
            for _, _, pid, own in batch:
                sizes[pid] = own
        assert len(sizes) == 2
        after.append(max(sizes.values()) / 2**20)
    # The first epoch warms up: allocator, map arrays, imports.
    assert after[3] - after[1] < 4.0, after


class Talking(torch.utils.data.Dataset):
    """Makes a conversation of a key-frame, as a training row does; says which process, its size."""

    def __init__(self, source, frames, ego):
        self.source, self.frames, self.ego = source, frames, ego

    def __getitem__(self, request):
        frame, draw = request
        self.source.make(frame, draw % self.source.count(frame), ego=self.ego)
        return os.getpid(), _own_memory() if draw % 20 == 0 else 0


def test_workers_do_not_copy_the_records_that_they_read(town_root, tmp_path):
    """Python objects would become a worker's own as it reads them, more with every epoch."""
    index = _data(town_root).index
    (scene, *_) = index.scenes_of("train")
    tokens = [index.frames[n].token for n in range(scene.first, scene.last)]
    path = tmp_path / "nuscenes_qa" / "NuScenes_train_questions.json"
    path.parent.mkdir()
    questions = [
        {
            "sample_token": tokens[n % len(tokens)],
            "question": f"There is moving truck {n}; how many things are to the back of it?",
            "answer": str(n % 11),
            "template_type": "count",
            "num_hop": n % 2,
        }
        for n in range(30_000)
    ]
    path.write_text(json.dumps({"info": {}, "questions": questions}))
    del questions
    settings = {"image_size": (16, 9), "language_root": str(tmp_path)}
    data = NuScenesQAConfig(str(town_root), "v1.0-trainval", **settings).build(None, Dialect())
    source = data.source("train")
    ego = ego_state(index, index.frames[scene.first])
    generator = np.random.default_rng(0)

    class Drawn:
        def __len__(self):
            return 20

        def __iter__(self):
            draws = generator.integers(0, 2**31, (20, 100))
            frames = generator.integers(scene.first, scene.last, (20, 100))
            rows = zip(frames.tolist(), draws.tolist(), strict=True)
            return (list(zip(*row, strict=True)) for row in rows)

    loader = DataLoader(
        Talking(source, range(scene.first, scene.last), ego),
        batch_sampler=Drawn(),
        num_workers=2,
        collate_fn=list,
        worker_init_fn=start_worker,
        persistent_workers=True,
    )
    after = []
    for _ in range(3):
        sizes = {pid: own for batch in loader for pid, own in batch if own}
        after.append(max(sizes.values()) / 2**20)
    assert after[2] - after[0] < 2.0, after
    numbers = [data.source("train").count(n) for n in range(scene.first, scene.last)]
    assert sum(numbers) == 30_000


def test_workers_share_the_index(town_root):
    """Workers inherit the mapping: the arrays lie in pages of the file, not in their own."""
    data = _data(town_root)
    assert str(data.index.file) in Path("/proc/self/maps").read_text()
    sampler = BatchSampler(range(4), 2, False)

    class Where(torch.utils.data.Dataset):
        def __getitem__(self, number):
            centre = data.index.annotations.centre
            maps = Path("/proc/self/maps").read_text()
            return str(data.index.file) in maps, centre.ctypes.data, float(centre[number, 0])

    loader = DataLoader(Where(), batch_sampler=sampler, num_workers=2, collate_fn=list)
    for batch in loader:
        for mapped, address, _ in batch:
            assert mapped
            assert address == data.index.annotations.centre.ctypes.data


def test_batches_of_all_workers_are_those_of_none(town_root):
    data = _data(town_root)
    numbers = data.frame_numbers("train")[:24]

    def batches(workers):
        sampler = BatchSampler(ClipSampler(Picker(data.index, numbers), 2, 3), 4, False)
        settings = {"workers": workers, "dataset": FrameDataset, "collate": Collate()}
        if not workers:
            dataset = FrameDataset(data.index, data.config, data.loader)
            return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=Collate()))
        return list(_loader(data, sampler, **settings))

    for alone, helped in zip(batches(0), batches(4), strict=True):
        assert alone.clip[-1].sample_tokens == helped.clip[-1].sample_tokens
        np.testing.assert_array_equal(alone.clip[0].images, helped.clip[0].images)
        torch.testing.assert_close(alone.agents[-1].boxes, helped.agents[-1].boxes)
        torch.testing.assert_close(alone.map.masks, helped.map.masks)
