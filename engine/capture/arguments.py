"""Classifies the arguments of a call: the image, further maps, tensors without image axes, and Python values.

Bags of images (B, V, C, H, W), such as the views of an exam, and volumes (N, C, D, H, W) are further maps. If there is
no other image, a stand-in without memory provides their size.
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

from ..errors import GigamorphError
from ..images.batches import PixelBatch, as_batch
from ..images.pixels import PixelSource
from ..torch_private import tree_leaves, tree_map
from .dynamo import stand_in
from .refusals import BACKBONE


@dataclass(frozen=True)
class Arguments:
    """The classified arguments of a call.

    Attributes:
        args, kwargs: arguments of the call; stand-ins without memory replace images that are read by region.
        image: the first image; a stand-in (1, 1, H, W) that nothing reads for volumes and if bags of images are larger.
        traced: the argument that represents the image in the call.
        roles: id of a tensor argument -> "image", "map" (its last two axes are the image's) or "vector".
        regions: id of a stand-in -> the image or map that is read by region.
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
        """Classify the arguments of a call.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            device: device of the network.
            dtype: dtype for the pixels of sources.
            batch: the argument that is the image; defaults to the first candidate.

        Raises:
            GigamorphError: the arguments contain no image.
        """
        leaves = tree_leaves((tuple(args), dict(kwargs)))
        first = batch if batch is not None else next((leaf for leaf in leaves if _is_image(leaf)), None)
        bags, of_bag = [leaf for leaf in leaves if is_bag(leaf)], is_bag(batch)
        image = _stand_in(None if of_bag else first, bags) if batch is None or of_bag else None
        swapped: dict[int, Tensor] = {}
        roles, regions, further = dict[int, str](), dict[int, Any](), list[Tensor]()
        if isinstance(first, (PixelSource, PixelBatch)) and len((volumes := as_batch(first)).shape) == 5:
            held = swapped[id(first)] = _without_memory(volumes, device, dtype)
            roles[id(held)], regions[id(held)] = "map", volumes
            further.append(held)
            image = _stand_in(None, [held])
        elif image is None and first is not None:
            image = as_batch(first)
            if not isinstance(first, Tensor) or first.device != device:
                swapped[id(first)] = _without_memory(image, device, dtype)
        elif first is not None and first.device != device:  # pyright: ignore
            swapped[id(first)] = _without_memory(first, device, dtype)
        if image is None:
            raise GigamorphError(
                "the arguments contain no image; pass a float tensor (N, C, H, W), a bag of images (B, V, C, H, W) or "
                f"a pixel source, also in dicts, lists and tuples ({_format_given(leaves)}){_detector_hint(leaves)}"
            )
        size = tuple(image.shape[-2:])
        for leaf in leaves:
            if isinstance(leaf, (PixelSource, PixelBatch)) and leaf is not first:
                raise GigamorphError("only the first image can be a pixel source; pass the other images as tensors")
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
    """Whether the first parameter of a network's forward is annotated as a list or tuple, so not as an image batch."""
    first = next(iter(inspect.signature(network.forward).parameters.values()), None)
    kind = None if first is None else first.annotation
    name = getattr(kind, "__name__", "") if isinstance(kind, type) and not get_args(kind) else str(kind)
    return re.match(r"(typing\.|collections\.abc\.)?(list|tuple|sequence|iterable)\b", name, re.IGNORECASE) is not None


def _detector_hint(leaves: Sequence[Any]) -> str:
    """Advice for a call with a list of images (C, H, W)."""
    images = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3]
    return f"; for a detector that takes lists, {BACKBONE}" if images else ""


def _format_given(leaves: Sequence[Any]) -> str:
    """The types of the arguments, for the message."""
    found = [f"{str(v.dtype)[6:]} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in leaves]
    return f"got: {', '.join(found[:4]) or 'nothing'}{' ...' if len(found) > 4 else ''}"


def is_bag(leaf: Any) -> bool:
    """Whether an argument is bags of images (B, V, C, H, W)."""
    return isinstance(leaf, Tensor) and leaf.dim() == 5 and not leaf.is_complex()


def _stand_in(image: Any, bags: Sequence[Tensor]) -> Tensor | None:
    """A stand-in image of the size of the largest bag of images; None if the image is as large."""
    largest = max(bags, key=_pixels, default=None)
    if largest is None or (image is not None and not isinstance(image, Tensor)):
        return None
    if image is not None and _pixels(image) >= _pixels(largest):
        return None
    if largest.layout != torch.strided:
        raise GigamorphError(f"bags of images must be a dense tensor, not {largest.layout}; pass x.to_dense()")
    kind = largest.dtype if largest.is_floating_point() else torch.get_default_dtype()
    return torch.empty((), dtype=kind, device=largest.device).expand(1, 1, *largest.shape[-2:])


def _pixels(image: Any) -> int:
    return math.prod(image.shape[-2:])


def _is_image(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.dim() == 4 and leaf.is_floating_point()
    return isinstance(leaf, (PixelSource, PixelBatch))
