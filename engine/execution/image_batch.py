"""The image batch of a forward: a tensor, or pixels that are read by region, and its dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GigamorphError
from ..images.batches import PixelBatch, StoredBatch
from ..tiling.scan import Pixels


class ImageTensor:
    """A tensor as a pixel source: an image batch, or another map whose image axes are last."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tensor.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.tensor[..., top:bottom, left:right]


@dataclass(frozen=True)
class ImageBatch:
    """An image batch, and the settings of its forward.

    Attributes:
        pixels: (N, C, H, W), read by region.
        image: the batch as a tensor, or None.
        dtype: the dtype to which pixels are converted.
        device: the device of the computation.
        training: whether there will be a backward.
        image_grad: whether the image requires a gradient.
        given: the arguments of the network's call: the image if it is a tensor, and further maps and tensors.
        in_memory: whether the image and all further maps are tensors on the device; others are read by region.
    """

    pixels: Pixels
    image: Tensor | None
    dtype: torch.dtype
    device: torch.device
    training: bool
    image_grad: bool
    given: tuple[Any, ...] = ()
    in_memory: bool = True

    @classmethod
    def of(
        cls, network: nn.Module, x: Tensor | PixelBatch, further: Sequence[Any] = (), in_memory: bool = True
    ) -> ImageBatch:
        """The batch `x` for a network, in the current gradient mode.

        Args:
            network: the network.
            x: (N, C, H, W).
            further: the other arguments of the network's call, which may require gradients.
            in_memory: whether all of these are tensors on the device, apart from `x`.

        Raises:
            GigamorphError: if the tensor is not a batch of images.
        """
        parameter = next(network.parameters(), torch.empty(0))
        if isinstance(x, Tensor):
            if x.dim() != 4 or x.is_complex():
                remedy = "; give one image as x[None]" if x.dim() == 3 else ""
                raise GigamorphError(
                    f"the image batch must be a tensor (N, C, H, W) of real numbers, not {x.dtype} of shape "
                    f"{tuple(x.shape)}{remedy}"
                )
            if x.layout != torch.strided:
                raise GigamorphError(f"the image batch must be a dense tensor, not {x.layout}; pass x.to_dense()")
            pixels, image, dtype = ImageTensor(x), x, x.dtype
        else:
            pixels, image, dtype = x, None, parameter.dtype
        image_grad = torch.is_grad_enabled() and image is not None and image.requires_grad
        wanting = chain(further, network.parameters())
        training = torch.is_grad_enabled() and (image_grad or any(getattr(t, "requires_grad", False) for t in wanting))
        in_memory = in_memory and image is not None and image.device == parameter.device
        return cls(pixels, image, dtype, parameter.device, training, image_grad, (image, *further), in_memory)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape)


def as_uploaded(pixels: Pixels, device: torch.device) -> Pixels:
    """The image batch in the form in which tiles are uploaded: for a GPU, in the files' storage format."""
    stored = StoredBatch.of(pixels) if isinstance(pixels, PixelBatch) and device.type == "cuda" else None
    return stored or pixels
