"""Reading on many processes: every key-frame once, and nothing in a worker grows."""

import gc
import json
import os
import tracemalloc
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from datamodules.collate import Collate
from datamodules.ego_state import ego_state
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.nuscenes import FrameDataset, NuScenesDataConfig, start_worker
from datamodules.nuscenes_qa import NuScenesQAConfig
from datamodules.picking import Picker
from datamodules.sampling import ClipSampler, StreamBatchSampler
from odvla.language.prompts import Dialect

RANKS, WORKERS = 2, 4


class Watched(FrameDataset):
    """Says of every sample which process read it."""

    def __getitem__(self, request):
        sample = super().__getitem__(request)
        token = sample.observation.clip[-1].sample_tokens[0]
        return token, sample.valid, os.getpid()


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
        seen += [token for token, _, _ in own]
        readers |= {(rank, pid) for _, _, pid in own}
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
        own = [token for batch in batches for token, valid, _ in batch if valid]
        # In order, whatever the worker: temporal state is carried from batch to batch.
        assert own == [data.index.frames[n].token for n in range(*bounds[rank])]
        seen += own
    assert sorted(seen) == sorted(data.index.frames[n].token for n in data.frame_numbers("train"))
    assert len(lengths) == 1


def test_nothing_grows_with_the_epochs(town_root):
    """Memory that Python and NumPy hold, after each of three more epochs over val."""
    data = _data(town_root)
    dataset = FrameDataset(data.index, data.config, data.loader)
    sampler = ClipSampler(Picker(data.index, data.frame_numbers("val")), 2, 0)
    after = []
    tracemalloc.start()
    try:
        for epoch in range(4):
            sampler.set_epoch(epoch)
            for request in sampler:
                dataset[request]
            gc.collect()
            after.append(tracemalloc.get_traced_memory()[0] / 2**20)
    finally:
        tracemalloc.stop()
    # The first epoch fills what is remembered once: map arrays, calibrations. Other tests' threads
    # may hold some kB more; the images of samples that stay would be 7 MB.
    assert after[3] - after[1] < 0.5, after


def _objects_held(root):
    """How many Python objects ``root`` leads to, without classes, modules and functions.

    A worker shares its parent's memory until somebody writes there, and reading an object writes:
    its count of references stands in it. What a worker will copy is therefore a matter of how many
    objects there are to read, which can be counted; its memory says it only amid that of all else
    that this process holds.
    """
    known, waiting = set(), [root]
    apart = (type, ModuleType, FunctionType, BuiltinFunctionType)
    while waiting:
        found = waiting.pop()
        if id(found) not in known and not isinstance(found, apart):
            known.add(id(found))
            waiting += gc.get_referents(found)
    return len(known)


def test_workers_find_no_records_as_objects_to_copy(town_root, tmp_path):
    """Python objects would become a worker's own as it reads them, more with every epoch."""
    index = _data(town_root).index
    (scene, *_) = index.scenes_of("train")
    tokens = [index.frames[n].token for n in range(scene.first, scene.last)]
    ego = ego_state(index, index.frames[scene.first])

    def held(number):
        """Of a source with so many questions, before any was read and after all of a key-frame."""
        root = tmp_path / str(number)
        path = root / "nuscenes_qa" / "NuScenes_train_questions.json"
        path.parent.mkdir(parents=True)
        questions = [
            {
                "sample_token": tokens[n % len(tokens)],
                "question": f"There is moving truck {n}; how many things are to the back of it?",
                "answer": str(n % 11),
                "template_type": "count",
                "num_hop": n % 2,
            }
            for n in range(number)
        ]
        path.write_text(json.dumps({"info": {}, "questions": questions}))
        settings = {"image_size": (16, 9), "language_root": str(root)}
        data = NuScenesQAConfig(str(town_root), "v1.0-trainval", **settings).build(None, Dialect())
        source = data.source("train")
        before = _objects_held(source)
        assert sum(source.count(n) for n in range(scene.first, scene.last)) == number
        for row in range(source.count(scene.first)):
            source.make(scene.first, row, ego=ego)
        return before, _objects_held(source)

    few, many = held(100), held(20_000)
    assert many[0] - few[0] < 1000, (few, many)
    assert many[1] - many[0] < 100, many


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


class Counted:
    """A source of conversations that counts what it is asked for."""

    def __init__(self, source):
        self.source, self.asked = source, []

    def make(self, frame, number, ego):
        self.asked.append((frame, number))
        return self.source.make(frame, number, ego=ego)


@pytest.mark.parametrize("room", [5, 10_000])
def test_samples_without_images_are_made_once_as_far_as_there_is_room(town_root, monkeypatch, room):
    monkeypatch.setattr("datamodules.nuscenes.KEPT_SAMPLES", room)
    config = GPTDriverConfig(str(town_root), "v1.0-trainval", image_size=(16, 9))
    data = config.build(None, Dialect("compact"))
    picker, source = data.picker("train"), Counted(data.source("train"))
    unseen = FrameDataset(data.index, data.config, data.loader, source, unseen=True)
    afresh = FrameDataset(data.index, data.config, data.loader, data.source("train"), unseen=True)
    sampler = ClipSampler(picker, 1, 7)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for request in sampler:
            own, other = unseen[request], afresh.read(request, ())
            assert own.conversations == other.conversations
            assert torch.equal(own.targets.plan.waypoints, other.targets.plan.waypoints)
            assert own.observation.clip[0].sample_tokens == other.observation.clip[0].sample_tokens
    items = len(sampler)
    assert len(source.asked) == items + 2 * max(0, items - room)
    seen = FrameDataset(data.index, data.config, data.loader, source)
    first = next(iter(sampler))
    assert seen[first].conversations == seen[first].conversations
    assert len(source.asked) == items + 2 * max(0, items - room) + 2  # with images: never kept
