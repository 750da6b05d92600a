"""Overrides, overlays, dumps and hashes, on configs made for the purpose."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.find import experiments, find_experiment
from odvla.config import (
    apply_overlay,
    apply_overrides,
    config_hash,
    diff,
    dump,
    flat,
    from_tree,
    to_tree,
)
from odvla.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A part."""

    size_m: float = 0.6
    spokes: int = 5

    def __post_init__(self):
        if self.size_m <= 0:
            raise ValueError(f"size_m must be above 0, not {self.size_m}")


@dataclass(frozen=True)
class Track(Wheel):
    """The same fields, another class."""


@dataclass(frozen=True)
class Car:
    """A whole with every kind of field."""

    name: str = "beetle"
    drive: Any = field(default_factory=Wheel)
    wheels: tuple[Any, ...] = (Wheel(), Track())
    colour: Literal["red", "blue"] = "red"
    seats: tuple[int, int] = (2, 3)
    names: tuple[str, ...] = ()
    spare: Wheel | None = None
    top_speed: int | None = None
    electric: bool = False


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("drive.size_m=1", "drive.size_m", 1.0),
        ("drive.size_m=1e-3", "drive.size_m", 1e-3),
        ("wheels.1.spokes=9", "wheels.1.spokes", 9),
        ("colour=blue", "colour", "blue"),
        ("seats=[4,5]", "seats", [4, 5]),
        ("names=[a, b]", "names", ["a", "b"]),
        ("names=[]", "names", []),
        ("electric=true", "electric", True),
        ("name=7", "name", "7"),
        ("name=a=b", "name", "a=b"),
        ("top_speed=90", "top_speed", 90),
        ("spare.spokes=3", "spare.spokes", 3),
    ],
)
def test_an_override_changes_one_value_of_the_class_that_stands_there(override, key, value):
    changed = apply_overrides(Car(), [override])
    assert flat(changed)[key] == value
    assert type(flat(changed)[key]) is type(value)
    assert set(diff(Car(), changed)) <= {key, "spare", "spare.class", "spare.size_m"}
    assert isinstance(changed.wheels[1], Track)


def test_overrides_take_effect_together_and_the_last_one_counts():
    changed = apply_overrides(Car(), ["spare.spokes=3", "spare.size_m=2", "name=a", "name=b"])
    assert changed.spare == Wheel(2.0, 3)
    assert changed.name == "b"
    assert apply_overrides(Car(), []) == Car()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("drive.sise_m=1", "did you mean 'size_m'"),
        ("colour=green", "red, blue"),
        ("drive.spokes=1.5", "drive.spokes must be a whole number, not 1.5"),
        ("drive.spokes=many", "drive.spokes must be a whole number"),
        ("electric=1", "true or false"),
        ("seats=[1]", "seats must have 2 items"),
        ("seats=3", "seats must be a list"),
        ("wheels.2.spokes=1", "items 0 to 1"),
        ("drive=3", "drive is a group"),
        ("drive.size_m=-1", "drive: size_m must be above 0"),
        ("drive", "key=value"),
        ("name=[a", "cannot be read"),
        ("name=null", "name must be a text"),
        ("drive.class=x.Y", "chosen in an experiment"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(override, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        apply_overrides(Car(), [override])
    assert "\n" not in str(error.value)


@given(
    st.builds(
        Car,
        name=st.text("abc ÷:#'", min_size=1),
        drive=st.builds(Wheel, size_m=st.floats(1e-3, 1e6)),
        colour=st.sampled_from(["red", "blue"]),
        spare=st.none() | st.builds(Wheel, spokes=st.integers()),
        names=st.lists(st.sampled_from(["a", "1", "null", "true"])).map(tuple),
    )
)
def test_a_dump_laid_over_the_default_gives_the_config_back(tmp_path_factory, car):
    path = tmp_path_factory.mktemp("overlay") / "car.yaml"
    path.write_text(dump(car))
    assert apply_overlay(Car(), path) == car


def test_an_overlay_that_does_not_fit_names_its_file(tmp_path):
    path = tmp_path / "over.yaml"
    path.write_text("drive: {spokes: x}")
    with pytest.raises(UserError, match=r"over\.yaml: drive\.spokes"):
        apply_overlay(Car(), path)
    path.write_text("drive: {spokes: x")
    with pytest.raises(UserError, match=r"over\.yaml cannot be read"):
        apply_overlay(Car(), path)
    path.write_text("name: a\ndrive:\n  spokes: 3\nname: b\n")
    with pytest.raises(UserError, match=r"over\.yaml cannot .*duplicate key name, line 4$"):
        apply_overlay(Car(), path)
    for coding in ("latin-1", "utf-16"):
        path.write_bytes("name: \xe9".encode(coding))
        with pytest.raises(UserError, match=r"over\.yaml cannot be read: 'utf-8'"):
            apply_overlay(Car(), path)
    with pytest.raises(UserError, match="does not exist"):
        apply_overlay(Car(), tmp_path / "none.yaml")


def test_the_hash_sees_values_and_classes_but_not_identity():
    assert config_hash(Car()) == config_hash(Car())
    assert config_hash(Car()) != config_hash(Car(electric=True))
    # Equal field by field, yet another part.
    assert config_hash(Car(drive=Wheel())) != config_hash(Car(drive=Track()))


def test_a_tree_holds_primitives_only():
    with pytest.raises(TypeError, match="object"):
        to_tree(Car(drive=object()))


@given(
    st.builds(
        Car,
        name=st.text(),
        drive=st.builds(Track, spokes=st.integers(0, 99)),
        wheels=st.lists(st.builds(Wheel, spokes=st.integers(0, 9)), max_size=3).map(tuple),
        colour=st.sampled_from(["red", "blue"]),
        names=st.lists(st.text(), max_size=3).map(tuple),
        spare=st.none() | st.builds(Wheel),
        top_speed=st.none() | st.integers(),
    )
)
def test_a_tree_becomes_what_it_was_made_of(car):
    # By way of JSON, as in a card.
    assert from_tree(json.loads(json.dumps(to_tree(car)))) == car


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_comes_back_from_its_card(name):
    config = find_experiment(name)
    again = from_tree(json.loads(json.dumps(to_tree(config))))
    assert again == config
    assert all(again.stage_hash(stage) == config.stage_hash(stage) for stage in config.run)


def test_a_tree_of_an_older_version_takes_defaults():
    tree = to_tree(Car(seats=(1, 1)))
    del tree["top_speed"], tree["drive"]["spokes"]
    assert from_tree(tree) == Car(seats=(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "no.such.Class"}, "the configuration is of class no.such.Class"),
        ({"class": "pathlib.Path"}, "pathlib.Path, which holds no settings"),
        ({"colur": "red"}, "unknown key 'the configuration.colur'.*did you mean 'colour'"),
        ({"colour": "green"}, "the configuration.colour must be one of red, blue"),
        ({"drive": {"class": f"{__name__}.Wheel", "size_m": -1.0}}, "drive: size_m must be above"),
    ],
)
def test_a_tree_that_fits_nothing_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_tree(to_tree(Car()) | change)
