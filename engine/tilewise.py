"""Any module as an op on tiles of an image: a frozen or trainable encoder, a ViT, a network from timm.

The grid of embeddings is small; what is large is the graph of all tiles. Tiles go through the module in batches, once
without a graph and once more, batch by batch, in the backward: exact gradients in the memory of one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import has_torch_function_unary

from .capture.active import is_recorded
from .errors import GigamorphError
from .images.batches import PixelBatch, as_batch
from .images.pixels import PixelSource
from .lowering.ops.tiles import (
    Background,
    Settings,
    Tiles,
    embed,
    embed_tiles,
    named_state,
    probe,
    refuse_live_statistics,
)


class Tilewise(nn.Module):
    """What `tilewise` returns: image (N, C, H, W) -> embeddings of its tiles (N, D, h, w).

    With h = (H - size) // stride + 1, as of a convolution without padding: what fills no tile at the right and bottom
    is not read. It works by itself, on tensors and on pixel sources (which are read tile by tile), and inside of a
    network that is accelerated.

    Attributes:
        module: what tiles go through; its parameters are those of this module.
        skipped: the embedding of tiles that are skipped, (D,) or (1,); None for zeros.
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
        self._key = _registered(self)
        self.module = module
        self._probed: tuple[Any, tuple[int, torch.dtype]] | None = None
        self.size, self.stride, self.batch_size, self.background = size, stride, batch_size, background
        if isinstance(skipped, nn.Parameter):
            self.skipped = skipped
        else:
            self.register_buffer("skipped", skipped)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._key = _registered(self)  # a copy's own

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}, batch_size={self.batch_size}"

    def forward(
        self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource], mask: Tensor | None = None
    ) -> Tensor:
        """The embedding of every tile.

        Args:
            x: (N, C, H, W), or a pixel source, or a list of those of one size.
            mask: (N, h, w) or (h, w), true (not 0) for tiles that are computed; the others are skipped.

        Raises:
            UnsupportedError: for a module whose output is no function of one tile (live statistics).
            GigamorphError: for an image smaller than a tile, one that the module does not take, or a mask of another
                shape or with NaN.
            ChangedError: in the backward, for an image or module that was changed in place after the forward.
        """
        if is_recorded():
            image: Any = x
            return embedding(image, mask, self.skipped, self._key, *(t for _, t in named_state(self.module)))
        image, tiles = x if isinstance(x, Tensor) else as_batch(x), self._tiles()
        mask = self._checked(tiles, image, mask)
        if isinstance(image, Tensor) and (has_torch_function_unary(image) or is_fake(image)):
            whole = None if mask is None else mask.unsqueeze(1)
            return embed_tiles(image, whole, self.skipped, tiles, *(t for _, t in named_state(self.module)))
        own = next(self.module.parameters(), image if isinstance(image, Tensor) else torch.empty(0))
        dtype = image.dtype if isinstance(image, Tensor) else own.dtype
        result = self._result(tiles, image.shape[1], own.device, dtype)
        convert = lambda t: t.to(own.device, dtype)  # noqa: E731
        return embed(image, mask, self.skipped, tiles, self.module, result, convert)

    def _tiles(self) -> Tiles:
        """As they are now."""
        given = self.module, Settings.of(self.module), self.size, self.stride, self.batch_size, self.background
        return Tiles(*given, again=self._tiles)

    def _checked(self, tiles: Tiles, image: Tensor | PixelBatch, mask: Any) -> Tensor | None:
        """The mask as (N, h, w)."""
        refuse_live_statistics(self.module)
        if len(image.shape) != 4:
            raise GigamorphError(f"tilewise takes images (N, C, H, W), not a tensor of shape {tuple(image.shape)}")
        n, _, height, width = image.shape
        rows, cols = tiles.grid(height, width)
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise GigamorphError(f"the mask is a {type(mask).__name__}; give a tensor, as torch.as_tensor makes it")
        if tuple(mask.shape) not in ((rows, cols), (n, rows, cols)):
            raise GigamorphError(
                f"the mask has shape {tuple(mask.shape)}; tiles of this image are a grid ({n}, {rows}, {cols})"
            )
        return mask.detach().expand(n, rows, cols)

    def _result(self, tiles: Tiles, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """What `probe` finds, looked at once for each state that it may depend on."""
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        modes = tuple(module.training for module in self.module.modules())
        shapes = tuple((tensor.shape, tensor.dtype) for _, tensor in named_state(self.module))
        key = id(self.module), channels, device, dtype, autocast, modes, shapes
        if self._probed is None or self._probed[0] != key:
            self._probed = key, probe(tiles, channels, device, dtype)
        return self._probed[1]


_known: WeakValueDictionary[str, Tilewise] = WeakValueDictionary()
_numbers = itertools.count()


def _registered(module: Tilewise) -> str:
    """A name by which a graph has the module: what Dynamo calls as it is takes tensors and constants."""
    key = f"tilewise {next(_numbers)}"
    _known[key] = module
    return key


@torch.compiler.allow_in_graph
def embedding(x: Tensor, mask: Tensor | None, skipped: Tensor | None, key: str, *state: Tensor) -> Tensor:
    """The embeddings of a module's tiles, for a recording, which has the module as one op."""
    module = _known[key]
    tiles = module._tiles()
    mask = module._checked(tiles, x, mask)
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
    """Any module as an op on the tiles of an image: image (N, C, H, W) -> embeddings (N, D, h, w).

    Exact in both passes, in the memory of one batch of tiles, and trainable end to end with any head: a mean, gated
    attention (multiple-instance learning), a transformer over the grid. Dropout and drop path give both passes the
    same numbers, those that ordinary code over the same batches would draw.

    Args:
        module: tile (n, C, size, size) -> embedding (n, D), each tile by itself. BatchNorm must be in evaluation mode.
        size: of a tile, in pixels: side, or (height, width).
        stride: from one tile to the next; `size` if None, less for tiles that overlap.
        batch_size: tiles that go through the module at once.
        background: what is skipped: a tile no value of which exceeds this number, or a function of tiles (n, C, h, w)
            that returns (n,) truth values. Skipped tiles cost no work.
        skipped: the embedding of skipped tiles, a number or (D,); a parameter learns. Zeros if None.

    Raises:
        GigamorphError: for arguments that are not understood.
    """
    if not isinstance(module, nn.Module):
        raise GigamorphError(f"tilewise takes a module, not {type(module).__name__}")
    sides = _sides("size", size)
    steps = sides if stride is None else _sides("stride", stride)
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise GigamorphError(f"batch_size={batch_size!r}: give the number of tiles at once, at least 1")
    a_number = isinstance(background, (int, float)) and not isinstance(background, bool) and background == background
    if background is not None and not callable(background) and not a_number:
        raise GigamorphError(f"background={background!r}: give a number, or a function of tiles")
    if isinstance(skipped, (int, float)):
        skipped = torch.tensor([float(skipped)])
    if skipped is not None and (not isinstance(skipped, Tensor) or skipped.dim() != 1):
        raise GigamorphError("skipped must be a number or a tensor (D,)")
    return Tilewise(module, sides, steps, int(batch_size), background, skipped)


def _sides(name: str, value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, Integral) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sides) != 2 or any(not isinstance(n, Integral) or isinstance(n, bool) or n < 1 for n in sides):
        raise GigamorphError(f"{name}={value!r}: give a number of pixels, or (height, width)")
    return int(sides[0]), int(sides[1])
