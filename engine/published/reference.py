"""The proof of an import: logits of a fixed image by ordinary PyTorch, beside those computed tile by tile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..accelerate import accelerate
from ..errors import DataError, GigamorphError
from ..files import write_atomically
from ..models import create_model
from ..models.folder import REFERENCE, Preprocessing, read_description
from ..models.weights import first_line
from ..train.checkpoint import versions

LIMIT32 = 1e-5
"""Largest difference in float32, of the largest logit or 1."""
LIMIT64 = 1e-12
"""The same in float64."""


def fixed_image(preprocessing: Preprocessing, size: tuple[int, int]) -> Tensor:
    """(1, channels, height, width) float32: grey values drawn evenly by a fixed seed, normalised."""
    shape = preprocessing.channels, *size
    grey = np.random.Generator(np.random.PCG64(20260)).random(shape, np.float32)
    mean, std = preprocessing.normalize.per_channel(preprocessing.channels)
    if preprocessing.per_image == "standard":
        mean, std = (float(grey.mean()),) * shape[0], (float(grey.std()),) * shape[0]
    columns = np.array(mean, np.float32)[:, None, None], np.array(std, np.float32)[:, None, None]
    return torch.from_numpy((grey - columns[0]) / columns[1])[None]


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


def compute(network: nn.Module, image: Tensor, name: str) -> Reference:
    """The logits of an image by ordinary PyTorch.

    Raises:
        GigamorphError: the network does not take the image, or gives other than a row of numbers for it.
    """
    double = copy.deepcopy(network).double().eval()
    return Reference(image, ordinary(network.float().eval(), image, name), ordinary(double, image.double(), name))


def forward(network: nn.Module, image: Tensor, name: str) -> Any:
    """One forward of ordinary PyTorch, whatever it gives.

    Raises:
        GigamorphError: the network does not take the image.
    """
    try:
        with torch.no_grad():
            return network(image)
    except GigamorphError:
        raise
    except Exception as error:  # the network's own: whatever it raises is the answer
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


def verified(network: nn.Module, reference: Reference, name: str) -> Mapping[str, object]:
    """By how much the logits by tiles differ from a reference, in float32 and float64; the network stays as it is.

    Raises:
        GigamorphError: by more than `LIMIT32` or `LIMIT64`, in parts of the largest logit, or of 1 where that is less.
    """
    height, width = reference.image.shape[-2:]
    tile = _half(height), _half(width)
    found: dict[str, object] = {"image": list(reference.image.shape), "tile": list(tile)}
    for kind, wanted, limit in (("float32", reference.logits32, LIMIT32), ("float64", reference.logits64, LIMIT64)):
        twin = copy.deepcopy(network).to(wanted.dtype).eval()
        image = reference.image.to(wanted.dtype)
        far = difference(_by_tiles(twin, image, tile), wanted)
        if limit < far <= LIMIT32:  # what rounds to float32 itself is compared without that
            with _casts_to_double():
                exact = ordinary(twin, image, name)
                if not torch.equal(exact, wanted):
                    far = difference(_by_tiles(twin, image, tile), exact)
                    found["casts"] = "to float32 in the network, to float64 in the comparison in float64"
        if not far <= limit:
            again = difference(ordinary(twin, image, name), wanted)
            if not again <= limit:
                raise GigamorphError(
                    f"model {name!r} gives other logits at every call of ordinary PyTorch, by {again:.1e}; switch off "
                    "what is random in it, as a dropout that does not heed eval()"
                )
            raise GigamorphError(
                f"model {name!r}: its logits of a fixed image, computed by tiles, differ by {far:.1e} in {kind} from "
                f"ordinary PyTorch's, more than {limit:.0e}; nothing was written"
            )
        found[f"{kind} difference"] = far
    return found


def open_checked(folder: Path) -> nn.Module:
    """The network of a folder in evaluation mode, once it has given the logits that it had when it was imported.

    Weights are the same by their hash; the code around them may have changed since, one's own or a package's.

    Raises:
        DataError: it gives others.
    """
    network, reference = create_model(str(folder)).eval(), Reference.read(folder)
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
    return network


def _other_versions(then: Mapping[str, str]) -> str:
    now = versions()
    found = [f"{name} {was} then, {now[name]} now" for name, was in then.items() if now.get(name, was) != was]
    return f" ({'; '.join(found)})" if found else ""


def _by_tiles(network: nn.Module, image: Tensor, tile: tuple[int, int]) -> Tensor:
    with torch.no_grad():
        return accelerate(network, tile=tile, fallback="whole")(image)


@contextlib.contextmanager
def _casts_to_double() -> Iterator[None]:
    """A network in float64 that casts to float32 stays in float64."""
    to, plain = torch.Tensor.to, torch.Tensor.float

    def stays(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        return to(tensor, *args, **{k: wide.get(v, v) if k == "dtype" else v for k, v in kwargs.items()})

    torch.Tensor.to, torch.Tensor.float = stays, torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, plain  # type: ignore[method-assign]


def difference(given: Tensor, wanted: Tensor) -> float:
    """The largest difference, in parts of the largest wanted value, or of 1."""
    return float((given - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def _half(side: int) -> int:
    """About half of a side, so that there are several tiles, and a multiple of common strides."""
    return max(32, -(-side // 64) * 32)
