"""Files written, read back, damaged and compared."""

import pickle
from functools import partial

import numpy as np
import pytest

from datamodules.exchange.differ import compare, value_difference
from datamodules.exchange.formats import FORMATS, format_of, frames_of, read_file, write_file
from datamodules.exchange.planning import driven_mask, driven_path
from datamodules.exchange.schema import Field
from datamodules.exchange.source import Source
from datamodules.index_file import load_index
from experiments.parity.golden import Golden
from experiments.parity.labels import _drive
from odvla.errors import UserError

NAMES = list(FORMATS)
NESTED = ("uniad-infos", "gpt-driver-cache")
PATHS = ("gt-traj", "gt-traj-mask")
RASTERS = ("planning-segmentation", "vad-segmentation")


@pytest.fixture(scope="module")
def source(circle_root):
    return Source(load_index(circle_root, "v1.0-mini"), "data/nuscenes")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """A file of every format with the train split: two scenes, 13 key-frames."""
    folder = tmp_path_factory.mktemp("written")
    frames = frames_of(source.index, "train")
    for name, form in FORMATS.items():
        assert write_file(folder / name, form, source, frames) == len(frames)
    return folder


def changed(path, change, out):
    content = pickle.loads(path.read_bytes())
    new = change(content)
    out.write_bytes(pickle.dumps(content if new is None else new))
    return out


def record_of(content, token):
    if "infos" in content:
        return next(info for info in content["infos"] if info["token"] == token)
    return content[token]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back_equal(source, written, name):
    file = read_file(written / name, FORMATS[name])
    tokens = [frame.token for frame in frames_of(source.index, "train")]
    assert list(file.records) == tokens
    found = compare(file, source, tolerance=0.0)
    assert found.equal
    assert found.both == len(tokens)
    if name in RASTERS:
        assert found.rasters.filled_here == found.rasters.filled_there > 0
    else:
        assert all(field.compared == len(tokens) for field in found.fields)
        assert len(found.fields) == {"uniad-infos": 100, "gpt-driver-cache": 110}.get(name, 1)


def test_stored_shapes_and_types(written):
    for name, shape, dtype in (
        ("gt-traj", (1, 6, 2), np.float32),
        ("gt-traj-mask", (1, 6, 2), np.float32),
        ("planning-segmentation", (1, 6, 200, 200), np.uint8),
        ("vad-segmentation", (1, 6, 200, 200), np.uint8),
    ):
        for value in pickle.loads((written / name).read_bytes()).values():
            assert (value.shape, value.dtype) == (shape, dtype)


def test_driven_paths_are_recorded_planning_labels(shared):
    cases = Golden(shared / "golden").facts("m_sdc_labels")["cases"]
    assert len(cases) == 20
    for case in cases:
        index = _drive(case)
        bare, frame = Source(index, ""), index.frames[case["index"]]
        # The reference has poses in float32.
        wanted = np.array(case["sdc_planning"])[None, :, :2]
        np.testing.assert_allclose(
            driven_path(bare, frame), wanted, atol=2e-4
        )  # its poses are float32
        mask = driven_mask(bare, frame)
        np.testing.assert_array_equal(mask, np.array(case["sdc_planning_mask"])[None])


def _apply(change, token, content):
    change(record_of(content, token))


