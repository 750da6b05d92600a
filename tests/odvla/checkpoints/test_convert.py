"""Checkpoints with the real lists of keys there and back: the same bits, or a sentence."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from odvla.checkpoints.contents import contents_of
from odvla.checkpoints.convert import NOTE, SOURCE_FILES, UNUSED_FILE, import_weights
from odvla.checkpoints.export import export_weights
from odvla.checkpoints.reading import open_checkpoint
from odvla.checkpoints.sizes import EMBEDDING
from odvla.encoders.resnet import ResNetConfig
from odvla.errors import UserError
from odvla.weight_names import OPENDRIVEVLA, UNIAD, UNUSED

HEAD, TIED = "lm_head.weight", "model.embed_tokens.weight"


def write(tensors, path, *, shards=1):
    """A checkpoint as its authors' tools write it."""
    if path.suffix in (".pth", ".pt"):
        torch.save({"meta": {"epoch": 6}, "state_dict": tensors}, path)
        return path
    if shards == 1:
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        return path
    path.mkdir()
    names, places = list(tensors), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, path / file)
        places |= dict.fromkeys(part, file)
    index = path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def read(path):
    return {name: tensor.read() for name, tensor in open_checkpoint(path).tensors.items()}


def assert_bit_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(
            found[name].contiguous().reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        ), name


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("w.pth", "back.pth"),
        ("w.bin", "folder"),
        ("w.safetensors", "back.safetensors"),
        ("shards", "back.bin"),
    ],
)
def test_uniad_there_and_back_is_bit_equal(tmp_path, uniad, start, end):
    source = write(uniad, tmp_path / start, shards=3 if start == "shards" else 1)
    there = import_weights(source, UNIAD, tmp_path / "ours")
    assert set(there.unused) == set(UNUSED)
    assert sum(tensors for tensors, _ in there.components.values()) == len(uniad) - len(UNUSED)
    back = export_weights(tmp_path / "ours", UNIAD, tmp_path / "back" / end)
    assert back.absent == ()
    assert_bit_equal(read(tmp_path / "back" / end), uniad)


