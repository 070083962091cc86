"""What a network is called with: the image, further maps, tensors without image axes, and plain Python values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import GigamorphError
from ..images.batches import PixelBatch, as_batch
from ..images.pixels import PixelSource
from .program import spec

Given = tuple[tuple[int, ...], torch.dtype, bool | str]


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
        call: the network's call, given the image, the maps and the other tensors.
        image: the first image.
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
        return spec(self.maps)

    @property
    def vectors(self) -> tuple[Given, ...]:
        return spec(self.others)

    @classmethod
    def of(cls, network: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Take a call apart.

        Raises:
            GigamorphError: if there is no image among the arguments.
        """
        leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
        first = next((n for n, leaf in enumerate(leaves) if _is_image(leaf)), None)
        if first is None:
            raise GigamorphError(
                "there is no image among the arguments; give a float tensor (N, C, H, W) or a pixel source"
            )
        image = as_batch(leaves[first])
        size = tuple(image.shape[-2:])
        kinds: list[Any] = []
        maps: list[Tensor] = []
        others: list[Tensor] = []
        for n, leaf in enumerate(leaves):
            if n == first:
                kinds.append("image")
            elif isinstance(leaf, Tensor):
                is_map = leaf.dim() >= 3 and tuple(leaf.shape[-2:]) == size
                kinds.append(("map", len(maps)) if is_map else ("other", len(others)))
                (maps if is_map else others).append(leaf)
            elif isinstance(leaf, (PixelSource, PixelBatch)):
                raise GigamorphError("one argument can be a pixel source, the first image; give the others as tensors")
            else:
                kinds.append(_Value(leaf))
        count = len(maps)

        def call(image: Tensor, *further: Tensor) -> Any:
            def tensor(kind: Any) -> Any:
                if kind == "image":
                    return image
                if isinstance(kind, _Value):
                    return kind.value
                return further[kind[1] + (0 if kind[0] == "map" else count)]

            own, named = tree_unflatten([tensor(kind) for kind in kinds], structure)
            return network(*own, **named)

        return cls((str(structure), *kinds), call, image, maps, others)


def _is_image(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.dim() == 4 and leaf.is_floating_point()
    return isinstance(leaf, (PixelSource, PixelBatch))
