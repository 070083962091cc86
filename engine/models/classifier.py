"""Checks, before any work, that a network accepts the images and outputs the classes, or a map with a channel for each.

They run on fake tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..capture.program import Program
from ..capture.recording import capture
from ..errors import GigamorphError, from_network
from .weights import first_line


def record(model: nn.Module, name: str, shape: tuple[int, int, int, int], device: torch.device | str) -> Program:
    """Record the forward of a network on float images (N, C, H, W), in the current gradient mode.

    Args:
        name: the network's name in messages.

    Raises:
        GigamorphError: the network itself refuses such an image (size or number of channels); one line.
        UnsupportedError: the forward cannot be recorded.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with taking_images(model, name, shape):
        return capture(model, shape, dtype, device)


@contextlib.contextmanager
def taking_images(model: nn.Module, name: str, shape: tuple[int, ...], remedy: str = "") -> Iterator[None]:
    """Turn an error that a network raises for images (N, C, H, W) into a `GigamorphError` of one line.

    Args:
        remedy: end of the message; by default it depends on the network's first convolution.
    """
    try:
        yield
    except Exception as error:
        if not from_network(error):
            raise
        what, sides = ("a volume", "slices, height, width") if len(shape) == 5 else ("an image", "height, width")
        raise GigamorphError(
            f"model {name!r} cannot take {what} of {format_shape(shape[1:])} (channels, {sides}): "
            f"{first_line(error)}{remedy or _remedy(model, shape)}"
        ) from error


def check_classifier(
    model: nn.Module, name: str, shape: tuple[int, int, int, int], classes: int, device: torch.device | str = "cpu"
) -> None:
    """Refuse a network that does not output a row of `classes` logits for each image.

    Raises:
        GigamorphError: names what it outputs instead; see also `record`.
    """
    given = _single_output(model, name, shape, device, "a classifier must output its logits only (images, classes)")
    if given != (shape[0], classes):
        raise GigamorphError(
            f"model {name!r} outputs {format_shape(given)} for {shape[0]} image and {classes} classes; a classifier "
            f"must output one logit per class, {shape[0]} x {classes}"
        )


def _single_output(
    model: nn.Module, name: str, shape: tuple[int, int, int, int], device: torch.device | str, contract: str
) -> tuple[int, ...]:
    """Return the shape of a network's only output tensor."""
    program = record(model, name, shape, device)
    if not program.single:
        raise GigamorphError(f"model {name!r} outputs several tensors or a container of them; {contract}")
    return tuple(program.values[program.output[0].value].shape)


def format_shape(shape: Iterable[int]) -> str:
    """Format sizes for a message."""
    return " x ".join(map(str, shape)) or "a single number"


def _remedy(model: nn.Module, shape: tuple[int, ...]) -> str:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    if isinstance(first, nn.Conv2d) and len(shape) == 5:
        return "; it is for images: gigamorph morph to-volume makes a network for volumes of it, for --weights"
    if isinstance(first, nn.Conv3d) and len(shape) == 4:
        return "; it is for volumes: write all into the table's column frame"
    if first is None or first.in_channels == shape[1]:
        return (
            "; if it needs a fixed size, gigamorph import --resize HxW makes a folder for predict; training keeps "
            "every pixel (timm's ViTs accept any size with ?dynamic_img_size=true&dynamic_img_pad=true)"
        )
    return f"; its first convolution takes {first.in_channels} channels, use images with as many (--channels)"


_CONTRACT = "a network for masks must output one map with a logit per class and pixel (images, classes, rows, columns)"


def check_segmenter(
    model: nn.Module, name: str, shape: tuple[int, int, int, int], classes: int, device: torch.device | str = "cpu"
) -> None:
    """Refuse a network that does not output a map with `classes` channels.

    Raises:
        GigamorphError: names what it outputs instead; see also `classifier.record`.
    """
    given = _single_output(model, name, shape, device, _CONTRACT)
    if len(given) != 4 or given[:2] != (shape[0], classes) or (given[2:] == (1, 1) and shape[2:] != (1, 1)):
        size = format_shape(given)
        raise GigamorphError(f"model {name!r} outputs {size} for {shape[0]} image and {classes} classes; {_CONTRACT}")
