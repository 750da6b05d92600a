"""Several processes (gloo) fill one feature cache: what one makes, whoever is killed meanwhile."""

import os
import signal
import time
from collections import Counter
from dataclasses import replace

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.progress import Progress
from safetensors import safe_open

from callbacks.feature_cache import CacheSettings, FeatureCache, LearnFromCache
from callbacks.freeze import FreezeByName
from callbacks.shared_work import SharedWork
from experiments.prepare import build_model, build_tokenizer, data_module
from experiments.tiny import smoke
from odvla.errors import UserError
from odvla.token_memory import TokenMemory

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """In all processes: the last bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(town_root):
    base = smoke()
    rows = {"batch_size": 8, "clip_length": 2, "eval_batch_size": 1}
    data = replace(
        base.data,
        root=str(town_root),
        version=next(town_root.glob("v1.0-*")).name,
        image_size=(64, 36),
        instruction=replace(base.data.instruction, **rows),
    )
    return replace(base, town=None, data=data, run=("instruction",))


@pytest.fixture(scope="module")
def tokenizer(config):
    return build_tokenizer(config)


@pytest.fixture(scope="module")
def alone(config, tokenizer, tmp_path_factory):
    """What one process makes, by the past."""
    folder = tmp_path_factory.mktemp("alone")
    caches = {past: opened(config, tokenizer, folder, past) for past in ("clip", "scene")}
    for cache in caches.values():
        cache.fill()
    return caches


def opened(config, tokenizer, folder, past, progress=False):
    vla = build_model(config, tokenizer)
    config.stages.instruction.freeze.apply(vla)
    data = data_module(config, "instruction", tokenizer)
    settings = CacheSettings(folder, "s", past, "town", progress=progress)
    return FeatureCache.open(settings, vla.eval(), data, CPU)


def assert_same(folder, alone):
    """Every key-frame lies in the folder once, as one process made it."""
    held = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held.update({name.rsplit("/", 2)[0] for name in file.keys()})  # noqa: SIM118
    tokens = [alone.data.index.frames[frame].token for frame in alone.frames()]
    assert held == Counter(tokens)
    shards = type(alone.shards)(folder)
    for token in tokens:
        for stream, made in alone.shards[token].items():
            found = shards[token][stream]
            assert torch.equal(found.feats, made.feats)
            assert torch.equal(found.mask, made.mask)
            if made.predictions is not None:
                assert torch.equal(found.predictions.boxes, made.predictions.boxes)


def fill(rank, config, tokenizer, folder, past, told):
    """Fill, and write down what the bar of this process showed and who made how many frames."""
    update = Progress.update

    def watched(self, task, **changes):
        shown.append(int(changes["completed"]))
        update(self, task, **changes)

    shown, made = [], []
    Progress.update = watched
    keep = TokenMemory.keep

    def counting(self, rows, seen):
        made.append(len(rows))
        keep(self, rows, seen)

    TokenMemory.keep = counting
    cache = opened(config, tokenizer, folder, past, progress=rank == 0)
    cache.fill()
    (told / str(rank)).write_text(f"{shown[-1]} {sum(made)}")
    assert cache.known() == set(cache.frames())
    cache.verify()


@pytest.mark.parametrize("past", ["clip", "scene"])
def test_two_processes_make_what_one_makes(config, tokenizer, tmp_path, alone, past, in_processes):
    told = tmp_path / "told"
    told.mkdir()
    assert in_processes(2, fill, config, tokenizer, tmp_path, past, told) == [0, 0]
    assert_same(tmp_path / alone[past].shards.folder.name, alone[past])
    counted, made = zip(*[map(int, (told / r).read_text().split()) for r in "01"], strict=True)
    frames = len(alone[past].frames())
    assert counted == (frames, frames)  # the bar counts what all have made
    assert sum(made) == frames
    assert min(made) > frames / 4


def fill_and_die(rank, config, tokenizer, folder, past, dying, after):
    keep, calls = TokenMemory.keep, []

    def killing(self, rows, seen):
        calls.append(1)
        if rank == dying and len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        keep(self, rows, seen)

    TokenMemory.keep = killing
    cache = opened(config, tokenizer, folder, past)
    cache.shards.frames_a_shard = 3
    cache.fill()


@pytest.mark.parametrize(("past", "after"), [("clip", 2), ("scene", 20)])
def test_another_number_of_processes_goes_on_after_a_kill(
    config, tokenizer, tmp_path, alone, past, after, in_processes
):
    folder, frames = tmp_path / alone[past].shards.folder.name, len(alone[past].frames())
    for count, dying in ((2, 1), (3, 0)):
        before = len(type(alone[past].shards)(folder))
        codes = in_processes(
            *(count, fill_and_die, config, tokenizer, tmp_path, past, dying, after),
            kill_the_rest=True,
        )
        assert codes[dying] == -signal.SIGKILL
        assert before < len(type(alone[past].shards)(folder)) < frames
    again = opened(config, tokenizer, tmp_path, past)
    again.fill()
    assert_same(folder, alone[past])


def learn(config, tokenizer, folder, **settings):
    """Train an epoch from a cache that is filled on the way."""
    vla = build_model(config, tokenizer)
    stage_config = config.stages.instruction
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=2,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[
            FreezeByName(vla, stage_config.freeze),
            LearnFromCache(CacheSettings(folder, "s", "scene", "town")),
            SeesNothing(),
        ],
        **settings,
    )
    trainer.fit(stage_config.build(vla, 2), data_module(config, "instruction", tokenizer))


class SeesNothing(lightning.Callback):
    """Every batch of training is found in the memory."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert batch.clip[-1].images.shape[-1] == 1
        assert pl_module.recall(batch) is not None


def test_processes_that_train_fill_it_on_first_use(config, tokenizer, tmp_path, alone):
    two = DDPStrategy(
        find_unused_parameters=True, start_method="fork", process_group_backend="gloo"
    )
    learn(config, tokenizer, tmp_path, devices=2, strategy=two)
    folder = tmp_path / alone["scene"].shards.folder.name
    assert_same(folder, alone["scene"])
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    learn(config, tokenizer, tmp_path)  # one process finds what two made
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def fail_in_the_second(rank, told):
    """Shares of 40 steps; the second process gives up at once."""
    done = 0
    try:
        with SharedWork() as work:
            assert work.first_says(rank) == 0
            for _ in range(40):
                if work.rank == 1:
                    raise UserError("the image a.jpg is broken")
                if work.failed:
                    break
                work.add(1)
                done += 1
                time.sleep(0.05)
    except UserError as error:
        (told / str(rank)).write_text(f"{error}; {done}")


def test_what_one_process_cannot_do_all_say(tmp_path, in_processes):
    assert in_processes(3, fail_in_the_second, tmp_path) == [0, 0, 0]
    said = [(tmp_path / rank).read_text().split("; ") for rank in "012"]
    assert [sentence for sentence, _ in said] == ["the image a.jpg is broken"] * 3
    assert all(int(done) < 40 for _, done in said)


def test_files_that_are_not_seen_are_named(config, tokenizer, tmp_path, monkeypatch):
    """As on a machine that does not share the folder."""
    monkeypatch.setattr("callbacks.feature_cache.SHOWN_WITHIN_S", 0.0)
    cache = opened(config, tokenizer, tmp_path, "scene")
    frames = len(cache.frames())
    monkeypatch.setattr(FeatureCache, "_fill_share", lambda self, known, work: None)
    with pytest.raises(UserError, match=rf"^{frames} of {frames} key-frames that were cached are"):
        cache.fill()
