"""Configurations: TOML, YAML or JSON files, single values as ``key=value``, the frozen dataclasses that they fill."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import DataError, GigamorphError
from .parsing import parse_json

T = TypeVar("T")


def load_config(path: str | Path, cls: type[T]) -> T:
    """A configuration from a file, see `read_values`; what the file omits is as the class says.

    Raises:
        GigamorphError: the file is missing or cannot be parsed, a key is unknown, or a value is of another type; in one
            line that names file and key.
    """
    return _build(cls, read_values(path), str(path), "")


def read_values(path: str | Path) -> dict[str, Any]:
    """What stands in a file: YAML if its name ends in ``.yaml`` or ``.yml``, JSON in ``.json``, else TOML.

    Raises:
        GigamorphError: it is missing or cannot be parsed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise GigamorphError(f"{path}: cannot be read ({error}); name a TOML, YAML or JSON file") from error
    parse = _PARSERS.get(path.suffix.lower(), _parsed)
    return parse(text, str(path))


def parse_config(text: str, cls: type[T], source: str) -> T:
    """As `load_config`, from text in TOML; `source` is what messages call it."""
    return _build(cls, _parsed(text, source), source, "")


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(text)
    except ValueError as error:  # also of a number that is too long
        raise GigamorphError(f"{source}: is no TOML: {error}") from error
    except RecursionError:
        raise GigamorphError(f"{source}: {_DEEP}") from None
    _require_bounded(found, source)
    return found


