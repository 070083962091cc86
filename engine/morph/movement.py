"""Data movement on labels: the op itself runs on the value numbers and on the atoms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_private import tree_flatten, tree_map
from .labels import Label


@dataclass(frozen=True)
class Movement:
    """One call that moves data; `labels` has the labels of the moved tensors by id; other tensors are indices."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: dict[int, Label]
    in_place: bool

    def run(self, fill: int | None) -> list[Label]:
        """Return the labels of its outputs; `fill` is the vid of the constant that a pad writes."""
        vids = self._on(lambda label: label.vids, fill)
        if any(label.atoms is None for label in self.labels.values()):
            return [Label(v, None) for v in vids]
        return [Label(v, a) for v, a in zip(vids, self._on(lambda label: label.atoms, None), strict=True)]

    def _on(self, part: Callable[[Label], Any], fill: int | None) -> list[Tensor]:
        def swap(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) in self.labels:
                chosen = part(self.labels[id(leaf)])
                return chosen.clone() if self.in_place else chosen
            return leaf

        args, kwargs = tree_map(swap, (self.args, self.kwargs))
        if self.name == "pad":
            return [pad_labels(args, kwargs, fill)]
        try:
            out = self.func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # the op has no kernel for integers
            args, kwargs = tree_map(self._as_doubles, (args, kwargs))
            out = tree_map(lambda t: t.long(), self.func(*args, **kwargs))
        return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]

    def _as_doubles(self, leaf: Any) -> Any:
        index = any(leaf is given for given in tree_flatten((self.args, self.kwargs))[0])
        return leaf.double() if isinstance(leaf, Tensor) and not index else leaf


def pad_value(args: Any, kwargs: Any) -> float:
    """Return the constant that `F.pad` writes."""
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    return 0.0 if value is None else float(value)


def pad_labels(args: Any, kwargs: Any, fill: int | None) -> Tensor:
    """Apply `F.pad` to labels; constant padding gets vid `fill` and the neighbour's atom (0 next to channels)."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    labels, pad, mode = given["input"], list(given["pad"]), given.get("mode", "constant")
    if mode != "constant":
        return F.pad(labels.double(), pad, mode=mode).long()
    if fill is not None:
        return F.pad(labels, pad, value=fill)
    for i in range(len(pad) // 2):
        labels = _pad_atoms(labels, labels.ndim - 1 - i, pad[2 * i], pad[2 * i + 1])
    return labels


def _pad_atoms(atoms: Tensor, axis: int, low: int, high: int) -> Tensor:
    first = atoms.narrow(axis, 0, 1)
    side = first if bool((atoms == first).all()) else torch.zeros_like(first)
    if low < 0 or high < 0:
        atoms = atoms.narrow(axis, max(-low, 0), atoms.shape[axis] - max(-low, 0) - max(-high, 0))
    before, after = (side.repeat_interleave(max(count, 0), axis) for count in (low, high))
    return torch.cat([before, atoms, after], axis)
