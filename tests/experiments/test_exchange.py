"""The verbs, and an evaluation that flips rasters as the released one does, beside our metric."""

import json
import pickle

import numpy as np
import pytest
import torch

from datamodules.exchange.formats import FORMATS
from datamodules.nuscenes import NuScenesDataConfig
from experiments.cli import main
from experiments.planning_truth import PlanningTruth
from experiments.verbs import exchange
from odvla.metrics.planning import PlanningMetric
from odvla.metrics.protocol import PRESETS

VERSION = "v1.0-trainval"
# What the released evaluation does to a raster after loading it.
FLIPS = {"planning-segmentation": [-1], "vad-segmentation": [-1, -2]}


def touches(path, raster, rows, columns):
    """Box collisions of one plan [6, 2], cell by cell, with the recorded cells of the car."""
    hits = []
    for step, (x, y) in enumerate(path):
        hit = False
        for row, column in zip(rows, columns, strict=True):
            at_row = min(max(int(np.float32(y) / np.float32(0.5) + row), 0), 199)
            at_column = min(max(int(np.float32(-x) / np.float32(0.5) + column), 0), 199)
            hit |= bool(raster[step, at_row, at_column])
        hits.append(hit)
    return hits


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "golden" / "h_planning_metric.npz")


def test_the_slow_evaluation_is_the_reference(recorded):
    rows, columns = recorded["ego_box_rows"], recorded["ego_box_cols"]
    for k in range(0, 64, 3):
        raster = recorded["occupancy"][k]
        driven = np.array(touches(recorded["gt"][k], raster, rows, columns))
        assert driven.tolist() == recorded["gt_box_coll"][k].tolist()
        planned = np.array(touches(recorded["pred"][k], raster, rows, columns)) & ~driven
        assert planned.tolist() == (recorded["obj_box_col"][k] > 0).tolist()


@pytest.mark.parametrize(
    ("name", "protocol"), [("planning-segmentation", "uniad"), ("vad-segmentation", "stp3")]
)
def test_exported_files_give_the_collisions_of_our_metric(
    recorded, exported, town_root, name, protocol
):
    """The released evaluation on our files, and our own on the same key-frames."""
    truth = PlanningTruth.of(NuScenesDataConfig(str(town_root), VERSION).build())
    card = PRESETS[protocol]
    rasters = pickle.loads(exported[name].read_bytes())
    paths = pickle.loads(exported["gt-traj"].read_bytes())
    masks = pickle.loads(exported["gt-traj-mask"].read_bytes())
    tokens = truth.split.tokens
    assert set(rasters) == set(paths) == set(masks) == set(tokens)
    random = np.random.default_rng(0)
    driven = truth.driven(card)
    # Plans near road users, so that there is something to hit and something to miss.
    plans = driven + torch.from_numpy(random.normal(0, 4, (len(tokens), 6, 2))).float()
    for number, token in enumerate(tokens):
        for step, cells in enumerate(truth.data.occupancy(token, pedestrians=True).numpy()):
            if cells.any():
                row, column = random.choice(np.argwhere(cells))
                at = np.array([column, row]) * 0.5 - 49.75 + random.normal(0, 1.5, 2)
                plans[number, step] = torch.from_numpy(at)
    metric = PlanningMetric(card)
    for here, traffic in truth.chunks([card]):
        metric.update(
            tokens[here], plans[here], driven[here], truth.split.mask[here], traffic(card)
        )
    found = metric.samples()
    ours = dict(zip(found.names, found.hits.tolist(), strict=True))
    ours_driven = dict(zip(found.names, found.driven_hits.tolist(), strict=True))
    rows, columns = recorded["ego_box_rows"], recorded["ego_box_cols"]
    hits = as_stored = 0
    for token, plan, path in zip(tokens, plans.numpy(), driven.numpy(), strict=True):
        known = masks[token][0, :, 0] > 0
        np.testing.assert_allclose(paths[token][0][known], path[known], atol=1e-4)
        stored = torch.tensor(rasters[token])
        raster = torch.flip(stored, FLIPS[name])[0].numpy()
        blocked = np.array(touches(path, raster, rows, columns))
        reached = np.array(touches(plan, raster, rows, columns)) & ~blocked
        assert blocked.tolist() == ours_driven[token]
        assert reached.tolist() == ours[token]
        hits += reached.sum()
        unflipped = np.array(touches(plan, stored[0].numpy(), rows, columns)) & ~blocked
        as_stored += (unflipped != reached).sum()
    assert hits > 20
    assert as_stored > 20  # without the flips it comes out otherwise


def test_the_towns_own_cache_is_what_raw_data_give(town_root, capsys):
    """Two roads: the generator's truth, and tables, CAN bus and poses; 2.5e-5 m apart at most."""
    cache = town_root / "language" / "gpt_driver" / "cached_nuscenes_info.pkl"
    assert main(["data", "diff", str(cache), str(town_root), "--tolerance", "1e-4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["equal"]
    assert report["both"] == 120
    assert len(report["fields"]) > 100
    assert {f["name"] for f in report["fields"]} >= {
        "gt_ego_lcf_feat",
        "sweeps.timestamp",
        "can_bus",
    }


def test_export_and_diff_at_the_command_line(town_root, tmp_path, capsys):
    out = tmp_path / "gt_traj.pkl"
    export = ["data", "export", str(town_root), "--format", "gt-traj", "--out", str(out)]
    assert main(export) == 0
    assert "40 key-frames" in capsys.readouterr().out
    assert main(export) == 2
    assert "--force overwrites it" in capsys.readouterr().err
    assert main([*export, "--force", "--split", "all"]) == 0
    assert main(["data", "diff", str(out), str(town_root)]) == 0
    assert "equal within 0.001" in capsys.readouterr().out
    content = pickle.loads(out.read_bytes())
    token = list(content)[7]
    content[token] = content[token] + 0.5
    out.write_bytes(pickle.dumps(content))
    assert main(["data", "diff", str(out), str(town_root)]) == 1
    said = capsys.readouterr().out
    assert "path: 1 of 120 key-frames differ, by up to 0.5 (median of all 0)" in said
    assert f"worst: {token}" in said
    assert main(["data", "diff", str(out), str(town_root), "--tolerance", "1"]) == 0
    assert main(["data", "diff", str(out), str(town_root), "--tolerance", "nan"]) == 2
    out.write_bytes(pickle.dumps({"elsewhere": content[token]}))
    assert main(["data", "diff", str(out), str(town_root)]) == 2
    assert "none of its 1 samples is a key-frame" in capsys.readouterr().err.replace("\n", " ")


def test_flipped_rasters_are_told(town_root, exported, tmp_path, capsys):
    path = tmp_path / "vad_gt_seg.pkl"
    content = pickle.loads(exported["vad-segmentation"].read_bytes())
    path.write_bytes(pickle.dumps({t: v[..., ::-1] for t, v in content.items()}))
    assert main(["data", "diff", str(path), str(town_root)]) == 1
    said = capsys.readouterr().out
    assert "flipped along its last axis, the file differs in 0 cells alone" in said


def test_formats_of_the_command_line_are_those_there_are():
    assert tuple(FORMATS) == exchange.FORMATS
