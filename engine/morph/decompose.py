"""One layer into two: in sequence (TYPE-I, K = K2 * K1) or in parallel (TYPE-II, K = K1 + K2).

Padding belongs to the first layer as a whole: layers that pad for themselves are wrong at the borders. A first layer
of one tap without a bias is the exception, since it leaves zeros zero. The stride belongs to the second layer, unless
that has one tap; the dilation to both.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .activation import PAct, activation, paired
from .deepen import dirac, layer
from .example import Example
from .factors import factorise, factorise_stable, fewest_middle
from .kernel_size import numeric_padding, pad_kernel, set_padding
from .report import Report
from .step import EditAt
from .surgery import CONVS, follow, morphed, placed, plain, replace, site, spatial

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
    """Split a convolution or linear layer into two (TYPE-I), exact in eval and train mode, borders included.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        path: the layer; the two are `path.0` and the last of `path`.
        kernels: of the two layers; k1 + k2 - 1 is the old kernel or larger by an even number. Unused by a linear
            layer.
        middle: channels between the two, per group; by default the fewest that the condition allows, and a quarter
            more where the linear system would be badly conditioned.
        method: "orthogonal", or "stable", which needs only twice the channels of the smaller side: one factor holds K
            twice, the other identity + D and -D with D random. Both are dense, without the zeros by which NetMorph
            pads, and "stable" is exact in stored numbers.
        act: an activation between the two.
        between: "pact" puts it there as a PAct, "pair" as phi(x) - phi(-x) on twice the channels.
        seed: of the random factor.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: no plain layer, too few middle channels, sizes that do not fit, or padding="same" that is uneven.
    """
    if method not in METHODS or between not in BETWEEN:
        raise MorphError(f"method {method!r}, between {between!r}: one of {METHODS} and one of {BETWEEN}")
    if act is not None:
        activation(act) if between == "pact" else paired(act)
    step = DecomposeStep(path, _sizes(kernels), middle, method, act, between, seed)
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
    """Put x / 2 + F(x) after a module, F a dense pair of convolutions with an activation that is x / 2 at first.

    This is the residual module of Modularized Morphing (Wei et al. 2017): the identity is split into two halves
    (TYPE-II), and one of them into two convolutions (TYPE-I). Arguments and errors as in `decompose`.
    """
    if between not in BETWEEN:
        raise MorphError(f"between {between!r}: one of {BETWEEN}")
    activation(act) if between == "pact" else paired(act)
    at = site(model, path, example)
    step = ModuleStep(path, at.channels, at.dims, _sizes(kernels), middle, act, between, seed)
    return morphed(model, step, example, inplace=inplace, rounded=True)


def split_parallel(
    model: nn.Module, example: Example, path: str, *, seed: int = 0, inplace: bool = False
) -> tuple[nn.Module, Report]:
    """Split a convolution or linear layer into the sum of two of the same shape (TYPE-II).

    Every weight is split at random so that the two parts add up to it exactly (Sterbenz): exact in eval and train
    mode on the stored numbers. The two are `path.branches.0` and `path.branches.1`, and may be morphed on.

    Raises:
        MorphError: no plain layer.
    """
    return morphed(model, ParallelStep(path, seed), example, inplace=inplace)


class Parallel(nn.Module):
    """The sum of its branches, each on the same input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [branch(x) for branch in self.branches]
        for other in others:
            first = first + other
        return first


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return str(self.factor)


# -- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecomposeStep(EditAt, op="decompose"):
    """See `decompose`."""

    kernels: Sizes
    middle: int | None
    method: str
    act: str | None
    between: str
    seed: int

    def edit(self, model: nn.Module) -> list[str]:
        old = plain(model, self.path, *CONVS, nn.Linear)
        try:
            parts = _Two(self.kernels, self.middle, self.method, self.act, self.between, self.seed).of(old)
        except MorphError as error:
            raise MorphError(f"module '{self.path}': {error}") from None
        replace(model, self.path, nn.Sequential(*(placed(part, model, self.path) for part in parts)))
        return [f"{self.path}: {tuple(old.weight.shape)} -> {', '.join(_name(part) for part in parts)}"]


@dataclass(frozen=True)
class ModuleStep(EditAt, op="module"):
    """See `insert_module`; `dims` counts the image axes, 0 where channels are on the last axis."""

    channels: int
    dims: int
    kernels: Sizes
    middle: int | None
    act: str
    between: str
    seed: int

    def edit(self, model: nn.Module) -> list[str]:
        sizes = [spatial(k, self.dims, "kernel") for k in self.kernels]
        whole = tuple(a + b - 1 for a, b in zip(*sizes, strict=True))
        if any(k % 2 == 0 for k in whole):
            raise MorphError(f"after module '{self.path}': kernels {sizes} make {whole}, which has no centre tap")
        half = layer(self.channels, self.channels, whole).double()
        with torch.no_grad():
            half.weight.copy_(dirac(half.weight) / 2)
            half.bias.zero_()
        try:
            parts = _Two(self.kernels, self.middle, "orthogonal", self.act, self.between, self.seed).of(half)
        except MorphError as error:
            raise MorphError(f"after module '{self.path}': {error}") from None
        body = nn.Sequential(*parts)
        follow(model, self.path, placed(Parallel(Scale(0.5), body), model, self.path))
        return [f"{self.path}: followed by x / 2 + {', '.join(_name(part) for part in parts)}"]


