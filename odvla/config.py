"""Configurations: frozen dataclasses, changed by dotted overrides, written as YAML, hashed.

A configuration is a tree of frozen dataclasses whose leaves are primitives, None and tuples. An
override walks the tree as it is, so that a key of a swapped part (`model.encoder.dim`) is checked
against the class that stands there, not against a base class.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from odvla.errors import UserError

_C = TypeVar("_C")
# Key under which a tree names the class of a dataclass; a Python field cannot be called so.
CLASS_KEY = "class"


def apply_overrides(config: _C, overrides: Iterable[str]) -> _C:
    """Change values by `key=value` texts, e.g. `stages.planning.steps=10`.

    Values are YAML: `1e-4`, `true`, `null`, `[perception, planning]`. Items of a tuple are
    addressed by number: `model.queries.1.queries=50`.

    Args:
        config: a dataclass instance; it is not changed.
        overrides: all take effect at once, so that settings that depend on each other can be
            changed together; of two for one key the later counts.

    Returns:
        The changed copy.

    Raises:
        UserError: a text without "=", an unknown key, or a value of the wrong type.
    """
    patch: dict[str, Any] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {override!r} is not of the form key=value")
        try:
            one = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=True)
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"override {override!r} cannot be read: {_line(error)}") from error
        _lay_over(patch, one)
    return _merge(config, patch, "")


def apply_overlay(config: _C, path: Path) -> _C:
    """Change values by a YAML file that holds any part of the tree.

    Raises:
        UserError: the file is missing or not YAML, or a key or value does not fit.
    """
    if not path.is_file():
        raise UserError(f"the overlay {path} does not exist")
    try:
        patch = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"the overlay {path} cannot be read: {_line(error)}") from error
    try:
        return _merge(config, patch, "")
    except UserError as error:
        raise UserError(f"the overlay {path}: {error}") from error


def to_tree(config: Any) -> Any:
    """Nested dicts, lists and primitives; each dataclass also names its class."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {CLASS_KEY: f"{type(config).__module__}.{type(config).__qualname__}", **fields}
    if isinstance(config, tuple | list):
        return [to_tree(item) for item in config]
    if isinstance(config, Mapping):
        return {str(key): to_tree(value) for key, value in config.items()}
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise TypeError(f"a configuration cannot hold {type(config).__name__} {config!r}")


def from_tree(tree: Any, key: str = "the configuration") -> Any:
    """The configuration that `to_tree` made a tree of, e.g. a card's; the classes are imported.

    Args:
        tree: settings that it lacks, as of an older version, have their defaults.
        key: where it stands, for messages.

    Raises:
        UserError: naming a class that does not exist, a setting that its class does not know, or
            one that has no default and is missing.
    """
    if isinstance(tree, list):
        return tuple(from_tree(item, f"{key}.{i}") for i, item in enumerate(tree))
    if not isinstance(tree, dict):
        return tree
    if CLASS_KEY not in tree:
        return {name: from_tree(value, f"{key}.{name}") for name, value in tree.items()}
    kind = _class_called(tree[CLASS_KEY], key)
    hints = _hints(kind)
    made = {setting.name for setting in dataclasses.fields(kind)} - set(hints)
    values = {}
    for name, value in tree.items():
        if name == CLASS_KEY or name in made:
            continue
        if name not in hints:
            raise UserError(_unknown(f"{key}.{name}", name, hints))
        inner = from_tree(value, f"{key}.{name}")
        if not _has_groups(inner):
            fitted = _fit(inner, hints[name], f"{key}.{name}")
            # Paths are texts in a tree; but 1 stays 1 where 1.0 is meant: hashes tell them apart.
            inner = inner if fitted == inner else fitted
        values[name] = inner
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # a setting is missing, or the config's own check
        raise UserError(f"{key}: {error}") from error


def flat(config: Any) -> dict[str, Any]:
    """Leaves by dotted key; lists of primitives count as leaves."""
    leaves: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict):
            items = node.items()
        elif isinstance(node, list) and any(isinstance(item, dict | list) for item in node):
            items = {str(i): item for i, item in enumerate(node)}.items()
        else:
            leaves[key] = node
            return
        for name, value in items:
            walk(value, f"{key}.{name}" if key else name)

    walk(to_tree(config), "")
    return leaves


