"""Experiments: all that are listed build; mistakes in one are named."""

from dataclasses import replace

import pytest
import torch

from experiments.find import experiments, find_experiment
from experiments.schema import STAGES, ExperimentConfig, TownSettings
from experiments.tiny import tiny
from odvla.config import apply_overrides, config_hash, dump, flat
from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return fake_tokenizer(vocab_size=320)


@pytest.mark.parametrize("name", experiments())
def test_every_listed_experiment_builds(name, tokenizer):
    config = find_experiment(name)
    assert config.name == name
    assert experiments()[name][1].endswith((".", "?", '").'))
    with torch.device("meta"):
        vla = config.model.build(tokenizer)
    for stage in config.run:
        assert config.stages.of(stage).freeze.trainable(vla)
        grid = getattr(config.model.encoder, "grid", None)  # None: it has no bird's-eye view
        data = config.data.of_stage(stage, 5, grid)
        assert (data.seed, data.version) == (5, config.data.version)
        assert grid is None or data.grid == grid
    assert flat(config)["model.encoder.class"].endswith(type(config.model.encoder).__name__)
    assert dump(config)


def test_the_papers_experiments_train_what_its_table_8_counts(tokenizer):
    config = find_experiment("opendrivevla_0_5b")
    with torch.device("meta"):
        vla = config.model.build(tokenizer)
    sizes = {name: p.numel() for name, p in vla.named_parameters()}
    counts = {
        stage: sum(sizes[name] for name in config.stages.of(stage).freeze.trainable(vla)) / 1e6
        for stage in config.run
    }
    # 3.1, 496.9, 496.9 and 552.6 million; the paper's language model has 0.2 M fewer embeddings
    # (its own vocabulary), and UniAD's map head holds a second BEV embedding that nothing reads
    # and, in twelve attentions, offsets and weights of three levels that are not there.
    assert counts["alignment"] == pytest.approx(3.1, abs=0.05)
    assert counts["instruction"] == counts["interaction"] == pytest.approx(496.9, abs=0.3)
    unread = 200 * 200 * 256 / 1e6
    levels = 12 * 3 * (64 + 32) * 257 / 1e6
    assert counts["planning"] == pytest.approx(552.6 - unread - levels, abs=0.3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=[planning, alignment]", "out of order"),
        ("run=[planing]", "unknown stage 'planing'"),
        ("run=[language, planning]", "'language', but"),
        ("run=[]", "run is empty"),
        ("name=a/b", "cannot be one"),
        ("data.planning.image_size=[1,2]", "data.image_size decides"),
        ("data.planning.seed=3", "the experiment decides"),
        ("stages.planning.steps=-1", "steps or epochs"),
        ("trainer.devices=0", "trainer.devices"),
        ("trainer.precision=16", "32-true, bf16-mixed"),
        ("model.language.attention=flash_attention_2", "trainer.precision=bf16-mixed"),
        ("dialect.name=odvla", "ego_token has no place"),
        ("dialect.without=[ego]", "ego_token has no place"),
        ("stages.planning.samples=0", "at least 1 sample"),
        ("seed=-1", "seed must be at least 0"),
        ("seed=99999999999999999999", "seed must be at least 0"),
        ("town.seed=-1", "town's seed must be at least 0"),
        ("model.encoder.dim=0", "model.encoder: dim must be at least 1, not 0"),
        ("model.encoder.heads=0", "model.encoder: heads must be at least 1, not 0"),
        ("model.queries.0.rows=0", "model.queries.0: rows must be at least 1"),
        ("model.queries.1.queries=-1", "model.queries.1: queries must be at least 1, not -1"),
        ("model.queries.2.queries=0", "model.queries.2: queries must be at least 1"),
        ("stages.perception.optimiser.betas=[2,3]", "optimiser.betas are numbers"),
        ("stages.perception.optimiser.betas=[.nan,0.9]", "optimiser.betas are numbers"),
    ],
)
def test_a_mistake_in_an_experiment_is_named(override, message):
    with pytest.raises(UserError, match=message):
        apply_overrides(tiny(), [override])