@pytest.mark.parametrize(
    ("kind", "head", "pickled"),
    [
        ("mlp2x_gelu", "absent", False),
        ("mlp2x_gelu", "own", True),
        ("qwen2_5_rms", "absent", True),
        ("qwen2_5_rms", "copy", False),
    ],
)
def test_opendrivevla_there_and_back_is_bit_equal(
    tmp_path, opendrivevla_keys, random_weights, kind, head, pickled
):
    tensors = random_weights(opendrivevla_keys[kind], dtype=torch.float16)
    if head == "absent":
        del tensors[HEAD]
    elif head == "copy":
        tensors[HEAD] = tensors[TIED].clone()
    source = write(tensors, tmp_path / "released", shards=2)
    config = {"vocab_size": 600, "mm_projector_type": kind, "mm_vision_tower": "somewhere"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    there = import_weights(source, OPENDRIVEVLA, tmp_path / "ours", limit=200_000)
    assert there.sizes.projectors["map"].kind == kind
    assert there.sizes.language.tie_embeddings == (head != "own")
    assert len(list((tmp_path / "ours").glob("vla-*.safetensors"))) > 1
    back = export_weights(
        tmp_path / "ours", OPENDRIVEVLA, tmp_path / "back", pickled=pickled, limit=300_000
    )
    assert back.absent == ()
    assert_bit_equal(read(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_bf16_and_whole_numbers_keep_their_type(tmp_path, opendrivevla):
    import_weights(write(opendrivevla, tmp_path / "w.bin"), OPENDRIVEVLA, tmp_path / "ours")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "ours" / "vla.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.int64}


def test_the_modules_take_what_was_converted(tmp_path, uniad):
    report = import_weights(write(uniad, tmp_path / "w.pth"), UNIAD, tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "vla.safetensors")
    encoder = report.sizes.encoder.build()
    tracks = report.sizes.track.build(encoder.dim, encoder.grid)
    for prefix, module in (("encoder.", encoder), ("queries.track.", tracks)):
        own = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
        module.load_state_dict(own, strict=True)
    name = "img_backbone.layer4.2.conv3.weight"
    assert torch.equal(encoder.backbone.layer4[2].conv3.weight, uniad[name])
    assert report.sizes.encoder.backbone == ResNetConfig(base_channels=8)
    assert report.sizes.track.queries == 30


def test_the_tower_of_opendrivevla_becomes_uniads(tmp_path, opendrivevla):
    """And what has no place there is named, not dropped in silence."""
    import_weights(write(opendrivevla, tmp_path / "w.bin"), OPENDRIVEVLA, tmp_path / "ours")
    back = export_weights(tmp_path / "ours", UNIAD, tmp_path / "tower.pth")
    assert back.left_out == {
        "projectors.scene": 4,
        "projectors.track": 4,
        "projectors.map": 4,
        "language": 24 * 12 + 2,
    }
    vision = "model.vision_tower.vision_tower.vision_model."
    wanted = {n.removeprefix(vision): t for n, t in opendrivevla.items() if n.startswith(vision)}
    assert_bit_equal(read(tmp_path / "tower.pth"), wanted)


def test_old_names_of_offsets_come_back_as_they_were(tmp_path, uniad):
    old = {name.replace(".conv2.conv_offset.", ".conv2_offset."): t for name, t in uniad.items()}
    assert old.keys() != uniad.keys()
    import_weights(write(old, tmp_path / "old.pth"), UNIAD, tmp_path / "ours")
    import_weights(write(uniad, tmp_path / "new.pth"), UNIAD, tmp_path / "same")
    assert_bit_equal(read(tmp_path / "ours"), read(tmp_path / "same"))
    export_weights(tmp_path / "ours", UNIAD, tmp_path / "back.pth")
    assert_bit_equal(read(tmp_path / "back.pth"), old)


def test_a_map_head_with_one_level_is_as_good(tmp_path, uniad):
    """With num_levels=1 the attention has a quarter of the offsets and weights."""

    def one_level(name, tensor):
        cut = name.startswith("seg_head.transformer") and (
            "sampling_offsets" in name or "attention_weights" in name
        )
        return tensor[: len(tensor) // 4].clone() if cut else tensor

    tensors = {name: one_level(name, tensor) for name, tensor in uniad.items()}
    import_weights(write(tensors, tmp_path / "w.pth"), UNIAD, tmp_path / "ours")
    export_weights(tmp_path / "ours", UNIAD, tmp_path / "back.pth")
    assert_bit_equal(read(tmp_path / "back.pth"), tensors)


def test_without_the_unused_tensors_the_way_back_says_what_is_missing(tmp_path, uniad):
    """As for weights that were trained here; --like brings them back."""
    import_weights(write(uniad, tmp_path / "w.pth"), UNIAD, tmp_path / "ours")
    trained = tmp_path / "stage"
    trained.mkdir()
    save_file(read(tmp_path / "ours"), trained / "vla.safetensors")
    report = export_weights(trained, UNIAD, tmp_path / "a.pth")
    assert set(report.absent) == set(UNUSED)
    assert set(read(tmp_path / "a.pth")) == set(uniad) - set(UNUSED)
    report = export_weights(trained, UNIAD, tmp_path / "b.pth", like=tmp_path / "ours")
    assert report.absent == ()
    assert_bit_equal(read(tmp_path / "b.pth"), uniad)
    with pytest.raises(UserError, match="holds no converted weights"):
        export_weights(trained, UNIAD, tmp_path / "c.pth", like=trained)


def test_a_grown_vocabulary_shows_in_the_exported_config(tmp_path, opendrivevla):
    source = write(opendrivevla, tmp_path / "released", shards=2)
    (source / "config.json").write_text('{"vocab_size": 600, "tie_word_embeddings": true}')
    import_weights(source, OPENDRIVEVLA, tmp_path / "ours")
    trained = read(tmp_path / "ours")
    trained[EMBEDDING] = torch.cat([trained[EMBEDDING], trained[EMBEDDING][:4]])
    (tmp_path / "stage").mkdir()
    save_file(trained, tmp_path / "stage" / "vla.safetensors")
    report = export_weights(
        tmp_path / "stage", OPENDRIVEVLA, tmp_path / "back", like=tmp_path / "ours"
    )
    assert report.notes == ("config.json: vocab_size is now 604",)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 604


# -- bad input --------------------------------------------------------------------------------


def test_a_checkpoint_of_the_wrong_kind_is_recognised(tmp_path, uniad, opendrivevla):
    released = write(opendrivevla, tmp_path / "w.bin")
    with pytest.raises(UserError, match=r"looks like OpenDriveVLA \(--from opendrivevla\)"):
        import_weights(released, UNIAD, tmp_path / "ours")
    with pytest.raises(UserError, match=r"looks like UniAD's .* \(--from uniad\)"):
        import_weights(write(uniad, tmp_path / "w.pth"), OPENDRIVEVLA, tmp_path / "ours")
    save_file({"planning_head.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"'planning_head\.x', which is no weight of UniAD's"):
        import_weights(tmp_path / "x.safetensors", UNIAD, tmp_path / "ours")
    tower = {n: t for n, t in uniad.items() if not n.startswith("seg_head.")}
    with pytest.raises(UserError, match=r"holds nothing of queries\.map"):
        import_weights(write(tower, tmp_path / "t.pth"), UNIAD, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "name",
    [
        "img_backbone.layer3.22.bn3.running_var",
        "img_neck.fpn_convs.3.conv.bias",
        "pts_bbox_head.bev_embedding.weight",
        "pts_bbox_head.transformer.level_embeds",
        "pts_bbox_head.transformer.decoder.layers.5.norms.2.bias",
        "memory_bank.temporal_fc1.bias",
        "seg_head.query_embedding.weight",
        "seg_head.stuff_mask_head.blocks.5.self_attention.qkv.weight",
    ],
)
def test_a_missing_tensor_is_named_as_its_owner_calls_it(tmp_path, uniad, name):
    tensors = {other: tensor for other, tensor in uniad.items() if other != name}
    with pytest.raises(UserError, match=f"lacks '{name}'"):
        import_weights(write(tensors, tmp_path / "w.pth"), UNIAD, tmp_path / "ours")


@pytest.mark.parametrize(
    "name",
    [
        "img_backbone.layer1.0.conv1.weight",
        "pts_bbox_head.transformer.encoder.layers.3.norms.0.weight",
        "seg_head.reg_branches2.1.4.bias",
        "query_interact.linear1.weight",
    ],
)
def test_a_misshapen_tensor_is_named(tmp_path, uniad, name):
    tensors = {**uniad, name: torch.cat([uniad[name], uniad[name][:1]])}
    with pytest.raises(UserError, match=rf"'{name}' has shape .* must be .* \(1 misshapen\)"):
        import_weights(write(tensors, tmp_path / "w.pth"), UNIAD, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t * float("nan"), "holds values that are not finite"),
        (lambda t: t / 0, "holds values that are not finite"),
        (lambda t: t > 0, "is of type bool, not of floating-point numbers"),
        (lambda t: t.to(torch.int32), "is of type int32, not of floating-point numbers"),
    ],
)
def test_a_tensor_of_no_numbers_is_named(tmp_path, uniad, change, said):
    name = "img_backbone.conv1.weight"
    source = write({**uniad, name: change(uniad[name])}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"w\.pth.*'{name}' {said}"):
        import_weights(source, UNIAD, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"w.pth"}
    if "type" in said:
        assert said in contents_of(source).problem


def test_one_tensor_too_many_is_named(tmp_path, uniad):
    for extra, said in (
        ("seg_head.cls_branches.6.weight", "no model of the sizes of the others has"),
        ("img_backbone.layer3.0.conv2_offset.weight", "holds both"),
    ):
        tensors = {**uniad, extra: torch.zeros(3, 16)}
        with pytest.raises(UserError, match=said):
            import_weights(write(tensors, tmp_path / "w.pth"), UNIAD, tmp_path / "ours")


def test_what_stands_in_the_way_is_not_overwritten(tmp_path, uniad):
    source = write(uniad, tmp_path / "w.pth")
    import_weights(source, UNIAD, tmp_path / "ours")
    before = (tmp_path / "ours" / "vla.safetensors").stat().st_mtime_ns
    for attempt in (
        lambda: import_weights(source, UNIAD, tmp_path / "ours"),
        lambda: export_weights(tmp_path / "ours", UNIAD, source),
        lambda: export_weights(tmp_path / "ours", UNIAD, tmp_path / "ours"),
    ):
        with pytest.raises(UserError, match="exists already"):
            attempt()
    assert (tmp_path / "ours" / "vla.safetensors").stat().st_mtime_ns == before


def test_a_conversion_that_fails_leaves_nothing(tmp_path, uniad, monkeypatch):
    source = write(uniad, tmp_path / "w.pth")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("odvla.checkpoints.convert.write_safetensors", full)
    with pytest.raises(OSError, match="no space"):
        import_weights(source, UNIAD, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == [source]


def test_other_encoders_have_no_name_at_uniad(tmp_path):
    save_file({"encoder.stem.weight": torch.zeros(1)}, tmp_path / "vla.safetensors")
    with pytest.raises(
        UserError, match=r"'encoder\.stem\.weight', which UniAD's .* has no name for"
    ):
        export_weights(tmp_path, UNIAD, tmp_path / "w.pth")


def test_the_note_says_where_the_weights_come_from(tmp_path, uniad):
    source = write(uniad, tmp_path / "w.pth")
    import_weights(source, UNIAD, tmp_path / "ours")
    note = json.loads((tmp_path / "ours" / NOTE).read_text())
    assert note["source"]["sha256"] == {"w.pth": hashlib.sha256(source.read_bytes()).hexdigest()}
    for name in ("vla.safetensors", UNUSED_FILE):
        content = (tmp_path / "ours" / name).read_bytes()
        assert note["sha256"][name] == hashlib.sha256(content).hexdigest()
    assert not (tmp_path / "ours" / SOURCE_FILES).exists()
