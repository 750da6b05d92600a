"""Runs that start from converted weights: strict, logged, vouched for, never over trained ones."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.initial_weights import identity, load_initial
from experiments.pipeline import open_pipeline
from experiments.schema import InitConfig
from experiments.stage_run import StageRun
from experiments.tiny import smoke
from odvla.checkpoints.convert import import_weights
from odvla.checkpoints.export import export_weights
from odvla.errors import UserError
from odvla.language.causal_lm import LanguageConfig
from odvla.language.dialect_file import write_dialect
from odvla.language.prompts import Dialect
from odvla.language.tokenizer import train_tokenizer
from odvla.projectors import ProjectorConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.vla import VLAConfig
from odvla.weight_names import OPENDRIVEVLA, UNIAD, component_of
from odvla.weights import file_sha256, save_weights, tensor_sha256

EMBEDDING = "language.model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a car drives on"] * 3, 300)


@pytest.fixture(scope="module")
def config():
    base = smoke()
    return replace(base, model=replace(base.model, ego_token=False))


def build(config, tokenizer, seed):
    torch.manual_seed(seed)
    return config.model.build(tokenizer)


@pytest.fixture
def given(config, tokenizer, tmp_path):
    """Weights on disk, of a model like the experiment's."""
    path = tmp_path / "given" / "vla.safetensors"
    save_weights(build(config, tokenizer, 1), path)
    return path


def starting_from(config, path, *parts):
    return replace(config, init=InitConfig(str(path), parts))


def tensors_of(vla):
    return {name: tensor.clone() for name, tensor in vla.state_dict().items()}


def test_every_tensor_that_the_file_holds_is_loaded(config, tokenizer, given):
    vla = build(config, tokenizer, 2)
    found = load_initial(vla, starting_from(config, given.parent))
    wanted = load_file(given)
    own = tensors_of(vla)
    assert all(torch.equal(own[name], tensor) for name, tensor in wanted.items())
    assert sum(found.record["tensors"].values()) == len(wanted)
    assert set(found.record["tensors"]) == {
        "encoder",
        "queries.track",
        "queries.map",
        "projectors.scene",
        "projectors.track",
        "projectors.map",
        "language",
    }
    assert found.dialect is None


def test_parts_are_loaded_whole_and_others_left_alone(config, tokenizer, given, caplog):
    vla = build(config, tokenizer, 2)
    before = tensors_of(vla)
    with caplog.at_level("INFO", logger="experiments"):
        found = load_initial(vla, starting_from(config, given, "encoder", "queries.track"))
    assert set(found.record["tensors"]) == {"encoder", "queries.track"}
    wanted = load_file(given)
    for name, tensor in tensors_of(vla).items():
        loaded = name.startswith(("encoder.", "queries.track."))
        assert torch.equal(tensor, wanted[name] if loaded else before[name]), name
    assert "initial weights: encoder," in caplog.text
    assert "projectors.map, projectors.scene, projectors.track, queries.map start as" in caplog.text


def test_numbers_of_another_type_are_converted(config, tokenizer, given):
    half = {
        name: t.bfloat16() if t.is_floating_point() else t for name, t in load_file(given).items()
    }
    save_file(half, given)
    vla = build(config, tokenizer, 2)
    load_initial(vla, starting_from(config, given))
    own = vla.state_dict()[EMBEDDING]
    assert own.dtype == torch.float32
    assert torch.equal(own, half[EMBEDDING].float())


def test_a_smaller_vocabulary_is_filled_up_with_its_mean(config, tokenizer, given):
    tensors = load_file(given)
    whole = tensors[EMBEDDING]
    tensors[EMBEDDING] = whole[:-5].clone()
    save_file(tensors, given)
    vla = build(config, tokenizer, 2)
    load_initial(vla, starting_from(config, given))
    own = vla.state_dict()[EMBEDDING]
    assert torch.equal(own[:-5], whole[:-5])
    torch.testing.assert_close(own[-5:], whole[:-5].mean(0).expand(5, -1))
    assert torch.equal(vla.language.head.weight, own)  # still tied


def spoil(given, change):
    tensors = load_file(given)
    change(tensors)
    save_file(tensors, given)


