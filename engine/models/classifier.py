"""Whether a network takes these images and tells these classes apart: asked before any work, on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..capture.program import Program
from ..capture.recording import capture
from ..errors import GigamorphError, from_network


def record(model: nn.Module, name: str, shape: tuple[int, int, int, int], device: torch.device | str) -> Program:
    """The recorded forward of a network on float images (N, C, H, W), in the gradient mode that is on.

    Args:
        name: what messages call the network.

    Raises:
        GigamorphError: in one line, if the network itself refuses such an image (another size or number of channels).
        UnsupportedError: if it cannot be recorded.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with taking_images(model, name, shape):
        return capture(model, shape, dtype, device)


@contextlib.contextmanager
def taking_images(model: nn.Module, name: str, shape: tuple[int, int, int, int]) -> Iterator[None]:
    """What a network raises of images (N, C, H, W) inside becomes a `GigamorphError` of one line."""
    try:
        yield
    except Exception as error:
        if not from_network(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise GigamorphError(
            f"model {name!r} cannot take an image of {_sides(shape[1:])} (channels, height, width): "
            f"{type(error).__name__}: {first}{_remedy(model, shape[1])}"
        ) from error


def check_classifier(
    model: nn.Module, name: str, shape: tuple[int, int, int, int], classes: int, device: torch.device | str = "cpu"
) -> None:
    """Refuse a network that does not give a row of `classes` logits for each image.

    Raises:
        GigamorphError: with what it gives instead; see also `record`.
    """
    program = record(model, name, shape, device)
    if not program.single:
        raise GigamorphError(
            f"model {name!r} gives several tensors or a container of them; a classifier gives its logits alone "
            "(images, classes)"
        )
    given = tuple(program.values[program.output[0].value].shape)
    if given != (shape[0], classes):
        raise GigamorphError(
            f"model {name!r} gives {_sides(given)} for {shape[0]} image and {classes} classes; a classifier gives one "
            f"logit for each class, {shape[0]} x {classes}"
        )


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _remedy(model: nn.Module, channels: int) -> str:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels == channels:
        return (
            "; if that is its size: gigamorph import --resize HxW makes a folder for predict; training keeps every "
            "pixel (timm's ViTs take any size with ?dynamic_img_size=true&dynamic_img_pad=true)"
        )
    return f"; its first convolution takes {first.in_channels} channels, give it images of as many (--channels)"
