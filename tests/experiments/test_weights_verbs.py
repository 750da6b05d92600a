"""`weights convert` and `weights inspect` as they are typed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.cli import main
from experiments.fitting import difference, fits
from experiments.tiny import tiny
from odvla.checkpoints.contents import contents_of
from odvla.checkpoints.stored import StoredTensor
from odvla.weight_names import OPENDRIVEVLA, UNIAD

NAMES = {"uniad": "uniad_track_map", "opendrivevla": "opendrivevla_0.5b"}


@pytest.fixture
def language_only(tmp_path):
    """A small language model and projectors under OpenDriveVLA's names."""
    from odvla.language.causal_lm import LanguageConfig
    from odvla.projectors import ProjectorConfig

    model = LanguageConfig(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48).build(100)
    tensors = {f"language.{n}": t for n, t in model.state_dict().items() if "lm_head" not in n}
    for stream in ("scene", "track", "map"):
        projector = ProjectorConfig("linear").build(16, 32)
        tensors |= {f"projectors.{stream}.{n}": t for n, t in projector.state_dict().items()}
    theirs = OPENDRIVEVLA.to_theirs(tensors).names
    path = tmp_path / "language.safetensors"
    save_file({theirs[name]: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def meta_checkpoint(shared, name):
    """Contents of the full-size list of keys; no values exist."""
    keys = json.loads((shared / "golden" / f"state_dict_keys_{NAMES[name]}.json").read_text())
    if "state_dict" in keys:
        keys = {**keys["state_dict"], **keys["mm_projector_variants"]["mlp2x_gelu"]}
        del keys["lm_head.weight"]

    def stored(shape):
        return StoredTensor(tuple(shape), torch.float32, lambda: torch.empty(shape, device="meta"))

    return {key: stored(entry["shape"]) for key, entry in keys.items()}


def test_there_and_back_on_the_command_line(shared, tmp_path, capsys):
    """A real model of reduced size."""
    golden = shared / "golden"
    weights = {
        **load_file(golden / "uniad_small_weights_img.safetensors"),
        **load_file(golden / "uniad_small_weights_rest.safetensors"),
    }
    weights = {name.removeprefix("weight/"): tensor for name, tensor in weights.items()}
    source, ours, back = tmp_path / "w.pth", str(tmp_path / "ours"), tmp_path / "back.pth"
    torch.save({"meta": {}, "state_dict": weights}, source)
    there = ["weights", "convert", str(source), "--from", "uniad", "--to", "odvla", "--out", ours]
    assert main(there) == 0
    said = capsys.readouterr().out
    assert "queries.map" in said
    assert "set aside: seg_head.bev_embedding.weight (the map head never reads it)" in said
    arguments = ["weights", "convert", ours, "--from", "odvla", "--to", "uniad"]
    assert main([*arguments, "--out", str(back)]) == 0
    found = torch.load(back, weights_only=True)["state_dict"]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert main([*arguments, "--out", str(back)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["weights", "inspect", ours, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["layout"] == "odvla"
    assert content["sizes"]["encoder"]["dim"] == 32
    assert content["components"]["queries.track"]["tensors"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "uniad", "--to", "opendrivevla"], "one of --from and --to is odvla"),
        (["--from", "odvla", "--to", "odvla"], "one of --from and --to is odvla"),
        (["--from", "uniad", "--to", "odvla", "--like", "x"], "belong to the way back"),
        (["--from", "uniad", "--to", "odvla", "--reference", "x"], "other weights read no prompts"),
        (["--from", "opendrivevla", "--to", "odvla", "--reference", "x"], "no checkout of Open"),
        (["--from", "uniad", "--to", "odvla"], "does not exist"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, message):
    out = str(tmp_path / "out")
    assert main(["weights", "convert", str(tmp_path / "w.pth"), *arguments, "--out", out]) == 2
    assert message in capsys.readouterr().err


def test_a_full_size_tower_is_recognised_and_counted(shared, monkeypatch, tmp_path):
    tensors = meta_checkpoint(shared, "uniad")
    found = inspected(tensors, tmp_path, monkeypatch)
    assert found.layout == "uniad"
    assert found.recognised == ("UniAD's full-size tower",)
    # The reference counts 99,958,589 parameters; the 10 loss weights of its criterion are a buffer,
    # which no shape tells. Those, as many of the head and the map head's embedding nobody reads.
    assert found.parameters == 99_958_589 + 10
    unread = 40_000 * 256 + 10
    assert sum(n for _, n in found.components.values()) == 99_958_589 - unread
    assert found.components["encoder"][1] == (
        44_304_894 + 3_278_592 + 4_940_928 + 35_968 + 10_240_000 + 200 * 128 * 2 + (4 + 6) * 256
    )
    assert found.problem is None
    assert "(128, 256) are for 4 levels" in found.quirks[0]
    assert "compat" in found.quirks[0]


def test_opendrivevla_is_recognised(shared, monkeypatch, tmp_path):
    found = inspected(meta_checkpoint(shared, "opendrivevla"), tmp_path, monkeypatch)
    assert found.layout == "opendrivevla"
    assert found.recognised == ("UniAD's full-size tower", "Qwen2.5-0.5B")
    assert found.components["language"][1] == 494_032_768
    assert found.components["projectors.map"][1] == 1_033_984
    text = "\n".join(found.quirks)
    assert "projectors: mlp2x_gelu" in text
    assert "output layer: absent: it is the embedding" in text
    assert "vocabulary: 151936 rows, Qwen2.5's 151665 padded" in text


def test_one_level_and_old_offset_names_are_quirks_too(shared, monkeypatch, tmp_path):
    tensors = {}
    for name, tensor in meta_checkpoint(shared, "uniad").items():
        shape = tensor.shape
        if name.startswith("seg_head.transformer") and (
            "sampling_offsets" in name or "attention_weights" in name
        ):
            shape = (shape[0] // 4, *shape[1:])
        name = name.replace(".conv2.conv_offset.", ".conv2_offset.")
        tensors[name] = StoredTensor(shape, tensor.dtype, tensor.read)
    found = inspected(tensors, tmp_path, monkeypatch)
    assert found.problem is None
    assert "(32, 256) are for one level: no stride quirk" in found.quirks[0]
    assert "old names" in found.quirks[1]


def inspected(tensors, tmp_path, monkeypatch):
    from odvla.checkpoints import contents
    from odvla.checkpoints.reading import Checkpoint

    path = tmp_path / "w.pth"
    path.write_bytes(b"x")
    opened = Checkpoint(path, (path,), "PyTorch zip", tensors)
    monkeypatch.setattr(contents, "open_checkpoint", lambda _: opened)
    return contents_of(path)


def test_a_part_of_a_model_is_described_with_what_it_lacks(language_only, capsys):
    found = contents_of(language_only)
    assert found.layout == "opendrivevla"
    assert "holds nothing of encoder" in found.problem
    assert set(found.components) == {
        "language",
        "projectors.scene",
        "projectors.track",
        "projectors.map",
    }
    assert main(["weights", "inspect", str(language_only)]) == 0
    assert "problem:" in capsys.readouterr().out


def test_anything_else_is_nobodys(tmp_path, capsys):
    save_file({"a.b": torch.zeros(3), "c": torch.zeros(2)}, tmp_path / "w.safetensors")
    found = contents_of(tmp_path / "w.safetensors")
    assert found.layout is None
    assert found.components == {"a": (1, 3), "c": (1, 2)}
    assert main(["weights", "inspect", str(tmp_path / "w.safetensors")]) == 0
    assert "names: nobody's" in capsys.readouterr().out


def test_the_experiment_that_weights_come_from_fits_and_others_do_not(tmp_path):
    model = tiny().model
    encoder = model.encoder.build()
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "vla.safetensors")
    found = fits(contents_of(tmp_path).ours)
    assert found["tiny"] == {"encoder": ""}
    assert found["small"] == {"encoder": ""}
    assert found["smoke"]["encoder"]


def test_the_first_difference_is_told():
    assert difference({"a": (1,)}, {"a": (1,)}) == ""
    assert difference({"a": (1,)}, {}) == "it has no such part"
    assert difference({"a": (1,)}, {"a": (2,)}) == "a is (1,), it wants (2,)"
    assert difference({"b": (1,)}, {"a": (2,)}) == "it has no b"
    assert difference({"a": (2,)}, {"a": (2,), "c": (1,)}) == "it wants c"


def test_uniads_layout_has_no_language():
    assert UNIAD.to_theirs(["language.model.lm_head.weight"]).names == {}