@pytest.mark.parametrize(
    ("change", "parts", "message"),
    [
        (lambda t: t.pop(EMBEDDING), (), "lacks 'language.model.model.embed_tokens.weight'"),
        (lambda t: t.update({"encoder.x": torch.zeros(1)}), (), r"holds 'encoder\.x', which the m"),
        (
            lambda t: t.update({EMBEDDING: torch.zeros(2000, 32)}),
            (),
            r"set model\.language\.vocab_size=2000",
        ),
        (
            lambda t: t.update({"queries.ghost.x": torch.zeros(1)}),
            (),
            r"holds queries\.ghost, which the model does not have; name those",
        ),
        (
            lambda t: t.update({"img_backbone.x": torch.zeros(1)}),
            (),
            r"holds 'img_backbone\.x', .* convert it first",
        ),
        (lambda t: None, ("queries.scene",), r"init\.parts names 'queries\.scene'"),
        (
            lambda t: t.update({"projectors.map.0.bias": torch.zeros(7)}),
            (),
            r"'projectors\.map\.0\.bias' has shape \(7,\), the model wants \(32,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    config, tokenizer, given, change, parts, message
):
    spoil(given, change)
    vla = build(config, tokenizer, 2)
    before = tensors_of(vla)
    with pytest.raises(UserError, match=message):
        load_initial(vla, starting_from(config, given, *parts))
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(vla).items())


def test_weights_that_changed_since_their_conversion_are_refused(config, tokenizer, given):
    (given.parent / "weights.json").write_text(
        json.dumps({"sha256": {"vla.safetensors": "0" * 64}})
    )
    assert identity(InitConfig(str(given)))
    with pytest.raises(UserError, match=r"vla\.safetensors is not the file that weights\.json"):
        load_initial(build(config, tokenizer, 2), starting_from(config, given))


def test_an_unknown_part_is_named():
    with pytest.raises(UserError, match=r"init\.parts must be some of .*, not 'tower'"):
        InitConfig("x", ("tower",))


def test_weights_that_speak_another_dialect_are_refused(config, tokenizer, given):
    other = {**Dialect("compact").wording.content, "system": "Other words."}
    write_dialect(other, given.parent / "dialect.yaml")
    vla = build(config, tokenizer, 2)
    load_initial(vla, starting_from(config, given, "encoder", "queries"))  # they read no prompts
    with pytest.raises(UserError, match="was trained on dialect"):
        load_initial(vla, starting_from(config, given))
    forced = replace(starting_from(config, given), force_dialect=True)
    assert load_initial(vla, forced).dialect["content"]["system"] == "Other words."
    same = replace(
        starting_from(config, given), dialect=Dialect(str(given.parent / "dialect.yaml"))
    )
    assert load_initial(vla, same).dialect == same.dialect.identity()


def test_rows_of_added_tags_are_reset_in_released_weights_only(config, tokenizer, given):
    whole = load_file(given)[EMBEDDING]
    added = tokenizer.added_ids = (280, 281)
    try:
        vla = build(config, tokenizer, 2)
        load_initial(vla, starting_from(config, given))
        assert torch.equal(vla.state_dict()[EMBEDDING], whole)
        note = {"sha256": {"vla.safetensors": file_sha256(given)}}
        (given.parent / "weights.json").write_text(json.dumps(note))
        load_initial(vla, starting_from(config, given))
    finally:
        tokenizer.added_ids = ()
    own = vla.state_dict()[EMBEDDING]
    torch.testing.assert_close(own[list(added)], whole[:280].mean(0).expand(2, -1))
    assert torch.equal(own[:280], whole[:280])


def test_a_tower_of_uniad_fills_encoder_and_queries(shared, config, tokenizer, tmp_path):
    """A real model of reduced size, converted and loaded; then all of a model there and back."""
    golden = shared / "golden"
    weights = {
        **load_file(golden / "uniad_small_weights_img.safetensors"),
        **load_file(golden / "uniad_small_weights_rest.safetensors"),
    }
    weights = {name.removeprefix("weight/"): tensor for name, tensor in weights.items()}
    torch.save({"meta": {}, "state_dict": weights}, tmp_path / "w.pth")
    sizes = import_weights(tmp_path / "w.pth", UNIAD, tmp_path / "uniad").sizes
    model = VLAConfig(
        sizes.encoder,
        (SceneSamplerConfig(), sizes.track, sizes.map),
        ProjectorConfig("qwen2_5_rms"),
        LanguageConfig(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48),
    )
    config = replace(config, model=model)
    vla = build(config, tokenizer, 1)
    found = load_initial(vla, starting_from(config, tmp_path / "uniad"))
    assert set(found.record["tensors"]) == {"encoder", "queries.track", "queries.map"}
    name = "seg_head.stuff_mask_head.blocks.2.norm3.weight"
    assert torch.equal(vla.queries["map"].stuff_masks.blocks[2].norm3.weight, weights[name])

    save_weights(vla, tmp_path / "stage" / "vla.safetensors")
    export_weights(tmp_path / "stage", OPENDRIVEVLA, tmp_path / "theirs", like=tmp_path / "uniad")
    import_weights(tmp_path / "theirs", OPENDRIVEVLA, tmp_path / "again")
    other = build(config, tokenizer, 2)
    found = load_initial(other, starting_from(config, tmp_path / "again"))
    assert set(found.record["tensors"]) == {component_of(name) for name in vla.state_dict()}
    own = vla.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in other.state_dict().items())


