"""Cards vouch for weights."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import nn

from experiments.handoff import (
    CARD,
    TOKENIZER,
    WEIGHTS,
    Card,
    check_handoff,
    data_fingerprint,
    learned_dialect,
    load_handoff,
    read_card,
)
from experiments.schema import ExperimentConfig
from experiments.tiny import tiny
from odvla.config import to_tree
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.weights import file_sha256, save_weights


@pytest.fixture
def handoff(tmp_path) -> Path:
    folder = tmp_path / "alignment"
    (folder / TOKENIZER).mkdir(parents=True)
    vocabulary = folder / TOKENIZER / "tokenizer.json"
    vocabulary.write_text("{}")
    weights = save_weights(nn.Linear(2, 2), folder / WEIGHTS)
    Card(
        experiment="e",
        stage="alignment",
        config={"model": to_tree(Model(2)), "data": to_tree(tiny().data)},
        stage_hash="s",
        git_commit="c",
        data_fingerprint="d",
        weights_sha256=weights,
        tokenizer_sha256=file_sha256(vocabulary),
        parent_stage=None,
        parent_card_sha256=None,
        seed=0,
        steps=1,
        seconds=1.0,
        trained={"projectors": 6},
        frozen_before={},
        frozen_after={},
        metrics={},
    ).write(folder)
    return folder


@dataclass(frozen=True)
class Model:
    """Stands for a model config."""

    dim: int


def experiment(dim=2, **changes):
    """What load_handoff looks at of an experiment."""
    return replace(tiny(), model=Model(dim), dialect=Dialect("odvla"), **changes)


def test_a_handoff_is_loaded_and_a_changed_model_is_reported(handoff, caplog, monkeypatch):
    monkeypatch.setattr(ExperimentConfig, "__post_init__", lambda self: None)
    model, config = nn.Linear(2, 2), experiment()
    card = load_handoff(handoff, "planning", model, config)
    assert card.stage == "alignment"
    assert not caplog.records
    load_handoff(handoff, "planning", model, experiment(3))
    assert "dim 2 -> 3" in caplog.text


class Halves(nn.Module):
    """A model of two parts: what sees and what speaks."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2)
        self.language = nn.Linear(2, words)


def test_first_perception_hands_over_what_sees_and_no_more(handoff, tmp_path):
    folder = handoff.rename(tmp_path / "perception")
    learned = Halves(words=2)
    weights = save_weights(learned, folder / WEIGHTS)
    card = replace(read_card(folder), stage="perception", weights_sha256=weights)
    card.write(folder)
    other = Halves(words=5)
    spoken = other.language.weight.clone()
    load_handoff(folder, "planning", other, tiny())
    assert other.encoder.weight.equal(learned.encoder.weight)
    assert other.language.weight.equal(spoken)
    # After another stage its language weights are trained ones, and are handed over as well.
    replace(card, parent_stage="language").write(folder)
    with pytest.raises(UserError, match=r"language.* has shape .*, the model wants \(5"):
        load_handoff(folder, "planning", other, tiny())


def test_another_dialect_is_refused_unless_forced(handoff, caplog, monkeypatch):
    monkeypatch.setattr(ExperimentConfig, "__post_init__", lambda self: None)
    model = nn.Linear(2, 2)
    spoken = replace(read_card(handoff), dialect=Dialect("compact").identity())
    spoken.write(handoff)
    with pytest.raises(UserError, match=r"trained on dialect .compact., .* speaks .odvla.: plans"):
        load_handoff(handoff, "planning", model, experiment())
    load_handoff(handoff, "planning", model, experiment(force_dialect=True))
    assert "forced: the handoff" in caplog.text
    same = replace(experiment(), dialect=Dialect("compact"))
    assert load_handoff(handoff, "planning", model, same).dialect["name"] == "compact"


def test_weights_speak_the_dialect_they_last_learned(handoff):
    compact, odvla = Dialect("compact"), Dialect("odvla")
    parent = replace(read_card(handoff), dialect=compact.identity())
    assert learned_dialect(["encoder", "queries"], odvla, None) is None
    assert learned_dialect(["encoder", "queries"], odvla, parent) == compact.identity()
    for part in ("projectors", "language"):
        assert learned_dialect([part], odvla, parent) == odvla.identity()


@pytest.mark.parametrize("stage", ["language", "perception", "alignment"])
def test_stages_out_of_order_are_refused(handoff, stage):
    with pytest.raises(UserError, match=rf"stage {stage} cannot start from .*alignment"):
        check_handoff(handoff, stage)


def test_a_file_that_is_not_the_cards_is_refused(handoff):
    save_weights(nn.Linear(2, 2), handoff / WEIGHTS)
    with pytest.raises(UserError, match=r"vla\.safetensors is not the file that .*SHA-256"):
        check_handoff(handoff, "planning")
    (handoff / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"vla\.safetensors does not exist"):
        check_handoff(handoff, "planning")


def test_a_broken_card_is_refused(handoff):
    path = handoff / CARD
    content = json.loads(path.read_text())
    for broken in ("{", json.dumps({"stage": "planning"}), json.dumps({**content, "format": 9})):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"card\.json"):
            read_card(handoff)


def test_the_fingerprint_sees_every_file_and_no_place(tmp_path):
    roots = []
    for name in ("a", "b"):
        root = tmp_path / name
        (root / "v1.0-mini").mkdir(parents=True)
        (root / "v1.0-mini" / "scene.json").write_text("[1]")
        (root / "language").mkdir()
        roots.append(root)
    one, two = roots
    assert data_fingerprint(one, "v1.0-mini") == data_fingerprint(two, "v1.0-mini")
    (two / "v1.0-mini" / "scene.json").write_text("[2]")
    assert data_fingerprint(one, "v1.0-mini") != data_fingerprint(two, "v1.0-mini")
    (two / "v1.0-mini" / "scene.json").write_text("[1]")
    (two / "language" / "x.json").write_text("")
    assert data_fingerprint(one, "v1.0-mini") != data_fingerprint(two, "v1.0-mini")
