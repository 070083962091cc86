"""The logits of a fixed image that a folder keeps, by which it is seen whether its network is what was imported."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError, from_network
from ..files import write_atomically
from ..versions import versions_of_results
from .folder import REFERENCE, read_description
from .weights import first_line

LIMIT32 = 1e-5
"""Largest difference in float32, of the largest logit or 1."""


@dataclass(frozen=True)
class Reference:
    """A fixed image and a network's logits (1, outputs) of it, by ordinary PyTorch in float32 and float64."""

    image: Tensor
    logits32: Tensor
    logits64: Tensor

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {"image": self.image, "logits_float32": self.logits32, "logits_float64": self.logits64}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(folder / REFERENCE, lambda path: save_file(tensors, path), "reference")

    @classmethod
    def read(cls, folder: Path) -> Reference:
        from safetensors.torch import load_file

        try:
            found = load_file(folder / REFERENCE)
            return cls(found["image"], found["logits_float32"], found["logits_float64"])
        except Exception as error:  # the library's own error class, and those of the system
            raise DataError(
                f"{folder / REFERENCE}: cannot be read ({first_line(error)}); import the network again"
            ) from error


def forward(network: nn.Module, image: Tensor, name: str) -> Any:
    """One forward of ordinary PyTorch, whatever it gives.

    Raises:
        GigamorphError: the network does not take the image.
    """
    try:
        with torch.no_grad():
            return network(image)
    except Exception as error:
        if not from_network(error):
            raise
        size = " x ".join(map(str, image.shape[1:]))
        raise GigamorphError(
            f"model {name!r} cannot take an image of {size} (channels, height, width): {first_line(error)}; give "
            "another --size, --channels or arguments of its constructor"
        ) from error


def ordinary(network: nn.Module, image: Tensor, name: str) -> Tensor:
    """The same of a network that gives a row of numbers: (1, outputs)."""
    found = forward(network, image, name)
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = " x ".join(map(str, found.shape)) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise GigamorphError(f"model {name!r} gives {what} for an image, not a tensor (images, outputs)")
    if not bool(found.isfinite().all()):
        size = " x ".join(map(str, image.shape[1:]))
        raise GigamorphError(f"model {name!r} gives logits that are not finite for a fixed image of {size}")
    return found


def require_stored_logits(network: nn.Module, folder: Path) -> None:
    """Refuse the network of a folder that does not give the logits which it had when it was imported.

    Weights are the same by their hash; the code around them may have changed since, one's own or a package's.

    Raises:
        DataError: it gives others.
    """
    reference = Reference.read(folder)
    with torch.no_grad():
        far = difference(ordinary(network, reference.image, str(folder)), reference.logits32)
        if not far <= LIMIT32:  # another machine may round otherwise, in float32 alone
            exact = ordinary(copy.deepcopy(network).double(), reference.image.double(), str(folder))
            far = difference(exact, reference.logits64)
    if not far <= LIMIT32:
        raise DataError(
            f"{folder}: gives other logits than when it was imported (by {far:.0e}), so the code that "
            f"builds it has changed{_other_versions(read_description(folder).versions)}; import it again"
        )


def _other_versions(then: Mapping[str, str]) -> str:
    now = versions_of_results()
    found = [f"{name} {was} then, {now[name]} now" for name, was in then.items() if now.get(name, was) != was]
    return f" ({'; '.join(found)})" if found else ""


def difference(given: Tensor, wanted: Tensor) -> float:
    """The largest difference, in parts of the largest wanted value, or of 1."""
    return float((given - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