def test_a_stage_is_trained_again_only_for_what_concerns_it():
    def changed(*overrides):
        other = apply_overrides(tiny(), overrides)
        return [s for s in tiny().run if other.stage_hash(s) != tiny().stage_hash(s)]

    assert changed("stages.planning.steps=3") == ["planning"]
    assert changed("data.alignment.batch_size=3") == ["alignment"]
    assert changed("seed=1") == list(STAGES[1:])
    assert changed("model.encoder.dim=32") == list(STAGES[1:])
    # Perception sees and does not speak: nothing of language concerns it.
    for language in (
        "dialect.without=[command]",
        "model.language.hidden=64",
        "model.hidden_streams=[map]",
    ):
        assert changed(language) == list(STAGES[2:])
    speed = ("data.num_workers=2", "stages.planning.checkpoint_every=3", "data.root=/elsewhere")
    assert changed("data.alignment.broken_captions=3") == []
    assert changed(*speed, "trainer.accelerator=gpu", "baseline.epochs=3", "pictures=0") == []


def test_recomputing_activations_trains_nothing_again():
    config = find_experiment("uniad_town")
    leaner = apply_overrides(
        config, ["model.encoder.checkpoint=true", "model.encoder.backbone.checkpoint=true"]
    )
    assert leaner.model.encoder.checkpoint
    assert leaner.stage_hash("perception") == config.stage_hash("perception")


def test_settings_that_depend_on_each_other_are_changed_together():
    assert apply_overrides(tiny(), ["data.version=v1.0-trainval", "town=null"]).town is None
    assert (
        apply_overrides(tiny(), ["town.scenes=20", "data.version=v1.0-trainval"]).town.scenes == 20
    )


def test_a_town_of_another_kind_lies_in_another_folder():
    towns = [
        TownSettings(),
        TownSettings(seed=1),
        TownSettings(11),
        TownSettings(image_size=(8, 8)),
    ]
    assert len({town.folder_name for town in towns}) == 4


def test_experiments_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_test.py").write_text(
        "from dataclasses import replace\n"
        "from experiments.tiny import tiny\n"
        "def mine():\n    return replace(tiny(), name='mine')\n"
        "def odd():\n    return 3\n"
    )
    (tmp_path / "broken_for_test.py").write_text("import no_such_thing\n")
    assert find_experiment("mine_for_test:mine").name == "mine"
    for name, message in (
        ("mine_for_test:mein", "has no function 'mein'"),
        ("mine_for_test:odd", "returned a int"),
        ("nowhere_for_test:x", "no module 'nowhere_for_test'"),
        ("broken_for_test:x", "no module 'no_such_thing'"),
        ("tini", "did you mean 'tiny'"),
    ):
        with pytest.raises(UserError, match=message):
            find_experiment(name)


def test_equal_experiments_have_equal_hashes():
    assert config_hash(tiny()) == config_hash(tiny())
    assert isinstance(replace(tiny(), seed=1), ExperimentConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stages.planning.actions=poses",), "must be one of .*offsets.*, not 'poses'"),
        (("stages.planning.actions=tokens",), "set tokenizer.action_tokens=256"),
        (("stages.planning.actions=regression",), "set model.planner.dim=64"),
        (("data.planning.thoughts=true",), "'compact' lacks 'describe' .dialect.name=reasoning"),
        (
            ("data.planning.conversations_file=train.json",),
            "data.planning.conversations_file needs a dialect .* 'compact' lacks 'describe'",
        ),
        (
            (
                "stages.planning.actions=regression",
                "model.planner.dim=64",
                "data.planning.thoughts=true",
            ),
            "regression does not write",
        ),
        (("tokenizer.action_tokens=1",), "is 0 or at least 2, not 1"),
    ],
)
def test_a_form_of_plans_needs_its_parts(overrides, message):
    with pytest.raises(UserError, match=message):
        apply_overrides(tiny(), overrides)


def test_the_form_of_plans_changes_nothing_before_planning():
    base = tiny()
    other = apply_overrides(base, ("stages.planning.actions=offsets",))
    for stage in base.run:
        assert (other.stage_hash(stage) == base.stage_hash(stage)) == (stage != "planning")
        form = "offsets" if stage == "planning" else "changes"
        assert other.dialect_of(stage).plan_form.values == form
    assert other.dialect_of("planning").wording == base.dialect.wording
