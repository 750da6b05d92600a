"""Plans held to somebody's ground truth: ours exported, a shifted one, and what can be wrong."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from datamodules.nuscenes import NuScenesDataConfig
from experiments.cli import main
from experiments.planning_truth import PlanningTruth
from experiments.result_files import compare, planning_tables, read_results
from experiments.score import ScoreRequest, score
from experiments.truth_files import TruthFiles
from odvla.errors import UserError
from odvla.metrics.protocol import PRESETS, ProtocolCard

PROTOCOLS = ("uniad", "stp3", "vad", "sparsedrive")
SHIFT = np.array([0.3, -0.4], dtype=np.float32)


@pytest.fixture(scope="module")
def truth(town_root):
    return PlanningTruth.of(NuScenesDataConfig(str(town_root), "v1.0-trainval").build())


@pytest.fixture(scope="module")
def plans(truth, tmp_path_factory):
    """Plans about the driven path, and at every third step where somebody is."""
    random = np.random.default_rng(0)
    driven = truth.driven(PRESETS["uniad"]).numpy()
    found = {}
    for token, path in zip(truth.split.tokens, driven, strict=True):
        plan = path + random.normal(0, 1, path.shape)
        for step, cells in enumerate(truth.data.occupancy(token, pedestrians=True).numpy()):
            if cells.any() and step % 3 == 2:
                row, column = random.choice(np.argwhere(cells))
                plan[step] = np.array([column, row]) * 0.5 - 49.75
        found[token] = plan
    return _pickle(tmp_path_factory.mktemp("plans") / "plans.pkl", found)


def _pickle(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def _load(path):
    return pickle.loads(path.read_bytes())


def _numbers(found):
    """All numbers of planning, without their cards."""
    planning = found.report.numbers["planning"]
    return {
        name: {key: value for key, value in scores.items() if key != "card"}
        for name, scores in planning.items()
    }


@pytest.fixture(scope="module")
def ask(town_root, plans):
    request = ScoreRequest(plans, town_root, protocols=PROTOCOLS, beyond=False)
    return lambda **files: score(replace(request, truth=TruthFiles(**files)))


@pytest.fixture(scope="module")
def default(ask):
    return ask()


def test_our_own_pickles_give_exactly_the_numbers_of_the_default_truth(ask, default, exported):
    rasters = (exported["planning-segmentation"], exported["vad-segmentation"])
    for files in ({}, {"rasters": rasters}):
        found = ask(paths=exported["gt-traj"], **files)
        theirs, ours = _numbers(found), _numbers(default)
        # The exported path is the one that UniAD's table follows.
        for name in ("uniad", "stp3"):
            assert theirs[name] == ours[name]
            assert theirs[name]["box_collision_avg"] > 0.05
        for name in ("vad", "sparsedrive"):  # these follow the lidar: on level ground the same
            for key, value in ours[name].items():
                if key != "intervals_95":
                    assert theirs[name][key] == pytest.approx(value, abs=1e-4)
        assert found.said == default.said == ()
    assert _numbers(ask(rasters=rasters)) == _numbers(default)


def test_a_shifted_truth_gives_shifted_errors(exported, town_root, truth, tmp_path):
    """Plans on the driven path, 0.5 m from a truth shifted by (0.3, -0.4), at known steps."""
    driven = truth.driven(PRESETS["uniad"]).double().numpy()
    path = _pickle(tmp_path / "p.pkl", dict(zip(truth.split.tokens, driven, strict=True)))
    paths = {token: values[0] + SHIFT for token, values in _load(exported["gt-traj"]).items()}
    shifted = _pickle(tmp_path / "shifted.pkl", paths)  # [6, 2], as some files have it
    files = TruthFiles(shifted, exported["gt-traj-mask"])
    found = score(ScoreRequest(path, town_root, protocols=("uniad", "vad"), truth=files))
    known = truth.split.mask.double().mean(0)
    uniad, vad = (found.report.numbers["planning"][name] for name in ("uniad", "vad"))
    for second in (1, 2, 3):
        expected = 0.5 * float(known[2 * second - 1])  # steps that are not known count as 0
        assert uniad[f"l2_{second}s_m"] == pytest.approx(expected, abs=1e-6)
        assert vad[f"l2_{second}s_m"] == pytest.approx(0.5, abs=1e-6)
    assert 0 < expected < 0.5
    (apart,) = [one["from_data_root"] for one in found.report.numbers["truth"][:1]]
    assert apart["largest_m"] == pytest.approx(0.5, abs=1e-3)
    assert apart["median_m"] == pytest.approx(0.5, abs=1e-3)
    assert any(f"{shifted} are up to 0.50 m from those of the data root" in s for s in found.said)
    masks = {token: np.zeros_like(values) for token, values in _load(files.mask).items()}
    none = TruthFiles(shifted, _pickle(tmp_path / "none.pkl", masks))
    with pytest.raises(UserError, match="under 'vad'"):
        score(ScoreRequest(path, town_root, protocols=("vad",), truth=none))


def test_the_rasters_of_a_file_are_what_is_collided_with(ask, default, exported, tmp_path):
    empty = {t: np.zeros((1, 6, 200, 200), np.uint8) for t in _load(exported["gt-traj"])}
    file = _pickle(tmp_path / "vad_gt_seg.pkl", empty)
    found = ask(rasters=(file,))
    planning = found.report.numbers["planning"]
    for name, before in default.report.numbers["planning"].items():
        after = planning[name]
        used = name in ("stp3", "vad")  # with pedestrians, on a raster
        assert before["box_collision_3s"] > 0
        assert after["box_collision_3s"] == (0 if used else before["box_collision_3s"])
        assert after["l2_avg_m"] == before["l2_avg_m"]
        assert after["card"]["traffic"].startswith("sha256:") == used
        assert after["card"]["truth"] == "data root"


def test_the_card_tells_the_truth_and_results_are_not_mixed(ask, default, exported, tmp_path):
    shifted = {token: values + SHIFT for token, values in _load(exported["gt-traj"]).items()}
    file = _pickle(tmp_path / "gt_traj.pkl", shifted)
    (tmp_path / "gt_traj_mask.pkl").write_bytes(exported["gt-traj-mask"].read_bytes())
    ours, others = ask(paths=exported["gt-traj"]), ask(paths=file)
    cards = [f.report.numbers["planning"]["uniad"]["card"] for f in (default, ours, others)]
    assert [card["driven"] for card in cards] == ["uniad", "file", "file"]
    assert cards[0]["truth"] == "data root"
    assert len({card["truth"] for card in cards}) == 3
    assert f"driven path of a file ({cards[1]['truth']})" in ours.report.tables[0].note
    for name, found in (("default", default), ("ours", ours), ("others", others)):
        found.write(tmp_path / name)
    for pair in (("default", "ours"), ("ours", "others")):
        results = read_results([tmp_path / name for name in pair])
        for refuses in (planning_tables, compare):
            with pytest.raises(UserError, match=r"cannot be compared: .*truth \("):
                refuses(results)
    # The same values in another file (here as float64) are the same truth.
    again = {token: values.astype(np.float64) for token, values in shifted.items()}
    same = ask(paths=_pickle(tmp_path / "again.pkl", again), mask=exported["gt-traj-mask"])
    assert same.report.numbers["planning"]["uniad"]["card"] == cards[2]


def test_cards_from_before_are_of_the_data_root():
    old = PRESETS["uniad"].as_dict()
    del old["truth"], old["traffic"]
    assert ProtocolCard.from_dict(old, "x") == PRESETS["uniad"]
    del old["l2"]
    with pytest.raises(UserError, match="no whole protocol card"):
        ProtocolCard.from_dict(old, "x")


def test_missing_and_extra_samples_are_named_and_counted(ask, default, exported, tmp_path):
    paths, masks = (_load(exported[name]) for name in ("gt-traj", "gt-traj-mask"))
    first, second = list(paths)[:2]
    for content in (paths, masks):
        content["of-another-root"] = content.pop(first)
    file = _pickle(tmp_path / "gt_traj.pkl", paths)
    _pickle(tmp_path / "gt_traj_mask.pkl", masks)
    rasters = _load(exported["vad-segmentation"])
    del rasters[second]
    found = ask(paths=file, rasters=(_pickle(tmp_path / "vad_gt_seg.pkl", rasters),))
    numbers = found.report.numbers
    count = len(paths)
    assert numbers["planning"]["uniad"]["n_samples"] == count - 2
    assert numbers["counts"]["in_split"] == count - 2
    assert numbers["counts"]["extra"] == [first, second]
    by_file = {one["file"]: one for one in numbers["truth"]}
    assert (by_file[str(file)]["missing"], by_file[str(file)]["extra"]) == (
        [first],
        ["of-another-root"],
    )
    assert by_file[str(tmp_path / "vad_gt_seg.pkl")]["missing"] == [second]
    told = "\n".join(found.said)
    assert f"1 key-frames of the split are not in {file} and are left out: {first}" in told
    assert f"1 samples of {file} are no key-frames of the split: of-another-root" in told
    alone = {token: paths[token] for token in ("of-another-root",)}
    with pytest.raises(UserError, match=r"no key-frame of the val split of .* is in all of"):
        ask(
            paths=_pickle(tmp_path / "alone.pkl", alone),
            mask=_pickle(tmp_path / "alone_mask.pkl", {"of-another-root": masks[second]}),
        )


def test_what_does_not_fit_is_named(ask, exported, town_root, plans, tmp_path, capsys):
    paths, masks = (_load(exported[name]) for name in ("gt-traj", "gt-traj-mask"))
    token = list(paths)[3]
    file = _pickle(tmp_path / "gt_traj.pkl", paths)
    with pytest.raises(UserError, match=r"there is no .*gt_traj_mask\.pkl; name .* --truth-mask"):
        ask(paths=file)
    with pytest.raises(UserError, match="--truth-mask needs"):
        ask(mask=exported["gt-traj-mask"])
    half = {t: m.copy() for t, m in masks.items()}
    half[token][0, 2] = (1, 0)
    with pytest.raises(UserError, match=f"{token}: a mask must be 0 or 1, alike for x and y"):
        ask(paths=file, mask=_pickle(tmp_path / "half.pkl", half))
    short = {t: m for t, m in masks.items() if t != token}
    with pytest.raises(UserError, match=f"1 samples of .* are not in .*: {token}"):
        ask(paths=file, mask=_pickle(tmp_path / "short.pkl", short))
    for values in (paths[token][0, :5], np.float32(3), [[1.0, 2.0]] * 5 + [[1.0]], None):
        wrong = _pickle(tmp_path / "wrong.pkl", paths | {token: values})
        with pytest.raises(UserError, match=f"{token}: field 'path' must be (of shape|numbers)"):
            ask(paths=wrong, mask=exported["gt-traj-mask"])
    with pytest.raises(UserError, match="holds no rasters, by its name"):
        ask(rasters=(file,))
    with pytest.raises(UserError, match=r"no protocol asked for .* uses rasters of vehicles"):
        score(
            ScoreRequest(
                plans,
                town_root,
                protocols=("vad",),
                truth=TruthFiles(rasters=(exported["planning-segmentation"],)),
            )
        )
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"sample_token": token, "question": "?", "answer": "1"}]))
    command = ["score", str(answers), "--data", str(town_root), "--truth", str(file)]
    assert main(command) == 2
    assert "--truth is for plans" in capsys.readouterr().err.replace("\n", " ")


def test_the_verb_takes_the_files(exported, town_root, plans, tmp_path):
    out = tmp_path / "out"
    command = ["score", str(plans), "--data", str(town_root)]
    command += ["--truth", str(exported["gt-traj"])]
    command += ["--truth-mask", str(exported["gt-traj-mask"]), "--out", str(out)]
    for name in ("planning-segmentation", "vad-segmentation"):
        command += ["--truth-rasters", str(exported[name])]
    assert main(command) == 0
    results = json.loads((out / "results.json").read_text())
    for name in ("uniad", "stp3"):
        card = results["planning"][name]["card"]
        assert card["truth"].startswith("sha256:")
        assert card["traffic"].startswith("sha256:")
    assert [one["n_missing"] for one in results["truth"]] == [0, 0, 0, 0]
    assert len(results["samples"]) == results["planning"]["uniad"]["n_samples"]
