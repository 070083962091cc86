"""Configurations: frozen dataclasses, filled from TOML, YAML or JSON files and from ``key=value`` texts."""

from __future__ import annotations

import contextlib
import functools
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
_types_of = functools.cache(get_type_hints)


def load_config(path: str | Path, cls: type[T]) -> T:
    """Load a configuration from a file (see `read_values`); omitted keys get the defaults of the class.

    Raises:
        GigamorphError: the file is missing or cannot be parsed, a key is unknown, or a value has another type. The
            message is one line that names file and key.
    """
    return _build(cls, read_values(path), str(path), "")


def read_values(path: str | Path) -> dict[str, Any]:
    """The values in a file: YAML if its name ends in ``.yaml`` or ``.yml``, JSON for ``.json``, else TOML.

    Raises:
        GigamorphError: the file is missing or cannot be parsed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise GigamorphError(f"{path}: cannot be read ({error}); pass a TOML, YAML or JSON file") from error
    return _parse(text, str(path), path.suffix.lower())


def parse_config(text: str, cls: type[T], source: str) -> T:
    """Load a configuration from TOML text, as `load_config`; `source` names the text in messages."""
    return _build(cls, _parse(text, source, ".toml"), source, "")


def _parse(text: str, source: str, suffix: str) -> dict[str, Any]:
    """The values in a text, as TOML has them."""
    language, parse = _PARSERS.get(suffix, ("TOML", tomllib.loads))
    try:
        found = parse(text)
    except _DuplicateKey as error:
        raise GigamorphError(f"{source}: {error}") from error
    except RecursionError:
        raise GigamorphError(f"{source}: {_DEEP}") from None
    except Exception as error:  # YAML's constructors raise many classes: for a month 13, for a number that is too long
        raise GigamorphError(f"{source}: is not valid {language}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise GigamorphError(f"{source}: must be a table of keys and values")
    _require_bounded(found, source)
    return found if language == "TOML" else _as_toml(found)


_DEEP = "is nested too deeply; write a table of keys and values"
_MOST = 100_000  # limit on the values of a configuration


def _require_bounded(found: Any, source: str) -> None:
    """Refuse values that Python cannot traverse or print, and YAML aliases that expand to billions of values."""
    left, count = [(found, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > _MOST or depth > 100:
            raise GigamorphError(f"{source}: has more than {_MOST} values, or {_DEEP}")
        if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print a long integer
            raise GigamorphError(f"{source}: contains an integer of more than 64 bits; write a smaller number")
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += ((part, depth + 1) for part in parts)


class _DuplicateKey(GigamorphError):
    """A table has a key twice; YAML and JSON parsers would silently use the last value."""


class _Yaml(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _require_unique([str(key.value) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require_unique([key for key, _ in pairs])
    return dict(pairs)


def _require_unique(keys: Sequence[str]) -> None:
    if duplicates := [key for number, key in enumerate(keys) if key in keys[:number]]:
        raise _DuplicateKey(f"duplicate key '{duplicates[0]}'; remove one of the two")


def _parse_yaml(text: str) -> Any:
    found = yaml.load(text, _Yaml)
    return {} if found is None else found  # an empty file


_PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    ".yaml": ("YAML", _parse_yaml),
    ".yml": ("YAML", _parse_yaml),
    ".json": ("JSON", lambda text: parse_json(text, object_pairs_hook=_table)),
}


def _as_toml(value: Any) -> Any:
    """The values as TOML has them: YAML parses 1e-3 as a text. `_build` handles nulls."""
    if isinstance(value, dict):
        return {str(key): _as_toml(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_as_toml(own) for own in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)[eE][+-]?\d+", value)
    return float(value) if is_number else value


def parse_value(text: str) -> tuple[str, Any]:
    """Parse ``optimizer.lr=1e-3`` into ("optimizer.lr", 0.001); a value that is not valid TOML stays a text.

    Raises:
        GigamorphError: the text has no equals sign or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise GigamorphError(f"{text!r} is not a setting; write KEY=VALUE, as in optimizer.lr=1e-3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return key.strip(), value.strip()


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted key.

    Raises:
        GigamorphError: a part of the key names a value, not a table.
    """
    *tables, last = key.split(".")
    for i, table in enumerate(tables):
        if values.get(table) is None:
            values[table] = {}
        values = values[table]
        if not isinstance(values, dict):
            raise GigamorphError(f"key '{key}': '{'.'.join(tables[: i + 1])}' is a value, not a table")
    values[last] = value


def without_nulls(value: Any, omit: Sequence[str] = ()) -> Any:
    """The value with lists instead of tuples, without keys that are null in YAML or JSON, and those in `omit`."""
    if isinstance(value, dict):
        return {key: without_nulls(own, omit) for key, own in value.items() if own is not None and key not in omit}
    return [without_nulls(own, omit) for own in value] if isinstance(value, list | tuple) else value


def to_plain(config: Any, omit: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration as plain containers, numbers and texts, without the keys in `omit`; inverse of `from_plain`."""
    return without_nulls(asdict(config), omit)


def to_toml(config: Any) -> str:
    """A configuration as TOML for `load_config`; keys without a value are written as comments."""
    return _toml(asdict(config), "").lstrip("\n")


def _toml(values: Mapping[str, Any], name: str, head: str = "[{}]") -> str:
    import tomli_w  # prediction must work without it

    # In TOML, keys after the head of a table belong to that table: tables must come last.
    tables = {key: value for key, value in values.items() if value and (isinstance(value, dict) or _has_tables(value))}
    plain = {key: without_nulls(value) for key, value in values.items() if key not in tables}
    text = f"\n{head.format(name)}\n" if name else ""
    for key, value in plain.items():
        text += f"# {key} =\n" if value is None else tomli_w.dumps({key: value}) if value != {} else f"{key} = {{}}\n"
    for key, value in tables.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            text += _toml(value, path)
        else:
            text += "".join(_toml(own, path, "[[{}]]") for own in value)
    return text


def _has_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(own, dict) for own in value)