def _parsed_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        found = yaml.load(text, _Yaml)
    except _Twice as error:
        raise GigamorphError(f"{source}: {error}") from error
    except RecursionError:
        raise GigamorphError(f"{source}: {_DEEP}") from None
    except Exception as error:  # its constructors have many: a month 13, a number that is too long
        raise GigamorphError(f"{source}: is no YAML: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise GigamorphError(f"{source}: holds no table of keys and values")
    _require_bounded(found, source)
    return _as_toml(found)


_DEEP = "is nested too deeply; write a table of keys and values"
_MOST = 100_000  # values of a configuration


def _require_bounded(found: Any, source: str) -> None:
    """Refuse what Python cannot go through or print, and YAML whose aliases make billions of values of a few lines."""
    left, count = [(found, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > _MOST or depth > 100:
            raise GigamorphError(f"{source}: has more than {_MOST} values, or {_DEEP}")
        if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print a long one
            raise GigamorphError(f"{source}: holds a whole number of more than 64 bits")
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += ((part, depth + 1) for part in parts)


class _Twice(GigamorphError):
    """A key that a table has twice, of which YAML and JSON would take the last."""


class _Yaml(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _require_once([str(key.value) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require_once([key for key, _ in pairs])
    return dict(pairs)


def _require_once(keys: Sequence[str]) -> None:
    if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
        raise _Twice(f"key '{twice[0]}' is there twice")


def _parsed_json(text: str, source: str) -> dict[str, Any]:
    try:
        found = parse_json(text, object_pairs_hook=_table)
    except _Twice as error:
        raise GigamorphError(f"{source}: {error}") from error
    except ValueError as error:
        raise GigamorphError(f"{source}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise GigamorphError(f"{source}: holds no table of keys and values")
    _require_bounded(found, source)
    return _as_toml(found)


_PARSERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    ".yaml": _parsed_yaml,
    ".yml": _parsed_yaml,
    ".json": _parsed_json,
}


def _as_toml(value: Any) -> Any:
    """1e-3, which YAML takes for a text, is a number; what a null is, see `_build`."""
    if isinstance(value, dict):
        return {str(key): _as_toml(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_as_toml(own) for own in value]
    return _number_or_text(value) if isinstance(value, str) else value


def _number_or_text(text: str) -> float | str:
    return float(text) if re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)[eE][+-]?\d+", text) else text


def parse_value(text: str) -> tuple[str, Any]:
    """``optimizer.lr=1e-3`` as ("optimizer.lr", 0.001): the value as TOML has it, else a text.

    Raises:
        GigamorphError: there is no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise GigamorphError(f"{text!r} is no setting; write KEY=VALUE, as in optimizer.lr=1e-3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return key.strip(), value.strip()


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted key.

    Raises:
        GigamorphError: a part of the key is a value already, and no table.
    """
    *tables, last = key.split(".")
    for i, table in enumerate(tables):
        if values.get(table) is None:
            values[table] = {}
        values = values[table]
        if not isinstance(values, dict):
            raise GigamorphError(f"key '{key}': '{'.'.join(tables[: i + 1])}' is a value, no table")
    values[last] = value


def without_nulls(value: Any) -> Any:
    """The same, but for keys whose value is a null of YAML or JSON."""
    if isinstance(value, dict):
        return {key: without_nulls(own) for key, own in value.items() if own is not None}
    return [without_nulls(own) for own in value] if isinstance(value, list) else value


def to_plain(config: Any, omit: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration as plain containers, numbers and texts, which `from_plain` takes, without some of its keys."""
    return _plain(asdict(config), omit)


def _plain(value: Any, omit: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _plain(own, omit) for key, own in value.items() if own is not None and key not in omit}
    return [_plain(own, omit) for own in value] if isinstance(value, list | tuple) else value


def to_toml(config: Any) -> str:
    """All of a configuration in TOML, which `load_config` takes; what is not set stands there as a comment."""
    return _toml(asdict(config), "").lstrip("\n")


def _toml(values: Mapping[str, Any], name: str, head: str = "[{}]") -> str:
    import tomli_w  # networks run where it is not installed

    # What follows the head of a table is the table's own: all of them come last.
    tables = {key: value for key, value in values.items() if value and (isinstance(value, dict) or _has_tables(value))}
    plain = {key: _plain(value, ()) for key, value in values.items() if key not in tables}
    text = f"\n{head.format(name)}\n" if name else ""
    for key, value in plain.items():
        text += f"# {key} =\n" if value is None else tomli_w.dumps({key: value}) if value != {} else f"{key} = {{}}\n"
    for key, value in tables.items():
        place = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            text += _toml(value, place)
        else:
            text += "".join(_toml(own, place, "[[{}]]") for own in value)
    return text


def _has_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(own, dict) for own in value)


def from_plain(values: dict[str, Any], cls: type[T], source: str) -> T:
    """The inverse of `to_plain`; `source` is what messages call it."""
    return _build(cls, values, source, "")


def check_plain(values: Mapping[str, Any], cls: type, source: str) -> None:
    """Refuse values of a file of which one that a class has is missing or of another type; others may be there too.

    Raises:
        DataError: as `load_config`.
    """
    try:
        _build(cls, _of_class(_plain(values, ()), cls), source, "")
    except GigamorphError as error:
        raise DataError(str(error)) from error


def _of_class(value: Any, wanted: Any) -> Any:
    """What of plain containers a type has keys for."""
    for one in (wanted, *get_args(wanted)):
        if is_dataclass(one) and isinstance(value, dict):
            types = get_type_hints(one)
            return {key: _of_class(own, types[key]) for key, own in value.items() if key in types}
        if is_dataclass(one) and isinstance(value, list):
            return [_of_class(own, one) for own in value]
    return value


def _build(cls: Any, values: dict[str, Any], source: str, place: str) -> Any:
    types = get_type_hints(cls)
    known = [own.name for own in fields(cls) if own.init]
    for key in values:
        if key not in known:
            meant = "" if place else "".join(f"; {one} is one" for one in _deeper(cls, key))
            raise GigamorphError(f"{source}: key '{place}{key}' is unknown{meant}; there are {', '.join(known)}")
    for own in fields(cls):
        default = own.default if own.default_factory is MISSING else own.default_factory()
        if values.get(own.name) is None and default is MISSING:
            raise GigamorphError(f"{source}: key '{place}{own.name}' is missing")
        # A null of YAML or JSON is TOML's omitted key; of one whose default is something it could mean nothing else.
        if own.name in values and values[own.name] is None and default and not is_dataclass(default):
            raise GigamorphError(f"{source}: key '{place}{own.name}' is null; leave it out for {default}")
    values = {key: value for key, value in values.items() if value is not None}
    made = {key: _value(types[key], value, source, place + key) for key, value in values.items()}
    try:
        return cls(**made)
    except GigamorphError as error:
        raise GigamorphError(f"{source}: {error}") from error


def _deeper(cls: Any, key: str) -> list[str]:
    """Keys of the tables in a configuration that have this name."""
    tables = {name: own for name, own in get_type_hints(cls).items() if is_dataclass(own)}
    return [f"{name}.{key}" for name, own in tables.items() if key in {one.name for one in fields(own)}]


def _value(wanted: Any, value: Any, source: str, key: str) -> Any:
    origin = get_origin(wanted)
    if origin is Literal:
        choices = get_args(wanted)
        if value not in choices or isinstance(value, bool) not in {isinstance(c, bool) for c in choices}:
            raise GigamorphError(f"{source}: key '{key}' is {value!r}; take one of {', '.join(map(str, choices))}")
        return value
    if origin in (Union, UnionType):
        # TOML has no null: a key that may be None is omitted for it.
        return _any_of([t for t in get_args(wanted) if t is not NoneType], value, source, key)
    if wanted == tuple[str, ...] and isinstance(value, str):  # one name is a list of one
        return (value,)
    if origin is tuple and isinstance(value, list):
        inner = get_args(wanted)
        if inner[-1] is Ellipsis:
            return tuple(_value(inner[0], item, source, f"{key}[{i}]") for i, item in enumerate(value))
        if len(inner) == len(value):
            return tuple(_value(t, v, source, f"{key}[{i}]") for i, (t, v) in enumerate(zip(inner, value, strict=True)))
    if origin is list and isinstance(value, list):
        return [_value(get_args(wanted)[0], item, source, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        inner = get_args(wanted)[1]
        given = without_nulls(value)
        return {str(k): v if inner is Any else _value(inner, v, source, f"{key}.{k}") for k, v in given.items()}
    if is_dataclass(wanted) and isinstance(value, dict):
        return _build(wanted, value, source, f"{key}.")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        return float(value)
    if wanted in (bool, int, float, str) and type(value) is wanted:
        return value
    raise GigamorphError(f"{source}: key '{key}' is {value!r}, not {_name(wanted, key)}")


def _any_of(wanted: Sequence[Any], value: Any, source: str, key: str) -> Any:
    for each in wanted if len(wanted) > 1 else ():
        with contextlib.suppress(GigamorphError):
            return _value(each, value, source, key)
    alike = [each for each in wanted if _is_alike(each, value)]  # says what is wrong inside of it
    if not alike and len(wanted) > 1:
        raise GigamorphError(f"{source}: key '{key}' is {value!r}, not {_or(map(_name, wanted))}")
    return _value((alike or wanted)[-1], value, source, key)


def _or(names: Iterable[str]) -> str:
    *others, last = sorted(names, key=lambda name: name.startswith("a list"))
    return f"{', '.join(others)} or {last}"


def _is_alike(wanted: Any, value: Any) -> bool:
    """Whether a value is a list or table, as is wanted."""
    origin = get_origin(wanted)
    return (isinstance(value, list) and origin is tuple) or (
        isinstance(value, dict) and (is_dataclass(wanted) or origin is dict)
    )


def _name(wanted: Any, key: str = "") -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    if get_origin(wanted) is tuple:
        inner = get_args(wanted)
        if inner[-1] is Ellipsis:
            return f"a list, each of it {_name(inner[0])}"
        return f"a list of {len(inner)}: {', '.join(_name(t) for t in inner)}"
    if is_dataclass(wanted) and key:
        return f"a table; {key}.{fields(wanted)[0].name} is a key of it"
    return names.get(wanted, "a table")
