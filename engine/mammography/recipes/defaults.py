"""Defaults that only a recipe's TOML file states, with their sources."""

from __future__ import annotations

import tomllib
from typing import TypeVar

from ...config import from_plain
from . import default_text

Part = TypeVar("Part")


def published(name: str, key: str, part: type[Part]) -> tuple[Part, ...]:
    """Return a list of tables of ``configs/NAME.toml``, such as its stages, each as a dataclass."""
    return tuple(from_plain(one, part, f"{name}.toml") for one in tomllib.loads(default_text(name))[key])
