"""What several tests of experiments share."""

import pytest

EXPORTED = {
    "gt-traj": "gt_traj.pkl",
    "gt-traj-mask": "gt_traj_mask.pkl",
    "planning-segmentation": "planing_gt_segmentation_val",
    "vad-segmentation": "vad_gt_seg.pkl",
}


@pytest.fixture(scope="session")
def exported(town_root, tmp_path_factory):
    """The pickles of the generated town, by format, in one folder under their usual names."""
    from experiments.cli import main

    folder = tmp_path_factory.mktemp("exported")
    paths = {name: folder / file for name, file in EXPORTED.items()}
    for name, path in paths.items():
        command = ["data", "export", str(town_root), "--format", name, "--out", str(path)]
        assert main(command) == 0
    return paths