def diff(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Leaves in which two configurations differ; a leaf one of them lacks is None there."""
    a, b = flat(first), flat(second)
    keys = [*a, *(key for key in b if key not in a)]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def dump(config: Any) -> str:
    """The tree as YAML; it can be given back as an overlay."""
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


def config_hash(config: Any) -> str:
    """SHA-256 of the tree in a canonical form."""
    text = json.dumps(to_tree(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _lay_over(patch: dict[str, Any], other: Any) -> None:
    """Put the values of one nested dict into another."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(patch.get(key), dict):
            _lay_over(patch[key], value)
        else:
            patch[key] = value


def _merge(node: Any, patch: Any, key: str) -> Any:
    """`node` with the values of `patch` (nested dicts by field name or item number)."""
    if not isinstance(patch, dict):
        raise UserError(f"{key or 'the configuration'} is a group of settings, not a value")
    if isinstance(node, tuple):
        items = list(node)
        for name, value in patch.items():
            if not str(name).isdigit() or int(name) >= len(items):
                raise UserError(f"{key} has items 0 to {len(items) - 1}, not {name!r}")
            old = items[int(name)]
            items[int(name)] = _changed(old, Any, value, f"{key}.{name}")
        return tuple(items)
    hints = _hints(type(node))
    changes = {}
    for name, value in patch.items():
        path = f"{key}.{name}" if key else str(name)
        if name == CLASS_KEY:
            _check_class(node, value, path)
            continue
        if name not in hints:
            raise UserError(_unknown(path, str(name), hints))
        changes[name] = _changed(getattr(node, name), hints[name], value, path)
    try:
        return dataclasses.replace(node, **changes)
    except UserError:
        raise
    except ValueError as error:  # the config's own check of its values
        raise UserError(f"{key or 'the experiment'}: {error}") from error


def _changed(old: Any, hint: Any, value: Any, key: str) -> Any:
    """What becomes of a field that held `old` when `value` is assigned to it."""
    is_group = dataclasses.is_dataclass(old) and not isinstance(old, type)
    if isinstance(value, dict) and (is_group or isinstance(old, tuple)):
        return _merge(old, value, key)
    if is_group and not (value is None and _allows_none(hint)):
        raise UserError(f"{key} is a group of settings, set one of them, e.g. {_example(old, key)}")
    if isinstance(old, tuple) and any(dataclasses.is_dataclass(item) for item in old):
        return _items(old, value, key)
    if hint is Any and old is not None:
        hint = type(old) if not isinstance(old, tuple) else tuple[Any, ...]
    return _fit(value, hint, key)


def _items(old: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    """A list for a tuple of groups (a dumped overlay): item by item, none added."""
    if not isinstance(value, list) or len(value) > len(old):
        raise UserError(
            f"{key} is a list of {len(old)} groups; add groups in an experiment function"
        )
    pairs = zip(old, value, strict=False)  # a shorter list leaves out the last ones
    return tuple(_merge(item, patch, f"{key}.{i}") for i, (item, patch) in enumerate(pairs))


def _fit(value: Any, hint: Any, key: str) -> Any:
    """`value` (from YAML) as an instance of a type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    if origin is Literal:
        if value in arguments:
            return value
        options = ", ".join(str(option) for option in arguments)
        raise UserError(f"{key} must be one of {options}, not {value!r}")
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, arguments, key)
    if origin is tuple:
        return _fit_tuple(value, arguments, key)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _merge(hint(), value, key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint is str and not isinstance(value, dict | list) and value is not None:
        return str(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, type(None)) and isinstance(value, hint):
        return value
    raise UserError(f"{key} must be {_type_name(hint)}, not {value!r}")


def _fit_union(value: Any, arguments: Sequence[Any], key: str) -> Any:
    """The first alternative that takes the value."""
    if value is None and type(None) in arguments:
        return None
    failures = []
    for argument in arguments:
        try:
            return _fit(value, argument, key)
        except UserError as error:
            failures.append(error)
    if len([a for a in arguments if a is not type(None)]) == 1:
        raise failures[0]
    names = " or ".join(_type_name(argument) for argument in arguments)
    raise UserError(f"{key} must be {names}, not {value!r}")


def _fit_tuple(value: Any, arguments: Sequence[Any], key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{key} must be a list such as [{value}], not {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_fit(item, arguments[0], f"{key}.{i}") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise UserError(f"{key} must have {len(arguments)} items, not {len(value)}")
    pairs = zip(value, arguments, strict=True)
    return tuple(_fit(item, hint, f"{key}.{i}") for i, (item, hint) in enumerate(pairs))


def _hints(kind: type) -> dict[str, Any]:
    """Resolved type hints of the fields that may be set."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def _allows_none(hint: Any) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)


def _has_groups(value: Any) -> bool:
    """Whether a value is a group of settings, or holds some."""
    if isinstance(value, tuple):
        return any(_has_groups(item) for item in value)
    if isinstance(value, dict):
        return any(_has_groups(item) for item in value.values())
    return dataclasses.is_dataclass(value)


def _class_called(name: Any, key: str) -> Any:
    """A dataclass by the name that a tree has for it."""
    module, _, own = str(name).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} is of class {name}, which cannot be imported: {error}") from error
    if not dataclasses.is_dataclass(kind):
        raise UserError(f"{key} is of class {name}, which holds no settings")
    return kind


def _check_class(node: Any, name: Any, key: str) -> None:
    own = f"{type(node).__module__}.{type(node).__qualname__}"
    if name != own:
        raise UserError(
            f"{key} is {own} in this experiment; another class ({name}) is chosen in an experiment "
            "function, not by an override"
        )


def _unknown(path: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}"
    parent = path.rpartition(".")[0] or "the experiment"
    return f"unknown key {path!r}: {parent} has no {name!r}; {hint}"


def _example(node: Any, key: str) -> str:
    first = dataclasses.fields(node)[0].name if dataclasses.fields(node) else "..."
    return f"{key}.{first}=..."


def _type_name(hint: Any) -> str:
    plain: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        type(None): "null",
    }
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


def _line(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
