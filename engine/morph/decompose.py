"""Decomposition of one layer into two: in sequence (TYPE-I, K = K2 * K1) or in parallel (TYPE-II, K = K1 + K2).

The first layer takes all of the padding, because separate paddings would be wrong at the borders. If the first layer
has one tap and no bias, it maps zeros to zeros, and the second layer pads. The second layer takes the stride, unless it
has one tap. Both layers take the dilation.

Correlation kernels compose by full convolution: K[o, c, u] = sum over m, v of K2[o, m, v] K1[m, c, u - v], of size
k1 + k2 - 1. With K1 given this is linear in K2 and solvable for every K if middle * |k2| >= inputs * |k| (rank
condition of NetMorph, Wei et al. 2016). By symmetry K1 can be solved for if middle * |k1| >= outputs * |k|. The given
factor is random with orthonormal rows, because the condition number of the linear system determines the error.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MorphError
from .activation import PAct, activation, paired
from .deepen import dirac, layer, layer_name
from .example import Example
from .kernel_size import numeric_padding, pad_kernel, set_padding
from .step import EditAt, Report
from .surgery import CONVS, cast_like, follow, morphed, plain, replace, site, spatial

METHODS = ("orthogonal", "stable")
BETWEEN = ("pact", "pair")

Size = int | Sequence[int]
Sizes = tuple[int | tuple[int, ...], int | tuple[int, ...]]


def decompose(
    model: nn.Module,
    example: Example,
    path: str,
    kernels: tuple[Size, Size] = (1, 3),
    *,
    middle: int | None = None,
    method: str = "orthogonal",
    act: str | None = None,
    between: str = "pact",
    seed: int = 0,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Split a convolution or linear layer into two in sequence (TYPE-I); exact in eval and train mode and at borders.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        path: the layer; the two new layers are `path.0` and the last child of `path`.
        kernels: kernel sizes of the two layers. k1 + k2 - 1 must equal the old kernel or exceed it by an even number.
            A linear layer ignores them.
        middle: channels between the two, per group. The default is the minimum, plus a quarter if the linear system
            would be badly conditioned.
        method: "orthogonal", or "stable", which needs only twice the channels of the smaller side. In "stable" one
            factor holds K twice, the other holds identity + D and -D with D random. Both methods give dense kernels,
            without NetMorph's padding by zeros; "stable" is exact in the stored numbers.
        act: an activation between the two layers.
        between: how to insert `act`: "pact" as a PAct, "pair" as phi(x) - phi(-x) on twice the channels.
        seed: seed of the random factor.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: the module is not a plain layer, `middle` is too small, the sizes do not fit, or padding="same" is
            uneven.
    """
    if method not in METHODS:
        raise MorphError(f"unknown method {method!r}; choose from {METHODS}")
    _check_act(act, between)
    step = DecomposeStep(path, _sizes(kernels), middle, act, between, seed, method)
    scaled = act is not None and between == "pair" and paired(act)[1] != 1
    return morphed(model, step, example, inplace=inplace, rounded=method == "orthogonal" or scaled)


