"""The same numbers at 1, 2 and 3 processes, with uneven shards and repeated samples."""

import json

import torch

from odvla.metrics.collisions import Traffic
from odvla.metrics.planning import PlanningMetric
from odvla.metrics.protocol import PRESETS

# Which samples each process gets; one process may get none, and samples repeat to fill up.
SHARDS = {
    1: [list(range(11))],
    2: [[0, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 1]],
    3: [[10, 2, 7, 7], [], [0, 1, 3, 4, 5, 6, 8, 9, 0]],
}


def data():
    generator = torch.Generator().manual_seed(3)
    plans, driven = (torch.randn(11, 6, 2, generator=generator) * 8 for _ in range(2))
    mask = torch.rand(11, 6, generator=generator) > 0.3
    return plans, driven, mask, torch.rand(11, 6, 200, 200, generator=generator) < 0.01


def work(rank, out):
    torch.set_num_threads(1)
    plans, driven, mask, raster = data()
    # The second group of processes is two of the three.
    groups = {3: None, 2: torch.distributed.new_group([0, 1])}
    for world, group in groups.items():
        if rank >= world:
            continue
        metric = PlanningMetric(PRESETS["uniad"], process_group=group)
        for row in SHARDS[world][rank]:
            rows = slice(row, row + 1)
            metric.update([f"t{row}"], plans[rows], driven[rows], mask[rows], Traffic(raster[rows]))
        found = [metric.compute(), list(metric.samples().names)]
        (out / f"{world}-{rank}.json").write_text(json.dumps(found))


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path, in_processes):
    plans, driven, mask, raster = data()
    alone = PlanningMetric(PRESETS["uniad"])
    alone.update([f"t{row}" for row in SHARDS[1][0]], plans, driven, mask, Traffic(raster))
    expected = json.loads(json.dumps(alone.compute()))
    assert in_processes(3, work, tmp_path) == [0, 0, 0]
    for world in (2, 3):
        for rank in range(world):
            scores, names = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
            assert scores == expected  # to the last bit
            assert sorted(names) == sorted(f"t{row}" for row in range(11))