def from_plain(values: dict[str, Any], cls: type[T], source: str) -> T:
    """The inverse of `to_plain`; `source` names the values in messages."""
    return _build(cls, values, source, "")


def check_plain(values: Mapping[str, Any], cls: type[T], source: str, prefix: str = "") -> T:
    """Build a class from values of a file, which must have all its keys with the right types, and may have others.

    Args:
        values: of the file, or of one of its tables.
        cls: the class.
        source: the file.
        prefix: of the keys in messages, as in ``table.``.

    Raises:
        DataError: a key is missing, or a value has another type.
    """
    try:
        return _build(cls, _known_keys(without_nulls(values), cls), source, prefix)
    except GigamorphError as error:
        raise DataError(str(error)) from error


def _known_keys(value: Any, wanted: Any) -> Any:
    """The plain containers without the keys that the type does not have."""
    for one in (wanted, *get_args(wanted)):
        if is_dataclass(one) and isinstance(value, dict):
            return {key: _known_keys(own, _types_of(one)[key]) for key, own in value.items() if key in _types_of(one)}
        if is_dataclass(one) and isinstance(value, list):
            return [_known_keys(own, one) for own in value]
    return value


def _build(cls: Any, values: dict[str, Any], source: str, prefix: str) -> Any:
    types = _types_of(cls)
    known = [own.name for own in fields(cls) if own.init]
    for key in values:
        if key not in known:
            meant = "" if prefix else "".join(f" (did you mean {one}?)" for one in nested_keys(cls, key))
            raise GigamorphError(f"{source}: unknown key '{prefix}{key}'{meant}; known keys: {', '.join(known)}")
    for own in fields(cls):
        default = own.default if own.default_factory is MISSING else own.default_factory()
        if values.get(own.name) is None and default is MISSING:
            raise GigamorphError(f"{source}: key '{prefix}{own.name}' is missing; add it")
        # A null of YAML or JSON equals an omitted key of TOML; for a key with a default the null could mean "none".
        if own.name in values and values[own.name] is None and default and not is_dataclass(default):
            raise GigamorphError(f"{source}: key '{prefix}{own.name}' is null; omit it for the default {default}")
    values = {key: value for key, value in values.items() if value is not None}
    made = {key: _value(types[key], value, source, prefix + key) for key, value in values.items()}
    try:
        return cls(**made)
    except GigamorphError as error:
        raise GigamorphError(f"{source}: {error}") from error


def nested_keys(cls: Any, key: str) -> list[str]:
    """Dotted keys with this name in the tables of a configuration."""
    tables = {name: own for name, own in _types_of(cls).items() if is_dataclass(own)}
    return [f"{name}.{key}" for name, own in tables.items() if key in {one.name for one in fields(own)}]


def _value(wanted: Any, value: Any, source: str, key: str) -> Any:
    origin = get_origin(wanted)
    if origin is Literal:
        choices = get_args(wanted)
        if value not in choices or isinstance(value, bool) not in {isinstance(c, bool) for c in choices}:
            raise GigamorphError(f"{source}: key '{key}' is {value!r}; choose from {', '.join(map(str, choices))}")
        return value
    if origin in (Union, UnionType):
        # TOML has no null: None is an omitted key.
        return _any_of([t for t in get_args(wanted) if t is not NoneType], value, source, key)
    if wanted == tuple[str, ...] and isinstance(value, str):  # a single name counts as a list
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
    raise GigamorphError(f"{source}: key '{key}' is {value!r}, not {_format_type(wanted, key)}")


def _any_of(wanted: Sequence[Any], value: Any, source: str, key: str) -> Any:
    for each in wanted if len(wanted) > 1 else ():
        with contextlib.suppress(GigamorphError):
            return _value(each, value, source, key)
    alike = [each for each in wanted if _is_alike(each, value)]  # its error names the wrong key inside
    if not alike and len(wanted) > 1:
        raise GigamorphError(f"{source}: key '{key}' is {value!r}, not {_join_or(map(_format_type, wanted))}")
    return _value((alike or wanted)[-1], value, source, key)


def _join_or(names: Iterable[str]) -> str:
    *others, last = sorted(names, key=lambda name: name.startswith("a list"))
    return f"{', '.join(others)} or {last}"


def _is_alike(wanted: Any, value: Any) -> bool:
    """Whether a value is a list or table and the wanted type is too."""
    origin = get_origin(wanted)
    return (isinstance(value, list) and origin is tuple) or (
        isinstance(value, dict) and (is_dataclass(wanted) or origin is dict)
    )


def _format_type(wanted: Any, key: str = "") -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    if get_origin(wanted) is tuple:
        inner = get_args(wanted)
        if inner[-1] is Ellipsis:
            return f"a list, each of it {_format_type(inner[0])}"
        return f"a list of {len(inner)}: {', '.join(_format_type(t) for t in inner)}"
    if is_dataclass(wanted) and key:
        return f"a table; {key}.{fields(wanted)[0].name} is a key of it"
    return names.get(wanted, "a table")