def insert_module(
    model: nn.Module,
    example: Example,
    path: str,
    kernels: tuple[Size, Size] = (1, 1),
    *,
    middle: int | None = None,
    act: str = "ReLU",
    between: str = "pact",
    seed: int = 0,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Insert x / 2 + F(x) after a module; F is a dense pair of convolutions with an activation, and starts as x / 2.

    This is the residual module of Modularized Morphing (Wei et al. 2017). It splits the identity into two halves
    (TYPE-II), and one of them into two convolutions (TYPE-I). Arguments and errors are those of `decompose`.
    """
    _check_act(act, between)
    at = site(model, path, example)
    step = ModuleStep(path, _sizes(kernels), middle, act, between, seed, at.channels, at.dims)
    return morphed(model, step, example, inplace=inplace, rounded=True)


def _check_act(act: str | None, between: str) -> None:
    if between not in BETWEEN:
        raise MorphError(f"unknown between {between!r}; choose from {BETWEEN}")
    if act is not None:
        activation(act) if between == "pact" else paired(act)


def split_parallel(
    model: nn.Module, example: Example, path: str, *, seed: int = 0, inplace: bool = False
) -> tuple[nn.Module, Report]:
    """Split a convolution or linear layer into the sum of two layers of the same shape (TYPE-II).

    Each weight is split at random into two parts that add up to it exactly (Sterbenz), so the morph is exact in eval
    and train mode on the stored numbers. The layers are `path.branches.0` and `path.branches.1`; both can be morphed
    further.

    Raises:
        MorphError: the module is not a plain layer.
    """
    return morphed(model, ParallelStep(path, seed), example, inplace=inplace)


class Parallel(nn.Module):
    """Sum of several branches of the same input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [branch(x) for branch in self.branches]
        for other in others:
            first = first + other
        return first


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return str(self.factor)


# -- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TwoLayers(EditAt):
    """A step that replaces one layer by two; see `decompose`."""

    kernels: Sizes
    middle: int | None
    act: str | None
    between: str
    seed: int

    def layers(self, old: Any, method: str, where: str) -> list[nn.Module]:
        """Build the layers that replace `old`; `where` begins the message of an error."""
        try:
            return self._layers(old, method)
        except MorphError as error:
            raise MorphError(f"{where}: {error}") from None

    def _layers(self, old: Any, method: str) -> list[nn.Module]:
        dims = old.weight.ndim - 2
        first, second = (spatial(k, dims, "kernel") for k in self.kernels)
        size = tuple(old.weight.shape[2:])
        extra = [a + b - 1 - k for a, b, k in zip(first, second, size, strict=True)]
        if any(e < 0 or e % 2 for e in extra):
            raise MorphError(
                f"kernels {first} and {second} compose to {tuple(e + k for e, k in zip(extra, size, strict=True))}; "
                f"the result must be {size} or exceed it by an even number"
            )
        weight = old.weight.detach()
        pieces = list(weight.chunk(getattr(old, "groups", 1)))
        pairs = self._factors(method, pieces, first, second, extra)
        one, two = [p[0] for p in pairs], [p[1] for p in pairs]
        acts: list[nn.Module] = []
        if self.act is not None and self.between == "pair":
            phi, scale = paired(self.act)
            one = [torch.cat([k, -k]) for k in one]
            two = [torch.cat([k, -k], 1).double() * scale for k in two]
            acts = [phi]
        elif self.act is not None:
            acts = [PAct(activation(self.act), sum(len(k) for k in one), dims)]
        layers = [_like(old, torch.cat(k).to(weight).contiguous(), size) for k, size in ((one, first), (two, second))]
        if dims:
            _share_geometry(old, layers, first, second, extra)
        with torch.no_grad():
            if old.bias is not None:
                layers[0].bias.zero_()
                layers[1].bias.copy_(old.bias)
        return [layers[0], *acts, layers[1]]

    def _factors(
        self, method: str, pieces: list[Tensor], first: tuple[int, ...], second: tuple[int, ...], extra: list[int]
    ) -> list[list[Tensor]]:
        """Return the two kernels of each group."""
        if method == "stable":
            pairs = [factorise_stable(piece, first, second, self.seed + i) for i, piece in enumerate(pieces)]
            if self.middle not in (None, len(pairs[0][0])):
                raise MorphError(f"method 'stable' has {len(pairs[0][0])} middle channels, not {self.middle}")
            return pairs
        middle = self.middle
        if middle is None:
            outputs, inputs = pieces[0].shape[:2]
            middle = fewest_middle(outputs, inputs, first, second)
            transposed = all(k == 1 for k in first) or all(k == 1 for k in second)  # then the inverse is the transpose
            middle += 0 if transposed else -(-middle // 4)
        whole = [pad_kernel(piece, [(e // 2, e // 2) for e in extra]) if extra else piece for piece in pieces]
        return [factorise(piece, first, second, middle, self.seed + i) for i, piece in enumerate(whole)]


@dataclass(frozen=True)
class DecomposeStep(_TwoLayers, op="decompose"):
    """Step of `decompose`."""

    method: str

    def edit(self, model: nn.Module) -> list[str]:
        old = plain(model, self.path, *CONVS, nn.Linear)
        parts = self.layers(old, self.method, f"module '{self.path}'")
        replace(model, self.path, nn.Sequential(*(cast_like(part, model, self.path) for part in parts)))
        return [f"{self.path}: {tuple(old.weight.shape)} -> {', '.join(layer_name(part) for part in parts)}"]


@dataclass(frozen=True)
class ModuleStep(_TwoLayers, op="module"):
    """Step of `insert_module`; `dims` is the number of image axes, 0 if the channels are on the last axis."""

    channels: int
    dims: int

    def edit(self, model: nn.Module) -> list[str]:
        sizes = [spatial(k, self.dims, "kernel") for k in self.kernels]
        whole = tuple(a + b - 1 for a, b in zip(*sizes, strict=True))
        if any(k % 2 == 0 for k in whole):
            raise MorphError(f"after module '{self.path}': kernels {sizes} compose to {whole}; k1 + k2 - 1 must be odd")
        half = layer(self.channels, self.channels, whole).double()
        with torch.no_grad():
            half.weight.copy_(dirac(half.weight) / 2)
            half.bias.zero_()
        parts = self.layers(half, "orthogonal", f"after module '{self.path}'")
        follow(model, self.path, cast_like(Parallel(Scale(0.5), nn.Sequential(*parts)), model, self.path))
        return [f"{self.path}: followed by x / 2 + {', '.join(layer_name(part) for part in parts)}"]


@dataclass(frozen=True)
class ParallelStep(EditAt, op="parallel"):
    """Step of `split_parallel`."""

    seed: int

    def edit(self, model: nn.Module) -> list[str]:
        old = plain(model, self.path, *CONVS, nn.Linear)
        other = copy.deepcopy(old)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for w, rest in zip(old.parameters(), other.parameters(), strict=True):
                share = (torch.rand(w.shape, generator=generator, dtype=torch.float64) / 2 + 0.5).to(w)
                part = w * share
                low, high = torch.minimum(w / 2, w), torch.maximum(w / 2, w)
                part = torch.minimum(torch.maximum(part, low), high)  # w / 2 <= part <= w makes w - part exact
                rest.copy_(w - part)
                w.copy_(part)
        replace(model, self.path, Parallel(old, other))
        return [f"{self.path}: {layer_name(old)} -> the sum of two"]


# -- two layers for one ------------------------------------------------------------------------------------------------


def _sizes(kernels: tuple[Size, Size]) -> Sizes:
    if not isinstance(kernels, Sequence) or len(kernels) != 2:
        raise MorphError(f"kernels must be two sizes, one for each layer, e.g. (1, 3), not {kernels!r}")
    first, second = (tuple(k) if isinstance(k, Sequence) else k for k in kernels)
    return first, second


def _like(old: Any, weight: Tensor, kernel: tuple[int, ...]) -> Any:
    """Build a layer of the same class, groups and dilation with this weight, with stride 1 and without padding."""
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new: Any = nn.Linear(weight.shape[1], weight.shape[0], bias)
    else:
        channels = weight.shape[1] * old.groups
        new = type(old)(channels, weight.shape[0], kernel, groups=old.groups, dilation=old.dilation, bias=bias)
    new = new.to(weight)
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    return new


def _share_geometry(
    old: Any, layers: list[Any], first: tuple[int, ...], second: tuple[int, ...], extra: list[int]
) -> None:
    """Set stride, padding and padding mode of the two layers to those of the old layer."""
    ends = numeric_padding(old)
    if any(p != q for p, q in ends):
        raise MorphError(f"padding='same' pads {ends} unevenly; use a separate padding layer")
    padding = tuple(p + d * e // 2 for (p, _), d, e in zip(ends, old.dilation, extra, strict=True))
    # A layer of one tap reads the same grid as the other: the first then takes the stride, or the second the padding.
    strided = layers[0] if all(k == 1 for k in second) else layers[1]
    padded = layers[1] if all(k == 1 for k in first) and strided is layers[1] else layers[0]
    strided.stride = old.stride
    padded.padding_mode = old.padding_mode
    set_padding(padded, tuple(padded.kernel_size), padding)


RESIDUAL_LIMIT = 1e-12  # relative error of the product of the factors in float64
SMALL, TRIES = 256, 16  # random systems of at most SMALL equations may be badly conditioned, larger ones hardly are


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Compose `second` (o, m, k2) with `first` (m, c, k1) to a kernel (o, c, k1 + k2 - 1); up to three image axes."""
    dims = first.ndim - 2
    if dims == 0:
        return second @ first
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    flipped = second.flip(tuple(range(2, second.ndim)))
    return conv(first.transpose(0, 1), flipped, padding=tuple(k - 1 for k in second.shape[2:])).transpose(0, 1)


def fewest_middle(outputs: int, inputs: int, first: Sequence[int], second: Sequence[int]) -> int:
    """Return the minimum number of middle channels with which every kernel of size k1 + k2 - 1 can be decomposed."""
    whole = math.prod(a + b - 1 for a, b in zip(first, second, strict=True))
    return min(-(-inputs * whole // math.prod(second)), -(-outputs * whole // math.prod(first)))


def factorise(kernel: Tensor, first: Sequence[int], second: Sequence[int], middle: int, seed: int) -> list[Tensor]:
    """Return K1 (middle, c, k1) and K2 (o, middle, k2) in float64 with K2 * K1 = `kernel` (o, c, k1 + k2 - 1).

    One factor is random with orthonormal rows, the other is solved for. Both have norms of similar size.

    Raises:
        MorphError: `middle` is too small, or the product is off by more than 1e-12.
    """
    outputs, inputs = kernel.shape[:2]
    if middle < (least := fewest_middle(outputs, inputs, first, second)):
        raise MorphError(
            f"{middle} middle channels are too few for {inputs} -> {outputs} channels with kernels {tuple(first)} and "
            f"{tuple(second)}; use {least} or more"
        )
    if kernel.is_meta:
        return [kernel.new_empty(middle, inputs, *first), kernel.new_empty(outputs, middle, *second)]
    exact = kernel.double()
    whole = math.prod(kernel.shape[2:])
    forward = middle * math.prod(second) >= inputs * whole
    if not forward:  # solve the transposed problem: swap inputs and outputs, first and second
        exact, first, second = exact.transpose(0, 1), second, first
    tries = TRIES if exact.shape[1] * whole <= SMALL else 1
    found = []
    for attempt in range(tries):
        one = _orthonormal((middle, exact.shape[1], *first), seed + 1000 * attempt).to(exact)
        found.append((one, _solve(one, exact, second)))
    one, two = min(found, key=lambda pair: pair[1].norm().item())  # rounding errors grow with that norm
    if not forward:
        one, two, exact = two.transpose(0, 1), one.transpose(0, 1), exact.transpose(0, 1)
    off = (compose(one, two) - exact).norm() / exact.norm() if exact.any() else torch.zeros(())
    if not off <= RESIDUAL_LIMIT:
        raise MorphError(f"the decomposition is off by {off:.1e}; use more than {middle} middle channels")
    ratio = two.norm() / one.norm()
    balance = 2.0 ** round(math.log2(ratio) / 2) if ratio > 0 else 1.0
    return [one * balance, two / balance]


def _orthonormal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a random tensor; its unfolded matrix has orthonormal rows, or columns if it has more rows than columns."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    random = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(random).Q
    return (q if rows >= columns else q.T).reshape(shape)


def _solve(one: Tensor, kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Return the K2 of `size` and of minimum norm with K2 * `one` = `kernel`."""
    middle, inputs = one.shape[:2]
    outputs, taps = kernel.shape[0], one.shape[2:]
    if math.prod(taps) == 1 and middle >= inputs:  # orthonormal columns: the transpose is the inverse
        return torch.einsum("oc...,mc->om...", kernel, one.flatten(1))
    system = one.new_zeros(inputs, *kernel.shape[2:], middle, *size)
    block = one.movedim(0, -1)  # inputs, *taps, middle
    for offset in itertools.product(*map(range, size)):
        where = tuple(slice(v, v + t) for v, t in zip(offset, taps, strict=True))
        system[(slice(None), *where, slice(None), *offset)] = block
    matrix = system.reshape(inputs * math.prod(kernel.shape[2:]), -1).cpu()
    solution = torch.linalg.lstsq(matrix, kernel.flatten(1).T.cpu(), driver="gelsd").solution
    return solution.T.reshape(outputs, middle, *size).to(kernel)


def factorise_stable(kernel: Tensor, first: Sequence[int], second: Sequence[int], seed: int) -> list[Tensor]:
    """Return K1 = [K; K], K2 = [I + D, -D], or K1 = [I + D; -D], K2 = [K, K]; exact in the kernel's dtype."""
    outputs, inputs = kernel.shape[:2]
    whole = tuple(kernel.shape[2:])
    after, before = tuple(first) == whole, tuple(second) == whole
    if any(k % 2 == 0 for k in (second if after else first)) or not (after or before):
        raise MorphError(f"method 'stable' needs {whole} and an odd kernel, not {tuple(first)} and {tuple(second)}")
    after = after and (outputs <= inputs or not before)
    width, size = (outputs, tuple(second)) if after else (inputs, tuple(first))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(width, width, *size, generator=generator, dtype=torch.float64)
    # D is added and subtracted with rounding, so a row of D is only a quarter as large as a row of the identity.
    noise = (noise / 4 / math.sqrt(width * math.prod(size))).clamp(-0.5, 0.5).to(kernel)
    eye = dirac(noise)
    plus = eye + noise  # 1 + d is rounded, but the difference to 1 that is subtracted below is exact (Sterbenz)
    minus = eye - plus
    if after:
        return [torch.cat([kernel, kernel]), torch.cat([plus, minus], 1)]
    return [torch.cat([plus, minus]), torch.cat([kernel, kernel], 1)]