# -- in a run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(config, town_root, tmp_path_factory):
    """Perception and planning, a step each, from given weights."""
    folder = tmp_path_factory.mktemp("init")
    planning = replace(config.stages.planning, steps=1, max_new_tokens=2)
    config = replace(
        config,
        town=None,
        run=("perception", "planning"),
        data=replace(
            config.data,
            root=str(town_root),
            version=next(town_root.glob("v1.0-*")).name,
            image_size=(64, 36),
            train_scenes=1,
            eval_scenes=1,
            planning=replace(config.data.planning, batch_size=2, eval_frames_stride=20),
        ),
        stages=replace(
            config.stages,
            perception=replace(config.stages.perception, steps=1),
            planning=planning,
        ),
    )
    seeded = open_pipeline(replace(config, name="other", seed=5), folder, progress=False)
    given = folder / "given.safetensors"
    save_weights(seeded.shop.vla, given)
    config = replace(config, init=InitConfig(str(given), ("encoder", "queries")))
    open_pipeline(config, folder, progress=False).fit()
    return config, folder, given


def card(run, stage):
    config, folder, _ = run
    return json.loads((folder / config.name / stage / "card.json").read_text())


def test_the_card_tells_what_the_first_stage_started_from(run):
    _, _, given = run
    first, second = card(run, "perception"), card(run, "planning")
    assert first["init"]["path"] == str(given)
    assert first["init"]["sha256"] == {given.name: file_sha256(given)}
    assert set(first["init"]["tensors"]) == {"encoder", "queries.track", "queries.map"}
    assert second["init"] is None
    assert second["init_identity"] is None


def test_a_trained_tower_is_never_overwritten_with_the_initial_one(run):
    """Trap: the released code restores UniAD's weights over newly trained ones."""
    config, folder, given = run
    initial = load_file(given)
    trained = load_file(folder / config.name / "perception" / "vla.safetensors")
    changed = [
        name
        for name in initial
        if name.startswith("encoder.") and not torch.equal(initial[name], trained[name])
    ]
    assert changed  # perception has trained it
    before = card(run, "planning")["frozen_before"]  # what planning started from
    looked_at = [name for name in changed if name in before]
    assert looked_at
    for name in looked_at:
        assert before[name] == tensor_sha256(trained[name]) != tensor_sha256(initial[name])


def test_a_run_from_a_handoff_does_not_look_at_initial_weights_of_the_same_parts(run, caplog):
    config, folder, given = run
    parent = folder / config.name / "perception"
    gone = InitConfig(str(given.with_name("gone.safetensors")), ("encoder", "queries"))
    moved = replace(config, name="later", init=gone)
    with caplog.at_level("INFO", logger="experiments"):
        pipeline = open_pipeline(moved, folder, parent, progress=False)
        pipeline.fit()
    assert "init.weights fill none of encoder, queries: stage planning starts" in caplog.text
    found = json.loads((folder / "later" / "planning" / "card.json").read_text())
    assert found["init"] is None


def test_initial_weights_fill_what_the_handoff_of_perception_leaves(run):
    config, folder, given = run
    parent = folder / config.name / "perception"
    config = replace(config, name="both", init=InitConfig(str(given)))
    pipeline = open_pipeline(config, folder, parent, progress=False)
    card, initial = StageRun(pipeline.shop, "planning", parent)._load_start()
    assert initial is not None
    assert not {"encoder", "queries.track"} & set(initial.record["tensors"])
    theirs, trained = load_file(given), load_file(parent / "vla.safetensors")
    own = pipeline.shop.vla.state_dict()
    assert all(
        torch.equal(own[name], (trained if name.split(".")[0] in card.parts else theirs)[name])
        for name in theirs
    )


def test_other_initial_weights_make_another_run(run):
    config, folder, given = run
    assert open_stage(config, folder).is_finished()
    other = given.with_name("other.safetensors")
    tensors = load_file(given)
    save_file(
        {name: tensor + 1 if "weight" in name else tensor for name, tensor in tensors.items()},
        other,
    )
    assert not open_stage(
        replace(config, init=replace(config.init, weights=str(other))), folder
    ).is_finished()
    assert not open_stage(
        replace(config, init=replace(config.init, parts=("encoder",))), folder
    ).is_finished()


def open_stage(config, folder):
    return StageRun(open_pipeline(config, folder, progress=False).shop, "perception", None)
