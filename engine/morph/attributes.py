"""Sizes that a module stores as attributes and passes to functional calls, e.g. `F.conv2d(..., groups=self.channels)`.

The number alone does not identify the attribute, because others may have the same value. So all attributes of that
value are replaced by ints that know their source, and the program runs again: the call then receives a named int.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Named(int):
    """An int that also stores the module and attribute that it came from."""

    source: tuple[str, str]

    def __new__(cls, value: int, source: tuple[str, str]) -> Named:
        made = super().__new__(cls, value)
        made.source = source
        return made


def name_ints(module: nn.Module, path: str, value: int) -> bool:
    """Replace attributes of this value by `Named` ints, also in lists and tuples of one; return whether any exists."""
    found = False
    for key, old in list(vars(module).items()):
        if key == "training":
            continue
        if type(old) is int and old == value:
            new: Any = Named(old, (path, key))
        elif isinstance(old, list | tuple) and [type(v) for v in old] == [int] and old[0] == value:
            new = _like(old, Named(value, (path, key)))
        else:
            continue
        module.__dict__[key] = new
        found = True
    return found


def unname_ints(module: nn.Module) -> None:
    """Replace the `Named` ints of a module by plain ints."""
    for key, old in list(vars(module).items()):
        if isinstance(old, Named):
            module.__dict__[key] = int(old)
        elif isinstance(old, list | tuple) and len(old) == 1 and isinstance(old[0], Named):
            module.__dict__[key] = _like(old, int(old[0]))


def set_int(module: nn.Module, key: str, value: int) -> None:
    """Set an attribute that `name_ints` can replace: an int, or a list or tuple of one."""
    old = vars(module)[key]
    module.__dict__[key] = _like(old, value) if isinstance(old, list | tuple) else value


def get_int(module: nn.Module, key: str) -> int:
    """Return the value of an attribute that `name_ints` can replace."""
    old = vars(module)[key]
    return old[0] if isinstance(old, list | tuple) else old


HEAD_SIZES = ("num_features", "head_hidden_size")  # timm's `reset_classifier` reads them to build a new head


def follow_head(parent: nn.Module, child: nn.Module) -> None:
    """Update the attributes in which a timm network stores its classifier's input width."""
    old = _head(parent)
    if old is None:
        return
    path = next((name for name, module in parent.named_modules() if module is old), "")
    before, after = (getattr(m, "in_features", None) for m in (old, child.get_submodule(path)))
    for key in HEAD_SIZES:
        if isinstance(after, int) and vars(child).get(key) == before:
            child.__dict__[key] = after


def head_changes(parent: nn.Module, child: nn.Module) -> list[str]:
    """Return report lines on the attributes that `follow_head` updates, and on those that still hold the old widths."""
    pairs = [(key, vars(parent).get(key), vars(child).get(key)) for key in HEAD_SIZES]
    lines = [f"attribute {key}: {before} -> {after}" for key, before, after in pairs if before != after]
    if "feature_info" in vars(child):
        lines.append("attribute feature_info still gives the parent's channels")
    return lines


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_classifier", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _like(old: list[int] | tuple[int, ...], value: int) -> Any:
    return [value] if isinstance(old, list) else (value,)
