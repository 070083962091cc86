"""What a network is called with: the image, further maps, tensors without image axes, and plain Python values.

Bags of images (B, V, C, H, W), as of the views of an exam or the slices of a volume, are further maps, also where there
is no other image: then one without memory stands for their size.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import GigamorphError
from ..images.batches import PixelBatch, as_batch
from ..images.pixels import PixelSource
from .program import Given


class _Value:
    """A Python value among the arguments: the same recording serves equal ones of one type."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Value) or type(self.value) is not type(other.value):
            return False
        plain = isinstance(self.value, (int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
        return self.value == other.value if plain else self.value is other.value

    def __hash__(self) -> int:
        return hash(type(self.value))


@dataclass(frozen=True)
class Arguments:
    """A call taken apart.

    Attributes:
        key: tells calls apart that do different things with their tensors.
        call: the network's call, given the image, the maps and the other tensors: its result, and what is to be written
            back. The Python values are among its arguments, so that a recording knows what it depends on.
        image: the first image; where bags of images are larger, a stand-in (1, 1, H, W) that nothing reads.
        maps: tensors whose last two axes are the image's.
        others: all other tensors.
    """

    key: Any
    call: Callable[..., Any]
    image: Tensor | PixelBatch
    maps: Sequence[Tensor]
    others: Sequence[Tensor]

    @property
    def inputs(self) -> tuple[Given, ...]:
        return tuple(map(Given.of, self.maps))

    @property
    def vectors(self) -> tuple[Given, ...]:
        return tuple(map(Given.of, self.others))

    @classmethod
    def of(cls, network: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Take a call apart.

        Raises:
            GigamorphError: if there is no image among the arguments.
        """
        leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
        first = next((leaf for leaf in leaves if _is_image(leaf)), None)
        image = _stand_in(first, [leaf for leaf in leaves if is_bag(leaf)])
        known: dict[int, tuple[str, int]] = {}  # one tensor may be several arguments
        if image is None and first is not None:
            known[id(first)] = "image", 0
            image = as_batch(first)
        if image is None:
            raise GigamorphError(
                "there is no image among the arguments; give a float tensor (N, C, H, W), a bag of images (B, V, C, H, "
                f"W) or a pixel source, also in dicts, lists and tuples ({_told(leaves)})"
            )
        size = tuple(image.shape[-2:])
        kinds: list[Any] = []
        maps: list[Tensor] = []
        others: list[Tensor] = []
        for leaf in leaves:
            if id(leaf) in known:
                kinds.append(known[id(leaf)])
            elif isinstance(leaf, Tensor):
                is_map = leaf.dim() >= 3 and tuple(leaf.shape[-2:]) == size
                known[id(leaf)] = ("map", len(maps)) if is_map else ("other", len(others))
                kinds.append(known[id(leaf)])
                (maps if is_map else others).append(leaf)
            elif isinstance(leaf, (PixelSource, PixelBatch)):
                raise GigamorphError("one argument can be a pixel source, the first image; give the others as tensors")
            else:
                kinds.append(_Value(leaf))
        values = tuple(kind.value if isinstance(kind, _Value) else None for kind in kinds)
        places = tuple(None if isinstance(kind, _Value) else kind for kind in kinds)
        call = partial(_call, network, structure, values, places, len(maps))
        return cls((str(structure), *kinds), call, image, maps, others)


def _call(
    network: Callable[..., Any], structure: TreeSpec, values: tuple[Any, ...], places: Any, maps: int, *tensors: Tensor
) -> tuple[Any, list[Change]]:
    """The network's call, and what it changes in the dicts and lists that it is given.

    Args:
        values: the Python values among the leaves of its arguments.
        places: says which of the image, the maps and the other tensors takes the place of which.
    """
    first = {"image": 0, "map": 1, "other": 1 + maps}
    leaves = [v if p is None else tensors[first[p[0]] + p[1]] for v, p in zip(values, places, strict=True)]
    args, kwargs = tree_unflatten(leaves, structure)
    before = [(path, box, copy.copy(box)) for path, box in _boxes((args, kwargs), ())]
    result = network(*args, **kwargs)
    return result, [change for path, box, was in before for change in _change(path, box, was)]


# Where in the arguments a dict or list is; the entries that it gets (of a list all), and the keys that go.
Change = tuple[tuple[Any, ...], Any, list[Any]]


def _boxes(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The dicts and lists in a tree of arguments, each with its place."""
    if isinstance(tree, (dict, list)):
        yield path, tree
    if isinstance(tree, (dict, list, tuple)):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _boxes(part, (*path, key))


def _change(path: tuple[Any, ...], box: Any, was: Any) -> Iterator[Change]:
    if isinstance(box, dict):
        new = {key: value for key, value in box.items() if key not in was or was[key] is not value}
        gone = [key for key in was if key not in box]
        if new or gone:
            yield path, new, gone
    elif len(box) != len(was) or any(a is not b for a, b in zip(box, was, strict=True)):
        yield path, list(box), []


def write_back(args: Sequence[Any], kwargs: Mapping[str, Any], changes: Sequence[Change]) -> None:
    """Do to the caller's dicts and lists what a recorded call has done to its own."""
    for path, new, gone in changes:
        box: Any = (args, kwargs)
        for key in path:
            box = box[key]
        if isinstance(box, dict):
            for key in gone:
                del box[key]
            box.update(new)
        else:
            box[:] = new


def takes_a_list(network: Any) -> bool:
    """Whether a network's forward is annotated to take a list or tuple first, which is then no batch of images."""
    first = next(iter(inspect.signature(network.forward).parameters.values()), None)
    kind = None if first is None else first.annotation
    told = getattr(kind, "__name__", "") if isinstance(kind, type) and not get_args(kind) else str(kind)
    return re.match(r"(typing\.|collections\.abc\.)?(list|tuple|sequence|iterable)\b", told, re.IGNORECASE) is not None


def _told(leaves: Sequence[Any]) -> str:
    """What was given instead of an image."""
    told = [f"{str(v.dtype)[6:]} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in leaves]
    return f"given: {', '.join(told[:4]) or 'nothing'}{' ...' if len(told) > 4 else ''}"


def is_bag(leaf: Any) -> bool:
    """Whether something is bags of images (B, V, C, H, W)."""
    return isinstance(leaf, Tensor) and leaf.dim() == 5 and not leaf.is_complex()


def _stand_in(image: Any, bags: Sequence[Tensor]) -> Tensor | None:
    """For the largest bag of images an image of its size, unless there is one that is as large."""
    largest = max(bags, key=_pixels, default=None)
    if largest is None or (image is not None and not isinstance(image, Tensor)):
        return None
    if image is not None and _pixels(image) >= _pixels(largest):
        return None
    if largest.layout != torch.strided:
        raise GigamorphError(f"the bags of images are a tensor of layout {largest.layout}; give x.to_dense()")
    kind = largest.dtype if largest.is_floating_point() else torch.get_default_dtype()
    return torch.empty((), dtype=kind, device=largest.device).expand(1, 1, *largest.shape[-2:])


def _pixels(image: Any) -> int:
    return math.prod(image.shape[-2:])


def _is_image(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.dim() == 4 and leaf.is_floating_point()
    return isinstance(leaf, (PixelSource, PixelBatch))
