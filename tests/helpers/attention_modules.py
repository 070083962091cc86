"""Small modules with attention: in windows that may be shifted, in a grid, over all positions, with pooled keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def partition(x: Tensor, size: int) -> Tensor:
    """(N, H, W, C) -> (N * windows, size * size, C)."""
    n, h, w, c = x.shape
    x = x.view(n, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def merge(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """The way back."""
    x = x.view(-1, h // size, w // size, size, size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


class Windows(nn.Module):
    """Attention in windows (Liu et al., 2021): padded to a multiple, shifted cyclically, what came round masked.

    Args:
        form: how the mask, which has a value for each window of one image, meets the windows of all: "viewed", the
            scores get an axis of images; "added", the mask is repeated for each image; "sdpa", so, and PyTorch's op.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        shift: int = 0,
        heads: int = 2,
        masked: float = -100.0,
        form: str = "viewed",
    ):
        super().__init__()
        self.size, self.shift, self.heads, self.masked, self.form = size, shift, heads, masked, form
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.randn(heads, size * size, size * size))

    def mask(self, h: int, w: int) -> Tensor:
        region = torch.zeros(1, h, w, 1, dtype=self.bias.dtype)
        count = 0
        for rows in (slice(0, -self.size), slice(-self.size, -self.shift), slice(-self.shift, None)):
            for cols in (slice(0, -self.size), slice(-self.size, -self.shift), slice(-self.shift, None)):
                region[:, rows, cols] = count
                count += 1
        region = partition(region, self.size)[..., 0]
        return (region[:, None] != region[:, :, None]).to(region.dtype) * self.masked

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        x = self.norm(x.permute(0, 2, 3, 1))
        n, h, w, c = x.shape
        x = F.pad(x, (0, 0, 0, -w % self.size, 0, -h % self.size))
        _, high, wide, _ = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = partition(x, self.size)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias, mask = self.bias, self.mask(high, wide) if self.shift else None
        if mask is not None and self.form != "viewed":
            bias = bias + mask[None, :, None].expand(n, -1, -1, -1, -1).reshape(-1, 1, *mask.shape[1:])
        if self.form == "sdpa":
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = q @ k.transpose(-2, -1) / c**0.5 + bias
            if mask is not None and self.form == "viewed":
                scores = scores.view(n, len(mask), self.heads, self.size**2, self.size**2) + mask[None, :, None]
                scores = scores.view(-1, self.heads, self.size**2, self.size**2)
            x = scores.softmax(-1) @ v
        x = self.out(x.transpose(1, 2).reshape(len(x), -1, c))
        x = merge(x, self.size, high, wide)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return skip + x[:, :h, :w].permute(0, 3, 1, 2)


class Haloed(nn.Module):
    """Blocks that attend to themselves and a margin around (Vaswani et al., 2021)."""

    def __init__(self, channels: int, block: int = 4, halo: int = 1):
        super().__init__()
        self.block, self.halo = block, halo
        self.q, self.kv = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b, window = self.block, self.block + 2 * self.halo
        q = self.q(x).reshape(n, c, h // b, b, w // b, b).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(n, c, b * b, -1).transpose(1, 3)
        kv = F.pad(self.kv(x), [self.halo] * 4)
        kv = kv.unfold(2, window, b).unfold(3, window, b).reshape(n, 2 * c, q.shape[1], -1).permute(0, 2, 3, 1)
        k, v = kv.split([c, c], -1)
        out = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 3)
        out = out.reshape(n * c, b, b, h // b, w // b).permute(0, 3, 1, 4, 2)
        return out.contiguous().view(n, c, h, w)


class Grid(nn.Module):
    """Pixels at the same place of each cell attend to one another (MaxViT: Tu et al., 2022)."""

    def __init__(self, channels: int, cells: int = 3):
        super().__init__()
        self.cells, self.qkv = cells, nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        g = self.cells
        x = x.permute(0, 2, 3, 1).view(n, g, h // g, g, w // g, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, g * g, c)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.view(n, h // g, w // g, g, g, c).permute(0, 3, 1, 4, 2, 5).reshape(n, h, w, c)
        return x.permute(0, 3, 1, 2)


class Global(nn.Module):
    """Every position attends to all, or to all of a pooled map (`pool`), written in several ways (`form`)."""

    def __init__(self, channels: int, form: str = "sdpa", pool: int = 1, heads: int = 2, bias: int = 0):
        super().__init__()
        self.form, self.heads, self.pool = form, heads, nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.q, self.kv = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 2 * channels, 1)
        self.bias = nn.Parameter(torch.randn(heads, bias, bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        d = c // self.heads
        q = self.q(x).reshape(n, self.heads, d, h * w)
        k, v = self.kv(self.pool(x)).flatten(2).reshape(n, 2, self.heads, d, -1).unbind(1)
        if self.form == "sdpa":
            q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(-2, -1)
        elif self.form == "matmul":
            scores = q.transpose(-2, -1) @ k
            y = v @ (scores if self.bias is None else scores + self.bias).softmax(-1).transpose(-2, -1)
        elif self.form == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q.transpose(1, 2), k).softmax(-1), v.transpose(1, 2)).transpose(1, 2)
        else:
            scores = torch.einsum("bhdi,bhdj->bhij", q, k).softmax(-1)
            y = torch.einsum("bhij,bhdj->bhdi", scores, v)
        return y.reshape(n, c, h, w)


class Parted(nn.Module):
    """All positions attend to all, in an order that puts the pixels of each 2 x 2 far from one another (Hiera)."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(n, h * w, c)
        x = F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        x = x.view(n, 2, 2, h // 2, w // 2, c).permute(0, 5, 3, 1, 4, 2)
        return x.reshape(n, c, h, w)


def relative_logits(q: Tensor, keys: Tensor, repeats: int, order: tuple[int, ...]) -> Tensor:
    """(N, H, W, C), (2K - 1, C) -> (N, H, repeats, W, K) in another order: logits of relative columns."""
    n, h, w, _ = q.shape
    offsets = len(keys)
    size = (offsets + 1) // 2
    x = (q @ keys.transpose(-1, -2)).reshape(-1, w, offsets)
    x = F.pad(F.pad(x, [0, 1]).flatten(1), [0, offsets - w])
    x = x.reshape(-1, w + 1, offsets)[:, :w, size - 1 :]
    return x.reshape(n, h, 1, w, size).expand(-1, -1, repeats, -1, -1).permute(order)


class Relative(nn.Module):
    """Attention over all positions with logits for relative rows and columns (BoTNet: Srinivas et al., 2021)."""

    def __init__(self, channels: int, height: int, width: int, heads: int = 2):
        super().__init__()
        self.heads, self.qkv = heads, nn.Conv2d(channels, 3 * channels, 1)
        self.rows = nn.Parameter(torch.randn(2 * height - 1, channels // heads))
        self.cols = nn.Parameter(torch.randn(2 * width - 1, channels // heads))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        q = q.transpose(1, 2)
        grid = q.reshape(n * self.heads, h, w, -1)
        bias = relative_logits(grid.transpose(1, 2), self.rows, w, (0, 3, 1, 4, 2))
        bias = bias + relative_logits(grid, self.cols, h, (0, 1, 3, 2, 4))
        scores = (q @ k + bias.reshape(n * self.heads, h * w, h * w)).softmax(-1)
        return (v @ scores.transpose(1, 2)).reshape(n, c, h, w)
