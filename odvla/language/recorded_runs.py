"""Runs of a language model on a GPU, recorded as CUDA graphs and played again.

A run of a 0.5B model on a few tokens is some two thousand kernels of microseconds each. Asking for
them one by one from Python takes several times as long as they do; a graph is asked for once.

A graph reads and writes where it did when it was recorded. So what a run reads beside the weights
(tokens, places, what they see, keys and values) stays where it is from one call of `decode` to the
next, and the sizes of runs are rounded up, for few different graphs. The first run of a size is an
ordinary one, the second is recorded, those after it are played: what is asked for once costs no
more than before.

Nothing is recorded where a graph would not do what the module does: on a CPU, for weights that are
gathered before each use (FSDP2, ZeRO), for modules with hooks. Recordings end with the weights'
places, and when the model goes back to training, which wants the memory.

Shapes: G rows, T nodes of a run, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from odvla.language.kv_cache import RowCache

log = logging.getLogger(__name__)

SLOT_STEP = 256  # slots of a cache, and those that a run sees, are multiples of this
NODE_STEP = 8  # above so many nodes; below, powers of two

# A run on trees: ids, slots and positions [3, G, T] and what each node sees [G, T, slots], on the
# device -> hidden states [G, T, D].
Run = Callable[[Tensor, Tensor], Tensor]
# A run -> where its result will be, and what computes it there: now, and again whenever called.
Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def cuda_graph(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Record a run as a CUDA graph, without running it."""
    graph = torch.cuda.CUDAGraph()
    # Weights that autocast has already converted live only as long as its context does: the
    # conversion must be part of the graph. Another thread may pin memory meanwhile (a data loader).
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            states = run()
    finally:
        torch.set_autocast_cache_enabled(cached)
    return states, graph.replay


def recorder_for(language: nn.Module) -> Recorder | None:
    """How the runs of a model can be recorded; None: they cannot."""
    sharded = any(hasattr(p, "_local_tensor") for p in language.parameters())
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in language.modules())
    if sharded or hooked or any(p.device.type != "cuda" for p in language.parameters()):
        return None
    return cuda_graph


@dataclass
class _Recording:
    """A run of one size: where it reads, where it writes, and how it is done again."""

    numbers: Tensor
    visible: Tensor
    states: Tensor
    replay: Callable[[], None]


class RecordedRuns:
    """The cache of a batch of a fixed number of rows, and the runs that were recorded on it.

    Args:
        cache: keys and values, which stay in one place once they have one.
        recorder: how a run is recorded.
    """

    def __init__(self, cache: RowCache, recorder: Recorder) -> None:
        self.cache = cache
        self._recorder: Recorder | None = recorder
        self._met: set[Hashable] = set()  # sizes that were run once
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, run: Run, numbers: Tensor, visible: Tensor, device: torch.device) -> Tensor:
        """Do a run, in whatever way.

        Args:
            run: does it; on this cache, and with the same weights in all calls.
            numbers: [3, G, T] int64, ids, slots and positions of the nodes.
            visible: [G, T, slots] bool, what each node sees.
            device: of the model.

        Returns:
            states [G, T, D], good until the next run.
        """
        size = visible.shape
        recording = self._recordings.get(size)
        if recording is None:
            inputs = numbers.to(device), visible.to(device)
            if size not in self._met or self._recorder is None:
                self._met.add(size)
                return run(*inputs)
            try:
                recording = _Recording(*inputs, *self._recorder(lambda: run(*inputs)))
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                log.warning("runs of the language model cannot be recorded: %s", reason)
                self._recorder = None
                return run(*inputs)
            self._recordings[size] = recording
        else:
            recording.numbers.copy_(numbers)
            recording.visible.copy_(visible)
        recording.replay()
        return recording.states


class RunStore:
    """Recorded runs of each model, from one call of `decode` to the next."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, tuple[Hashable, RecordedRuns]] = (
            WeakKeyDictionary()
        )

    @contextmanager
    def lend(
        self, language: nn.Module, layers: int, rows: int, capacity: int
    ) -> Iterator[RecordedRuns | None]:
        """Recorded runs with an empty cache, to be given back unless something goes wrong.

        Args:
            language: the model.
            layers: whose keys and values are cached.
            rows: of the batch.
            capacity: slots that a row needs.

        Yields:
            None where runs of the model are not recorded.
        """
        recorder = recorder_for(language)
        if recorder is None:
            yield None
            return
        surroundings = _surroundings(language, rows)
        before, runs = self._kept.pop(language, (None, None))
        if runs is None or before != surroundings or runs.cache.capacity < capacity:
            runs = RecordedRuns(RowCache(layers, -(-capacity // SLOT_STEP) * SLOT_STEP), recorder)
        runs.cache.clear()
        yield runs
        self._kept[language] = (surroundings, runs)

    def forget(self, language: nn.Module) -> None:
        """Free the memory of a model's recordings and of their cache."""
        self._kept.pop(language, None)


def nodes_run(nodes: int) -> int:
    """Nodes of a run that is recorded, for a tree of so many."""
    if nodes > NODE_STEP:
        return -(-nodes // NODE_STEP) * NODE_STEP
    return 1 << (nodes - 1).bit_length()


def _surroundings(language: nn.Module, rows: int) -> Hashable:
    """All that a recording depends on, beside what it reads anew."""
    device = next(language.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (
        rows,
        tuple(p.data_ptr() for p in language.parameters()),
        autocast,
        torch.is_inference_mode_enabled(),  # its tensors cannot be written to outside of it
        torch.get_float32_matmul_precision(),
    )


RUNS = RunStore()
