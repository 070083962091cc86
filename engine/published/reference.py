"""The check of an import: logits of a fixed image by ordinary PyTorch, compared with those computed by tiles."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..accelerate import accelerate
from ..errors import GigamorphError
from ..models.folder import Preprocessing
from ..models.reference import LIMIT32, Reference, difference, ordinary

LIMIT64 = 1e-12
"""See `LIMIT32`; in float64."""


def fixed_image(preprocessing: Preprocessing, size: tuple[int, int]) -> Tensor:
    """Return (1, channels, height, width) float32: uniform random grey values with a fixed seed, normalised."""
    shape = preprocessing.channels, *size
    grey = np.random.Generator(np.random.PCG64(20260)).random(shape, np.float32)
    mean, std = preprocessing.normalize.per_channel(preprocessing.channels)
    if preprocessing.per_image == "standard":
        mean, std = (float(grey.mean()),) * shape[0], (float(grey.std()),) * shape[0]
    columns = np.array(mean, np.float32)[:, None, None], np.array(std, np.float32)[:, None, None]
    return torch.from_numpy((grey - columns[0]) / columns[1])[None]


def compute(network: nn.Module, image: Tensor, name: str) -> Reference:
    """Compute the logits of an image in ordinary PyTorch.

    Raises:
        GigamorphError: the network does not accept the image, or does not return a row of numbers.
    """
    double = copy.deepcopy(network).double().eval()
    return Reference(image, ordinary(network.float().eval(), image, name), ordinary(double, image.double(), name))


def verified(network: nn.Module, reference: Reference, name: str) -> Mapping[str, object]:
    """Return the differences of the logits by tiles from a reference, in float32 and float64; the network is unchanged.

    Raises:
        GigamorphError: a difference exceeds `LIMIT32` or `LIMIT64`, relative to the largest logit or 1.
    """
    height, width = reference.image.shape[-2:]
    tile = _tile_side(height), _tile_side(width)
    found: dict[str, object] = {"image": list(reference.image.shape), "tile": list(tile)}
    for kind, wanted, limit in (("float32", reference.logits32, LIMIT32), ("float64", reference.logits64, LIMIT64)):
        twin = copy.deepcopy(network).to(wanted.dtype).eval()
        image = reference.image.to(wanted.dtype)
        far = difference(_by_tiles(twin, image, tile), wanted)
        if limit < far <= LIMIT32:  # a network with casts to float32 is compared without them
            with _casts_to_double():
                exact = ordinary(twin, image, name)
                if not torch.equal(exact, wanted):
                    far = difference(_by_tiles(twin, image, tile), exact)
                    found["casts"] = "to float32 in the network, to float64 in the comparison in float64"
        if not far <= limit:
            again = difference(ordinary(twin, image, name), wanted)
            if not again <= limit:
                raise GigamorphError(
                    f"model {name!r} outputs different logits at every call of ordinary PyTorch, by {again:.1e}; "
                    "disable its random parts, such as a dropout that ignores eval()"
                )
            raise GigamorphError(
                f"model {name!r}: its logits of a fixed image, computed by tiles, differ by {far:.1e} in {kind} from "
                f"ordinary PyTorch's, more than {limit:.0e}; nothing was written"
            )
        found[f"{kind} difference"] = far
    return found


def _by_tiles(network: nn.Module, image: Tensor, tile: tuple[int, int]) -> Tensor:
    with torch.no_grad():
        return accelerate(network, tile=tile, fallback="untiled")(image)


@contextlib.contextmanager
def _casts_to_double() -> Iterator[None]:
    """Replace a network's casts to float32 by casts to float64."""
    to, plain = torch.Tensor.to, torch.Tensor.float

    def to_double(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        return to(tensor, *args, **{k: wide.get(v, v) if k == "dtype" else v for k, v in kwargs.items()})

    torch.Tensor.to, torch.Tensor.float = to_double, torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, plain  # type: ignore[method-assign]


def _tile_side(side: int) -> int:
    """Return about half of a side, so that there are several tiles; a multiple of common strides."""
    return max(32, -(-side // 64) * 32)
