"""Sizes that a module keeps as an attribute and gives to functional calls, as in `F.conv2d(..., groups=self.channels)`.

Which attribute it is cannot be told from the number: others may be equal to it. So all that are equal are replaced by
ints that know where they are from, and the program is run again: what then arrives at the call has a name.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Named(int):
    """An int, equal to it in every way, that knows the module and attribute that it is from."""

    source: tuple[str, str]

    def __new__(cls, value: int, source: tuple[str, str]) -> Named:
        made = super().__new__(cls, value)
        made.source = source
        return made


def name_ints(module: nn.Module, path: str, value: int) -> bool:
    """Replace the module's attributes of this value by `Named` ones, inside lists and tuples too; whether any was."""
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
    """Make plain ints of what `name_ints` left."""
    for key, old in list(vars(module).items()):
        if isinstance(old, Named):
            module.__dict__[key] = int(old)
        elif isinstance(old, list | tuple) and len(old) == 1 and isinstance(old[0], Named):
            module.__dict__[key] = _like(old, int(old[0]))


def set_int(module: nn.Module, key: str, value: int) -> None:
    """Set an attribute that `name_ints` would replace."""
    old = vars(module)[key]
    module.__dict__[key] = _like(old, value) if isinstance(old, list | tuple) else value


def get_int(module: nn.Module, key: str) -> int:
    """The value of such an attribute."""
    old = vars(module)[key]
    return old[0] if isinstance(old, list | tuple) else old


HEAD_SIZES = ("num_features", "head_hidden_size")  # what timm's `reset_classifier` builds a new head for


def follow_head(parent: nn.Module, child: nn.Module) -> None:
    """Let a timm network's own record of what its classifier reads follow the classifier's new width."""
    old = _head(parent)
    if old is None:
        return
    path = next((name for name, module in parent.named_modules() if module is old), "")
    before, after = (getattr(m, "in_features", None) for m in (old, child.get_submodule(path)))
    for key in HEAD_SIZES:
        if isinstance(after, int) and vars(child).get(key) == before:
            child.__dict__[key] = after


def head_changes(parent: nn.Module, child: nn.Module) -> list[str]:
    """What of it follows, and what says the parent's widths still, as lines of a report."""
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