CHANGES = {
    "uniad-infos": [
        ("gt_boxes", lambda r: r["gt_boxes"].__setitem__((1, 0), r["gt_boxes"][1, 0] + 0.25), 0.25),
        ("fut_traj", lambda r: r["fut_traj"].__setitem__((0, 0, 1), 99.0), None),
        ("gt_velocity", lambda r: r["gt_velocity"].__setitem__((0, 0), np.nan), None),
        ("gt_names", lambda r: r["gt_names"].__setitem__(0, "bus"), None),
        ("cams.CAM_BACK.timestamp", lambda r: r["cams"]["CAM_BACK"].update(timestamp=7), None),
        (
            "cams.CAM_BACK.data_path",
            lambda r: r["cams"]["CAM_BACK"].update(data_path="x/samples/CAM_BACK/other.jpg"),
            None,
        ),
        ("can_bus", lambda r: r["can_bus"].__setitem__(7, r["can_bus"][7] - 0.5), 0.5),
    ],
    "gpt-driver-cache": [
        ("gt_ego_fut_trajs", lambda r: r["gt_ego_fut_trajs"].__setitem__((6, 1), -50.0), None),
        ("gt_ego_lcf_feat", lambda r: r["gt_ego_lcf_feat"].__setitem__(8, 3.0), None),
        ("gt_agent_fut_goal", lambda r: r["gt_agent_fut_goal"].__setitem__(0, 8.5), None),
        ("map_location", lambda r: r.update(map_location="elsewhere"), None),
    ],
    "gt-traj": [("path", lambda r: r.__iadd__(0.0625), 0.0625)],
    "gt-traj-mask": [("mask", lambda r: r.__setitem__((0, 0, 0), 0.0), 1.0)],
}


@pytest.mark.parametrize(
    ("name", "field", "change", "size"),
    [(name, *case) for name, cases in CHANGES.items() for case in cases],
)
def test_a_change_is_found_where_it_was_made(source, written, tmp_path, name, field, change, size):
    token = source.index.frames[5].token
    path = changed(written / name, partial(_apply, change, token), tmp_path / "f")
    found = compare(read_file(path, FORMATS[name]), source)
    assert not found.equal
    (line,) = (one for one in found.fields if one.differing)
    assert (line.name, line.differing, line.worst_token) == (field, 1, token)
    if size is not None:
        assert line.largest == pytest.approx(size, abs=1e-5)
        assert line.median == pytest.approx(0.0, abs=1e-5)
    small = compare(read_file(path, FORMATS[name]), source, tolerance=1e9)
    if line.largest is not None and size is not None:
        assert small.equal


def test_paths_prefixes_angles_and_order_of_boxes_do_not_count(source, written, tmp_path):
    def change(content):
        for info in content["infos"]:
            info["lidar_path"] = "/somewhere/else/" + info["lidar_path"].split("nuscenes/")[1]
            info["gt_boxes"][:, 6] += 2 * np.pi

    path = changed(written / "uniad-infos", change, tmp_path / "f")
    assert compare(read_file(path, FORMATS["uniad-infos"]), source).equal

    def swap(content):
        for name, value in content["infos"][5].items():
            if isinstance(value, np.ndarray) and name != "can_bus":
                content["infos"][5][name] = value[::-1].copy()

    path = changed(written / "uniad-infos", swap, tmp_path / "g")
    found = compare(read_file(path, FORMATS["uniad-infos"]), source)
    assert (found.equal, found.reordered) == (False, 1)
    assert not any(field.differing for field in found.fields)


def test_tokens_of_one_side_are_told(source, written, tmp_path):
    first, last = source.index.frames[0].token, source.index.frames[8].token

    def change(content):
        content["of-another-root"] = content.pop(first)
        del content[last]

    path = changed(written / "gt-traj", change, tmp_path / "f")
    found = compare(read_file(path, FORMATS["gt-traj"]), source)
    assert found.only_there == ["of-another-root"]
    assert found.only_here == [first, last]
    assert not found.equal
    # Nothing is expected of a split that the file has no key-frame of.
    assert compare(read_file(path, FORMATS["gt-traj"]), source, split="val").only_here


def test_a_missing_box_is_another_shape(source, written, tmp_path):
    token = source.index.frames[5].token

    def change(content):
        info = record_of(content, token)
        for name, value in info.items():
            if isinstance(value, np.ndarray) and name != "can_bus":
                info[name] = value[1:]

    path = changed(written / "uniad-infos", change, tmp_path / "f")
    found = compare(read_file(path, FORMATS["uniad-infos"]), source)
    differing = {one.name: one for one in found.fields if one.differing}
    assert len(differing) == 11
    assert differing["gt_boxes"].other_shape == 1


