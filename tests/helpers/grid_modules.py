"""Published blocks that reduce a map to rows, to columns or to a grid, and spread what they make of it again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CoordinateAttention(nn.Module):
    """Rows and columns go through one convolution and a live norm (Hou et al., 2021)."""

    def __init__(self):
        super().__init__()
        self.rows, self.cols = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv, self.norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.for_rows, self.for_cols = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        both = torch.cat([self.rows(x), self.cols(x).permute(0, 1, 3, 2)], 2)
        rows, cols = torch.split(F.hardswish(self.norm(self.conv(both))), [height, width], 2)
        cols = cols.permute(0, 1, 3, 2)
        return x * self.for_cols(cols).sigmoid() * self.for_rows(rows).sigmoid()


def block(before: int, after: int, kernel: int | tuple[int, int] = 1, pad: int | tuple[int, int] = 0) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, kernel, 1, pad, bias=False), nn.BatchNorm2d(after))


class StripPooling(nn.Module):
    """Grids and strips, upsampled, added, and convolved at full size with live norms (SPNet, Hou et al., 2020)."""

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList(map(nn.AdaptiveAvgPool2d, (5, 3, (1, None), (None, 1))))
        self.first, self.second = block(4, 4), block(4, 4)
        kernels = [(3, 1), (3, 1), ((1, 3), (0, 1)), ((3, 1), (1, 0))]
        self.pooled = nn.ModuleList([block(4, 4, *kernel) for kernel in kernels])
        self.beside, self.left, self.right = block(4, 4, 3, 1), block(4, 4, 3, 1), block(4, 4, 3, 1)
        self.last = block(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).relu(), self.second(x).relu()
        parts = [conv(pool(y)) for conv, pool, y in zip(self.pooled, self.pools, (a, a, b, b), strict=True)]
        parts = [F.interpolate(part, x.shape[2:], mode="bilinear", align_corners=True) for part in parts]
        left = self.left(F.relu_(self.beside(a) + parts[0] + parts[1])).relu()
        right = self.right(F.relu_(parts[3] + parts[2])).relu()
        return F.relu_(x + self.last(torch.cat([left, right], 1)))


class Pyramid(nn.Module):
    """PSP's pyramid pooling (Zhao et al., 2017)."""

    def __init__(self, pool: type[nn.Module] = nn.AdaptiveAvgPool2d, **mode):
        super().__init__()
        self.levels = nn.ModuleList([nn.Sequential(pool(n), block(4, 2), nn.ReLU()) for n in (1, 2, 3, 6)])
        self.last, self.mode = nn.Conv2d(12, 4, 1), mode or {"mode": "bilinear", "align_corners": True}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([x, *(F.interpolate(f(x), x.shape[2:], **self.mode) for f in self.levels)], 1))


class Local(nn.Module):
    """Rows and columns as sequences (ELA, Xu and Wan, 2024)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 5, padding=2, groups=4), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        rows = self.norm(self.conv(x.mean(3, keepdim=True).view(n, c, height))).sigmoid().view(n, c, height, 1)
        return x * rows * self.norm(self.conv(x.mean(2))).sigmoid().view(n, c, 1, width)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = block(2, 1, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)], 1)).sigmoid()


class Triplet(nn.Module):
    """The same over channels, rows and columns, by permutation (Misra et al., 2021)."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList([Gate() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        orders = (0, 2, 1, 3), (0, 3, 2, 1), (0, 1, 2, 3)
        return sum(g(x.permute(o).contiguous()).permute(o) for g, o in zip(self.gates, orders, strict=True)) / 3


MODULES = {
    "coordinate attention": CoordinateAttention,
    "strip pooling": StripPooling,
    "pyramid": Pyramid,
    "pyramid of maxima": lambda: Pyramid(nn.AdaptiveMaxPool2d, mode="nearest"),
    "pyramid, corners not aligned": lambda: Pyramid(mode="bilinear"),
    "local attention": Local,
    "triplet attention": Triplet,
}
