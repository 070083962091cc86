"""What a network is called with: the image, further maps, tensors without image axes, and plain Python values.

Bags of images (B, V, C, H, W), as of the views of an exam or the slices of a volume, are further maps, also where there
is no other image: then one without memory stands for their size.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import GigamorphError
from ..images.batches import PixelBatch, as_batch
from ..images.pixels import PixelSource
from .dynamo import stand_in
from .refusals import BACKBONE


@dataclass(frozen=True)
class Arguments:
    """A call taken apart.

    Attributes:
        args, kwargs: of the call, with tensors without memory in the place of what is read by region.
        image: the first image; where bags of images are larger, a stand-in (1, 1, H, W) that nothing reads.
        traced: what the call has in the place of the image.
        roles: by the identity of a tensor of the call "image", "map" (its last two axes are the image's) or "vector".
        regions: by the identity of a tensor of the call, what is read by region in its place.
        further: the maps and other tensors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    image: Tensor | PixelBatch
    traced: Tensor
    roles: dict[int, str]
    regions: dict[int, Any]
    further: list[Tensor]

    @classmethod
    def of(
        cls,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        batch: Tensor | PixelBatch | None = None,
    ) -> Arguments:
        """Take a call apart.

        Args:
            batch: which of the arguments is the image; None takes the first that can be.
            device: of the network.
            dtype: that pixels of sources are converted to.

        Raises:
            GigamorphError: if there is no image among the arguments.
        """
        leaves = tree_leaves((tuple(args), dict(kwargs)))
        first = batch if batch is not None else next((leaf for leaf in leaves if _is_image(leaf)), None)
        image = None if batch is not None else _stand_in(first, [leaf for leaf in leaves if is_bag(leaf)])
        swapped: dict[int, Tensor] = {}
        if image is None and first is not None:
            image = as_batch(first)
            if not isinstance(first, Tensor) or first.device != device:
                swapped[id(first)] = _without_memory(image, device, dtype)
        elif first is not None and first.device != device:  # pyright: ignore
            swapped[id(first)] = _without_memory(first, device, dtype)
        if image is None:
            raise GigamorphError(
                "there is no image among the arguments; give a float tensor (N, C, H, W), a bag of images (B, V, C, H, "
                f"W) or a pixel source, also in dicts, lists and tuples ({_given(leaves)}){_of_detector(leaves)}"
            )
        size, roles, regions, further = tuple(image.shape[-2:]), dict[int, str](), dict[int, Any](), list[Tensor]()
        for leaf in leaves:
            if isinstance(leaf, (PixelSource, PixelBatch)) and leaf is not first:
                raise GigamorphError("one argument can be a pixel source, the first image; give the others as tensors")
            if not isinstance(leaf, Tensor) or (leaf is first and image is first) or id(leaf) in roles:
                continue
            is_map = leaf.dim() >= 3 and tuple(leaf.shape[-2:]) == size
            if is_map and leaf.device != device:
                regions[id(swapped.setdefault(id(leaf), _without_memory(leaf, device, dtype)))] = leaf
            roles[id(swapped.get(id(leaf), leaf))] = "map" if is_map else "vector"
            further.append(leaf)
        traced: Any = swapped.get(id(first), first) if first is not None else image
        if not isinstance(image, Tensor) or image is first:
            roles[id(traced)] = "image"
        if swapped:
            swap = lambda leaf: swapped.get(id(leaf), leaf)  # noqa: E731
            args, kwargs = tuple(tree_map(swap, arg) for arg in args), {k: tree_map(swap, v) for k, v in kwargs.items()}
        return cls(tuple(args), dict(kwargs), image, traced, roles, regions, further)


def _without_memory(image: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    kind = image.dtype if isinstance(image, Tensor) else dtype
    made = stand_in(tuple(image.shape), kind, device)
    return made.requires_grad_(isinstance(image, Tensor) and image.requires_grad)


def takes_a_list(network: Any) -> bool:
    """Whether a network's forward is annotated to take a list or tuple first, which is then no batch of images."""
    first = next(iter(inspect.signature(network.forward).parameters.values()), None)
    kind = None if first is None else first.annotation
    told = getattr(kind, "__name__", "") if isinstance(kind, type) and not get_args(kind) else str(kind)
    return re.match(r"(typing\.|collections\.abc\.)?(list|tuple|sequence|iterable)\b", told, re.IGNORECASE) is not None


def _of_detector(leaves: Sequence[Any]) -> str:
    """What to do where images (C, H, W) are in a list."""
    images = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3]
    return f"; of a detector that takes lists {BACKBONE}" if images else ""


def _given(leaves: Sequence[Any]) -> str:
    """What was given instead of an image."""
    found = [f"{str(v.dtype)[6:]} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in leaves]
    return f"given: {', '.join(found[:4]) or 'nothing'}{' ...' if len(found) > 4 else ''}"


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