@pytest.mark.parametrize("name", RASTERS)
@pytest.mark.parametrize(
    ("axes", "said"), [((-1,), "its last axis"), ((-2,), "its second last axis"),
                       ((-1, -2), "its last two axes")],
)  # fmt: skip
def test_flipped_rasters_are_recognised(source, written, tmp_path, name, axes, said):
    def flip(content):
        return {token: np.flip(value, axes).astype(np.int64) for token, value in content.items()}

    path = changed(written / name, flip, tmp_path / "f")
    found = compare(read_file(path, FORMATS[name]), source)
    assert found.rasters.explained_by == said
    assert found.rasters.flipped[said] == 0 < found.rasters.cells
    assert not found.equal


def test_one_cell_is_found(source, written, tmp_path):
    token = source.index.frames[3].token

    def change(content):
        content[token][0, 4, 7, 8] ^= 1

    path = changed(written / "vad-segmentation", change, tmp_path / "f")
    rasters = compare(read_file(path, FORMATS["vad-segmentation"]), source).rasters
    assert (rasters.cells, rasters.differing, rasters.worst_token) == (1, 1, token)
    assert (rasters.worst_cells, rasters.explained_by) == (1, "")


@pytest.mark.parametrize("shape", [(7, 200, 200), (1, 7, 200, 200), (6, 200, 200)])
def test_rasters_may_have_the_present_and_no_batch(source, written, tmp_path, shape):
    def change(content):
        for token, value in content.items():
            six = value[0]
            first = np.ones((1, 200, 200), np.uint8)
            seven = np.concatenate([first, six]) if 7 in shape else six
            content[token] = seven.reshape(shape)

    path = changed(written / "planning-segmentation", change, tmp_path / "f")
    assert compare(read_file(path, FORMATS["planning-segmentation"]), source).equal


def _set(name, value):
    def change(content, token):
        record_of(content, token)[name] = value

    return change


def _drop(name):
    def change(content, token):
        del record_of(content, token)[name]

    return change


def _replace(value):
    def change(content, token):
        content[token] = value

    return change


def _camera(content, token):
    del record_of(content, token)["cams"]["CAM_BACK"]


def _intrinsic(content, token):
    record_of(content, token)["cams"]["CAM_BACK"]["cam_intrinsic"] = np.eye(4)


def _sweep(content, token):
    record_of(content, token)["sweeps"] = [{"type": "lidar"}]


def _twice(content, token):
    content["infos"].append(record_of(content, token))


