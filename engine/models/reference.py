"""A fixed image and its logits, stored in a network's folder to check that the network is the imported one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from ..files import write_tensors
from ..versions import versions_of_results
from .classifier import format_shape, taking_images
from .folder import REFERENCE, read_description
from .weights import first_line

LIMIT32 = 1e-5
"""Largest allowed difference in float32, relative to the largest logit or 1."""


@dataclass(frozen=True)
class Reference:
    """A fixed image and a network's logits (1, outputs) for it, from ordinary PyTorch in float32 and float64."""

    image: Tensor
    logits32: Tensor
    logits64: Tensor

    def write(self, folder: Path) -> None:
        tensors = {"image": self.image, "logits_float32": self.logits32, "logits_float64": self.logits64}
        write_tensors(folder / REFERENCE, tensors, "reference")

    @classmethod
    def read(cls, folder: Path) -> Reference:
        from safetensors.torch import load_file

        try:
            found = load_file(folder / REFERENCE)
            return cls(found["image"], found["logits_float32"], found["logits_float64"])
        except Exception as error:  # safetensors' own error class, and OSError
            raise DataError(
                f"{folder / REFERENCE}: cannot be read ({first_line(error)}); import the network again"
            ) from error


def forward(network: nn.Module, image: Tensor, name: str) -> Any:
    """Run one forward in ordinary PyTorch, and return whatever it outputs.

    Raises:
        GigamorphError: the network does not accept the image.
    """
    remedy = "; use another --size, --channels or arguments of its constructor"
    with torch.no_grad(), taking_images(network, name, image.shape, remedy):
        return network(image)


def ordinary(network: nn.Module, image: Tensor, name: str) -> Tensor:
    """Run one forward in ordinary PyTorch; the output must be a row of finite numbers, (1, outputs)."""
    found = forward(network, image, name)
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = format_shape(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise GigamorphError(f"model {name!r} outputs {what} for an image, not a tensor (images, outputs)")
    if not bool(found.isfinite().all()):
        size = format_shape(image.shape[1:])
        raise GigamorphError(f"model {name!r} outputs logits that are not finite for a fixed image of {size}")
    return found


def require_stored_logits(network: nn.Module, folder: Path) -> None:
    """Refuse the network of a folder if its logits are not those of its import.

    The hash proves equal weights; the code, the user's or a package's, may have changed since.

    Raises:
        DataError: the logits differ.
    """
    reference = Reference.read(folder)
    with torch.no_grad():
        far = difference(ordinary(network, reference.image, str(folder)), reference.logits32)
        if not far <= LIMIT32:  # another machine may round differently, but only in float32
            exact = ordinary(copy.deepcopy(network).double(), reference.image.double(), str(folder))
            far = difference(exact, reference.logits64)
    if not far <= LIMIT32:
        raise DataError(
            f"{folder}: outputs other logits than at its import (difference {far:.0e}), so the code that builds it has "
            f"changed{_other_versions(read_description(folder).versions)}; import it again"
        )


def _other_versions(then: Mapping[str, str]) -> str:
    now = versions_of_results()
    found = [f"{name} {was} then, {now[name]} now" for name, was in then.items() if now.get(name, was) != was]
    return f" ({'; '.join(found)})" if found else ""


def difference(given: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest wanted value or 1."""
    return float((given - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
