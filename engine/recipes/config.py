"""Configurations: TOML files and the frozen dataclasses that they fill."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import GigamorphError

T = TypeVar("T")


def default_text(name: str) -> str:
    """The TOML file of a recipe: every published hyper-parameter with its source."""
    return (Path(__file__).parent / "configs" / f"{name}.toml").read_text(encoding="utf-8")


def load_config(path: str | Path, cls: type[T]) -> T:
    """A configuration from a TOML file; what the file omits is as published.

    Raises:
        GigamorphError: the file is missing or no TOML, a key is unknown, or a value is of another type; in one line
            that names file and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GigamorphError(f"{path}: cannot be read ({error}); name a TOML file") from error
    return parse_config(text, cls, str(path))


def parse_config(text: str, cls: type[T], source: str) -> T:
    """As `load_config`, from text; `source` is what messages call it."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GigamorphError(f"{source}: is no TOML: {error}") from error
    return _build(cls, values, source, "")


def to_plain(config: Any, omit: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration as plain containers, numbers and texts, which `from_plain` takes, without some of its keys."""
    return _plain(asdict(config), omit)


def _plain(value: Any, omit: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _plain(own, omit) for key, own in value.items() if own is not None and key not in omit}
    return [_plain(own, omit) for own in value] if isinstance(value, list | tuple) else value


def from_plain(values: dict[str, Any], cls: type[T], source: str) -> T:
    """The inverse of `to_plain`; `source` is what messages call it."""
    return _build(cls, values, source, "")


def _build(cls: Any, values: dict[str, Any], source: str, place: str) -> Any:
    types = get_type_hints(cls)
    known = [own.name for own in fields(cls) if own.init]
    for key in values:
        if key not in known:
            raise GigamorphError(f"{source}: key '{place}{key}' is unknown; there are {', '.join(known)}")
    for own in fields(cls):
        if own.name not in values and own.default is MISSING and own.default_factory is MISSING:
            raise GigamorphError(f"{source}: key '{place}{own.name}' is missing")
    made = {key: _value(types[key], value, source, place + key) for key, value in values.items()}
    try:
        return cls(**made)
    except GigamorphError as error:
        raise GigamorphError(f"{source}: {error}") from error


def _value(wanted: Any, value: Any, source: str, key: str) -> Any:
    origin = get_origin(wanted)
    if origin is Literal:
        choices = get_args(wanted)
        if value not in choices or isinstance(value, bool) not in {isinstance(c, bool) for c in choices}:
            raise GigamorphError(f"{source}: key '{key}' is {value!r}; take one of {', '.join(map(str, choices))}")
        return value
    if origin in (Union, UnionType):
        # TOML has no null: a key that may be None is omitted for it.
        [wanted] = [t for t in get_args(wanted) if t is not NoneType]
        return _value(wanted, value, source, key)
    if origin is tuple and isinstance(value, list):
        inner = get_args(wanted)
        if inner[-1] is Ellipsis:
            return tuple(_value(inner[0], item, source, f"{key}[{i}]") for i, item in enumerate(value))
        if len(inner) == len(value):
            return tuple(_value(t, v, source, f"{key}[{i}]") for i, (t, v) in enumerate(zip(inner, value, strict=True)))
    if is_dataclass(wanted) and isinstance(value, dict):
        return _build(wanted, value, source, f"{key}.")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted in (bool, int, float, str) and type(value) is wanted:
        return value
    raise GigamorphError(f"{source}: key '{key}' is {value!r}, not {_name(wanted)}")


def _name(wanted: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if get_origin(wanted) is tuple:
        inner = get_args(wanted)
        if inner[-1] is Ellipsis:
            return f"a list, each of it {_name(inner[0])}"
        return f"a list of {len(inner)}: {', '.join(_name(t) for t in inner)}"
    return names.get(wanted, "a table")