DAMAGED = [
    *[(name, _drop("timestamp"), r"{token}: field 'timestamp' is missing") for name in NESTED],
    *[(name, _set("can_bus", np.zeros(17)), r"{token}: field 'can_bus' must be of shape \(18,\), "
       r"its shape is \(17,\)") for name in NESTED],
    *[(name, _set("can_bus", "none"), r"{token}: field 'can_bus' must be numbers")
      for name in NESTED],
    *[(name, _set("can_bus", [1.0] * 17 + [np.inf]), r"{token}: field 'can_bus' must be finite")
      for name in NESTED],
    *[(name, _set("gt_velocity", np.zeros((1, 2))), r"field 'gt_velocity' must be of shape")
      for name in NESTED],
    *[(name, _set("gt_names", ["car"]), r"{token}: field 'gt_names' must be of shape \(\d,\)")
      for name in NESTED],
    *[(name, _set("gt_names", [1, 2]), r"{token}: field 'gt_names' must be a list of texts")
      for name in NESTED],
    *[(name, _set("scene_token", 7), r"{token}: field 'scene_token' must be a text, it is 7")
      for name in NESTED],
    *[(name, _set("cams", []), r"{token}: field 'cams' must be a dict, not list")
      for name in NESTED],
    *[(name, _camera, r"{token}: field 'cams.CAM_BACK' is missing") for name in NESTED],
    *[(name, _intrinsic, r"{token}: field 'cams.CAM_BACK.cam_intrinsic' must be of shape \(3, 3\)")
      for name in NESTED],
    *[(name, _sweep, r"{token}: field 'sweeps.0.data_path' is missing") for name in NESTED],
    ("uniad-infos", _set("token", 5), r"info 5: field 'token' must be a text"),
    ("uniad-infos", _twice, r"sample {token} comes twice"),
    ("uniad-infos", lambda c, t: c.update(infos={}), r"must hold a dict with a list 'infos'"),
    ("uniad-infos", _set("fut_traj", np.zeros((3, 12, 2))), r"field 'fut_traj' must be of shape"),
    ("gpt-driver-cache", _set("token", "other"), r"{token}: field 'token' is that of another"),
    ("gpt-driver-cache", _replace(3), r"{token}: a record must be a dict, not int"),
    ("gpt-driver-cache", _set("gt_ego_fut_masks", np.ones(7)), r"gt_ego_fut_masks' must be of"),
    *[(name, _replace(np.zeros((6, 2))), r"{token}: field '.*' must be of shape \(1, 6, 2\)")
      for name in PATHS],
    *[(name, _replace(np.full((1, 6, 2), np.nan)), r"{token}: field '.*' must be finite")
      for name in PATHS],
    *[(name, _replace([[1, 2], [3]]), r"{token}: field '.*' must be numbers") for name in PATHS],
    *[(name, _replace(np.zeros((1, 5, 200, 200))), r"{token}: a raster must have shape "
       r"\(1, 6 or 7, 200, 200\), its shape is \(1, 5, 200, 200\)") for name in RASTERS],
    *[(name, _replace([1]), r"{token}: a raster must be an array, not list") for name in RASTERS],
    *[(name, _replace(np.array(["x"])), r"not a whole pickle file: an array of")
      for name in RASTERS],
    *[(name, lambda c, t: c.update({5: c.pop(t)}), r"a key must be a sample token, not 5")
      for name in NAMES if name != "uniad-infos"],
    *[(name, lambda c, t: c.clear() or None, r"is empty|list 'infos'") for name in NAMES],
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), DAMAGED)
def test_damage_is_named(source, written, tmp_path, name, change, message):
    token = source.index.frames[5].token
    path = changed(written / name, lambda c: change(c, token), tmp_path / "file.pkl")
    with pytest.raises(UserError, match=message.replace("{token}", token)) as error:
        read_file(path, FORMATS[name])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_none(written, tmp_path, name):
    path = tmp_path / "file.pkl"
    with pytest.raises(UserError, match=r"file\.pkl does not exist"):
        read_file(path, FORMATS[name])
    path.write_bytes((written / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=r"file\.pkl is not a whole pickle"):
        read_file(path, FORMATS[name])
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match=r"must hold a dict"):
        read_file(path, FORMATS[name])


def test_names_of_files_tell_formats(tmp_path):
    for name, form in {
        "nuscenes_infos_temporal_val.pkl": "uniad-infos",
        "cached_nuscenes_info.pkl": "gpt-driver-cache",
        "gt_traj.pkl": "gt-traj",
        "gt_traj_mask.pkl": "gt-traj-mask",
        "planing_gt_segmentation_val": "planning-segmentation",
        "vad_gt_seg.pkl": "vad-segmentation",
    }.items():
        assert format_of(tmp_path / name).name == form
    with pytest.raises(UserError, match="does not tell its format"):
        format_of(tmp_path / "uniad_gt_seg.pkl")  # Agent-Driver's, which nobody flips
    assert format_of(tmp_path / "x", "gt-traj").name == "gt-traj"


def test_differences_of_values():
    angle = Field("a", shape=(2,), angles=(1,))
    assert value_difference(np.array([0, 3.2]), np.array([0, 3.2 - 2 * np.pi]), angle) < 1e-9
    assert value_difference(np.array([2 * np.pi, 0]), np.zeros(2), angle) == pytest.approx(
        6.283, abs=1e-3
    )
    assert value_difference(np.array([np.nan]), np.array([np.nan]), None) == 0
    assert value_difference(np.array([np.nan]), np.array([0.0]), None) == np.inf
    assert value_difference(np.zeros(3), np.zeros(4), None) is None
    assert value_difference(np.zeros((0, 7)), np.zeros((0, 7)), None) == 0


def test_other_roots(source, tmp_path):
    with pytest.raises(UserError, match="no split 'test'"):
        frames_of(source.index, "test")
    assert len(frames_of(source.index, "all")) == len(source.index.frames)