@dataclass(frozen=True)
class ParallelStep(EditAt, op="parallel"):
    """See `split_parallel`."""

    seed: int

    def edit(self, model: nn.Module) -> list[str]:
        old = plain(model, self.path, *CONVS, nn.Linear)
        other = copy.deepcopy(old)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for here, there in zip(old.parameters(), other.parameters(), strict=True):
                share = (torch.rand(here.shape, generator=generator, dtype=torch.float64) / 2 + 0.5).to(here)
                part = here * share
                low, high = torch.minimum(here / 2, here), torch.maximum(here / 2, here)
                part = torch.minimum(torch.maximum(part, low), high)  # w / 2 <= part <= w, so that w - part is exact
                there.copy_(here - part)
                here.copy_(part)
        replace(model, self.path, Parallel(old, other))
        return [f"{self.path}: {_name(old)} -> the sum of two"]


# -- two layers for one ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Two:
    """How one layer becomes two; see `decompose`."""

    kernels: Sizes
    middle: int | None
    method: str
    act: str | None
    between: str
    seed: int

    def of(self, old: Any) -> list[nn.Module]:
        """The layers that take the place of `old`."""
        dims = old.weight.ndim - 2
        first, second = (spatial(k, dims, "kernel") for k in self.kernels)
        size = tuple(old.weight.shape[2:])
        extra = [a + b - 1 - k for a, b, k in zip(first, second, size, strict=True)]
        if any(e < 0 or e % 2 for e in extra):
            raise MorphError(
                f"kernels {first} and {second} compose to {tuple(e + k for e, k in zip(extra, size, strict=True))}; "
                f"that must be {size} or larger by an even number"
            )
        weight = old.weight.detach()
        pieces = list(weight.chunk(getattr(old, "groups", 1)))
        pairs = self._factors(pieces, first, second, extra)
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
        self, pieces: list[Tensor], first: tuple[int, ...], second: tuple[int, ...], extra: list[int]
    ) -> list[list[Tensor]]:
        """The two kernels of each group."""
        if self.method == "stable":
            pairs = [factorise_stable(piece, first, second, self.seed + i) for i, piece in enumerate(pieces)]
            if self.middle not in (None, len(pairs[0][0])):
                raise MorphError(f"the stable form has {len(pairs[0][0])} middle channels, not {self.middle}")
            return pairs
        middle = self.middle
        if middle is None:
            outputs, inputs = pieces[0].shape[:2]
            middle = fewest_middle(outputs, inputs, first, second)
            transposed = all(k == 1 for k in first) or all(k == 1 for k in second)  # the inverse is the transpose
            middle += 0 if transposed else -(-middle // 4)
        whole = [pad_kernel(piece, [(e // 2, e // 2) for e in extra]) if extra else piece for piece in pieces]
        return [factorise(piece, first, second, middle, self.seed + i) for i, piece in enumerate(whole)]


def _sizes(kernels: tuple[Size, Size]) -> Sizes:
    if not isinstance(kernels, Sequence) or len(kernels) != 2:
        raise MorphError(f"kernels {kernels!r}: give two, one for each layer, such as (1, 3)")
    first, second = (tuple(k) if isinstance(k, Sequence) else k for k in kernels)
    return first, second


def _like(old: Any, weight: Tensor, kernel: tuple[int, ...]) -> Any:
    """A layer of the same kind, groups and dilation with this weight; stride 1, no padding."""
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
    """Give the two layers the stride, the padding and the padding mode of the old one."""
    ends = numeric_padding(old)
    if any(p != q for p, q in ends):
        raise MorphError(f"padding='same' pads {ends} unevenly; write the padding as a layer of its own")
    padding = tuple(p + d * e // 2 for (p, _), d, e in zip(ends, old.dilation, extra, strict=True))
    # One tap reads the same grid as the layer after it: it then carries the stride, or leaves the padding to it.
    strided = layers[0] if all(k == 1 for k in second) else layers[1]
    padded = layers[1] if all(k == 1 for k in first) and strided is layers[1] else layers[0]
    strided.stride = old.stride
    padded.padding_mode = old.padding_mode
    set_padding(padded, tuple(padded.kernel_size), padding)


def _name(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ""
    return f"{type(layer).__name__}{shape}"
