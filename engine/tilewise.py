"""`tilewise`: applies any module to the tiles of an image: a frozen or trainable encoder, a ViT, a timm network.

The autograd graph of all tiles would not fit in memory. Tiles therefore run through the module in batches, once without
a graph and again in the backward, batch by batch. Gradients are exact, in the memory of one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from .capture.recording_state import is_recorded
from .errors import GigamorphError
from .images.batches import PixelBatch, as_batch
from .images.pixels import PixelSource
from .lowering.ops.tiles import (
    Background,
    ModuleSettings,
    Tiles,
    embed,
    embed_tiles,
    named_state,
    probe,
    refuse_live_statistics,
)
from .torch_private import FakeTensor


class Tilewise(nn.Module):
    """Maps an image (N, C, H, W) to the embeddings of its tiles (N, D, h, w); `tilewise` returns it.

    h = (H - size) // stride + 1, as for a convolution without padding: pixels at the right and bottom that fill no tile
    are not read. It works on tensors, on pixel sources (read tile by tile), and inside an accelerated network.

    Attributes:
        module: the module that embeds a tile; its parameters are the parameters of this module.
        skipped: the embedding of skipped tiles, (D,) or (1,); None for zeros.
    """

    def __init__(
        self,
        module: nn.Module,
        size: tuple[int, int],
        stride: tuple[int, int],
        batch_size: int,
        background: Background | None,
        skipped: Tensor | None,
    ):
        super().__init__()
        self._key = _register(self)
        self.module = module
        self._probed: tuple[Any, tuple[int, torch.dtype]] | None = None
        self.size, self.stride, self.batch_size, self.background = size, stride, batch_size, background
        if isinstance(skipped, nn.Parameter):
            self.skipped = skipped
        else:
            self.register_buffer("skipped", skipped)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._key = _register(self)  # a copy needs its own key

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}, batch_size={self.batch_size}"

    def forward(
        self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource], mask: Tensor | None = None
    ) -> Tensor:
        """The embedding of every tile.

        Args:
            x: (N, C, H, W), or a pixel source, or a list of those of one size.
            mask: (N, h, w) or (h, w); tiles are computed where it is true (not 0), and skipped elsewhere.

        Raises:
            UnsupportedError: the module's output depends on more than one tile (statistics in training mode).
            GigamorphError: the image is smaller than a tile or does not fit the module, or the mask has another shape
                or contains NaN.
            ChangedError: in the backward, if the image or the module was changed in place after the forward.
        """
        if is_recorded():
            image: Any = x
            return embedding(image, mask, self.skipped, self._key, *(t for _, t in named_state(self.module)))
        image, tiles = x if isinstance(x, Tensor) else as_batch(x), self._tiles()
        mask = self._check_mask(tiles, image, mask)
        if isinstance(image, Tensor) and (has_torch_function_unary(image) or isinstance(image, FakeTensor)):
            whole = None if mask is None else mask.unsqueeze(1)
            return embed_tiles(image, whole, self.skipped, tiles, *(t for _, t in named_state(self.module)))
        own = next(self.module.parameters(), image if isinstance(image, Tensor) else torch.empty(0))
        dtype = image.dtype if isinstance(image, Tensor) else own.dtype
        result = self._result(tiles, image.shape[1], own.device, dtype)
        convert = lambda t: t.to(own.device, dtype)  # noqa: E731
        return embed(image, mask, self.skipped, tiles, self.module, result, convert)

    def _tiles(self) -> Tiles:
        """The tiles with the module's current settings."""
        given = self.module, ModuleSettings.of(self.module), self.size, self.stride, self.batch_size, self.background
        return Tiles(*given, again=self._tiles)

    def _check_mask(self, tiles: Tiles, image: Tensor | PixelBatch, mask: Any) -> Tensor | None:
        """Check the module, the image and the mask, and return the mask as (N, h, w)."""
        refuse_live_statistics(self.module)
        if len(image.shape) != 4:
            raise GigamorphError(f"tilewise needs an image batch (N, C, H, W), not the shape {tuple(image.shape)}")
        n, _, height, width = image.shape
        rows, cols = tiles.grid(height, width)
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise GigamorphError(f"the mask must be a tensor, not {type(mask).__name__}; convert it by torch.as_tensor")
        if tuple(mask.shape) not in ((rows, cols), (n, rows, cols)):
            raise GigamorphError(
                f"the mask has shape {tuple(mask.shape)}, but the grid of tiles has shape ({n}, {rows}, {cols})"
            )
        return mask.detach().expand(n, rows, cols)

    def _result(self, tiles: Tiles, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """The result of `probe`, cached for each state that it may depend on."""
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        modes = tuple(module.training for module in self.module.modules())
        shapes = tuple((tensor.shape, tensor.dtype) for _, tensor in named_state(self.module))
        key = id(self.module), channels, device, dtype, autocast, modes, shapes
        if self._probed is None or self._probed[0] != key:
            self._probed = key, probe(tiles, channels, device, dtype)
        return self._probed[1]


_known: WeakValueDictionary[str, Tilewise] = WeakValueDictionary()
_numbers = itertools.count()


def _register(module: Tilewise) -> str:
    """A key that refers to the module in a graph: functions allowed in a graph take only tensors and constants."""
    key = f"tilewise {next(_numbers)}"
    _known[key] = module
    return key


@torch.compiler.allow_in_graph
def embedding(x: Tensor, mask: Tensor | None, skipped: Tensor | None, key: str, *state: Tensor) -> Tensor:
    """The embeddings of a module's tiles (N, D, h, w), as one op of a recording."""
    module = _known[key]
    tiles = module._tiles()
    mask = module._check_mask(tiles, x, mask)
    return embed_tiles(x, None if mask is None else mask.unsqueeze(1), skipped, tiles, *state)


def tilewise(
    module: nn.Module,
    size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    *,
    batch_size: int = 16,
    background: Background | None = None,
    skipped: Tensor | float | None = None,
) -> Tilewise:
    """Apply any module to the tiles of an image: image (N, C, H, W) -> embeddings (N, D, h, w).

    Both passes are exact and need the memory of one batch of tiles. The result is trainable end to end with any head: a
    mean, gated attention (multiple-instance learning), a transformer over the grid. Dropout and drop path draw the same
    numbers in both passes, as in ordinary code over the same batches.

    Args:
        module: maps tiles (n, C, size, size) to embeddings (n, D), each independent of the other tiles. BatchNorm must
            be in evaluation mode.
        size: side, or (height, width), of a tile in pixels.
        stride: distance of neighbouring tiles in pixels; defaults to `size`. Tiles overlap if it is smaller.
        batch_size: number of tiles in one call of the module.
        background: skip a tile if none of its values exceeds this number, or if this function of tiles (n, C, h, w)
            returns true for it, as (n,) booleans. Skipped tiles are not computed.
        skipped: the embedding of skipped tiles, a number or (D,); a parameter is trained. Zeros if None.

    Raises:
        GigamorphError: for invalid arguments.
    """
    if not isinstance(module, nn.Module):
        raise GigamorphError(f"tilewise needs a torch.nn.Module, not {type(module).__name__}")
    sides = _sides("size", size)
    steps = sides if stride is None else _sides("stride", stride)
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise GigamorphError(f"batch_size must be a positive whole number of tiles, not {batch_size!r}")
    is_number = isinstance(background, (int, float)) and not isinstance(background, bool) and background == background
    if background is not None and not callable(background) and not is_number:
        raise GigamorphError(f"background must be a number or a function of tiles, not {background!r}")
    if isinstance(skipped, (int, float)):
        skipped = torch.tensor([float(skipped)])
    if skipped is not None and (not isinstance(skipped, Tensor) or skipped.dim() != 1):
        raise GigamorphError("skipped must be a number or a tensor (D,)")
    return Tilewise(module, sides, steps, int(batch_size), background, skipped)


def _sides(name: str, value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, Integral) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sides) != 2 or any(not isinstance(n, Integral) or isinstance(n, bool) or n < 1 for n in sides):
        raise GigamorphError(f"{name} must be a positive number of pixels, or (height, width), not {value!r}")
    return int(sides[0]), int(sides[1])
