"""One layer into two: in sequence (TYPE-I, K = K2 * K1) or in parallel (TYPE-II, K = K1 + K2).

Correlation kernels compose by full convolution: K[o, c, u] = sum over m, v of K2[o, m, v] K1[m, c, u - v], of size
k1 + k2 - 1. For a K1 that is given this is linear in K2 and solvable for every K if middle * |k2| >= inputs * |k|
(rank condition of NetMorph, Wei et al. 2016); by symmetry K1 can be solved for if middle * |k1| >= outputs * |k|.
The given factor is random with orthonormal rows, since the error is the condition of that linear system.

Padding belongs to the first layer as a whole: layers that pad for themselves are wrong at the borders. A first layer
of one tap without a bias is the exception, since it leaves zeros zero. The stride belongs to the second layer, unless
that has one tap; the dilation to both.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MorphError
from .activation import PAct, activation, paired
from .deepen import dirac, layer
from .kernel_size import numeric_padding, pad_kernel, set_padding
from .surgery import CONVS, edit, follow, morphed, placed, plain, replace, site, spatial
from .verify import Example, Report

RESIDUAL_LIMIT = 1e-12  # relative, of the factors' product in float64
SMALL, TRIES = 256, 16  # equations; random systems so small may be badly conditioned, larger ones hardly are
METHODS = ("orthogonal", "stable")
BETWEEN = ("pact", "pair")

Size = int | Sequence[int]


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
    sizes = [k if isinstance(k, int) else list(k) for k in kernels]
    step = {"op": "decompose", "path": path, "kernels": sizes, "middle": middle, "method": method}
    step |= {"act": act, "between": between, "seed": seed}
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
    sizes = [k if isinstance(k, int) else list(k) for k in kernels]
    step = {"op": "module", "path": path, "channels": at.channels, "dims": at.dims, "kernels": sizes}
    step |= {"middle": middle, "act": act, "between": between, "seed": seed}
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
    return morphed(model, {"op": "parallel", "path": path, "seed": seed}, example, inplace=inplace)


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


# -- the algebra of kernels --------------------------------------------------------------------------------------


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The kernel (o, c, k1 + k2 - 1) of `second` (o, m, k2) after `first` (m, c, k1); up to three image axes."""
    dims = first.ndim - 2
    if dims == 0:
        return second @ first
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    flipped = second.flip(tuple(range(2, second.ndim)))
    return conv(first.transpose(0, 1), flipped, padding=tuple(k - 1 for k in second.shape[2:])).transpose(0, 1)


def fewest_middle(outputs: int, inputs: int, first: Sequence[int], second: Sequence[int]) -> int:
    """The fewest middle channels with which every kernel of size k1 + k2 - 1 can be decomposed."""
    whole = math.prod(a + b - 1 for a, b in zip(first, second, strict=True))
    return min(-(-inputs * whole // math.prod(second)), -(-outputs * whole // math.prod(first)))


def factorise(kernel: Tensor, first: Sequence[int], second: Sequence[int], middle: int, seed: int) -> list[Tensor]:
    """K1 (middle, c, k1) and K2 (o, middle, k2) in float64 with K2 * K1 = `kernel` (o, c, k1 + k2 - 1).

    One is random with orthonormal rows, the other solved for; the two have norms of the same size.

    Raises:
        MorphError: too few middle channels, or a product that is off by more than 1e-12.
    """
    outputs, inputs = kernel.shape[:2]
    if middle < (least := fewest_middle(outputs, inputs, first, second)):
        raise MorphError(
            f"{middle} middle channels are too few for {inputs} -> {outputs} channels with kernels {tuple(first)} and "
            f"{tuple(second)}; give {least} or more"
        )
    if kernel.is_meta:
        return [kernel.new_empty(middle, inputs, *first), kernel.new_empty(outputs, middle, *second)]
    exact = kernel.double()
    whole = math.prod(kernel.shape[2:])
    forward = middle * math.prod(second) >= inputs * whole
    if not forward:  # the transposed problem: inputs and outputs, first and second change places
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
        raise MorphError(f"the decomposition is off by {off:.1e}; give more than {middle} middle channels")
    ratio = two.norm() / one.norm()
    balance = 2.0 ** round(math.log2(ratio) / 2) if ratio > 0 else 1.0
    return [one * balance, two / balance]


def _orthonormal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random with orthonormal rows of the unfolded matrix, or columns where it has more rows."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    random = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(random).Q
    return (q if rows >= columns else q.T).reshape(shape)


def _solve(one: Tensor, kernel: Tensor, size: Sequence[int]) -> Tensor:
    """The smallest K2 of `size` with K2 * `one` = `kernel`."""
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


def _stable(kernel: Tensor, first: Sequence[int], second: Sequence[int], seed: int) -> list[Tensor]:
    """K1 = [K; K], K2 = [I + D, -D], or K1 = [I + D; -D], K2 = [K, K]: exact in the numbers of the kernel's dtype."""
    outputs, inputs = kernel.shape[:2]
    whole = tuple(kernel.shape[2:])
    after, before = tuple(first) == whole, tuple(second) == whole
    if any(k % 2 == 0 for k in (second if after else first)) or not (after or before):
        raise MorphError(f"the stable form needs {whole} and an odd kernel, not {tuple(first)} and {tuple(second)}")
    after = after and (outputs <= inputs or not before)
    width, size = (outputs, tuple(second)) if after else (inputs, tuple(first))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(width, width, *size, generator=generator, dtype=torch.float64)
    # What D adds and takes away again is rounded: a row of it is as large as a quarter of the identity's.
    noise = (noise / 4 / math.sqrt(width * math.prod(size))).clamp(-0.5, 0.5).to(kernel)
    eye = dirac(noise)
    plus = eye + noise  # 1 + d is rounded; what is subtracted is what it then holds beyond 1, exactly (Sterbenz)
    minus = eye - plus
    if after:
        return [torch.cat([kernel, kernel]), torch.cat([plus, minus], 1)]
    return [torch.cat([plus, minus]), torch.cat([kernel, kernel], 1)]


# -- edits -------------------------------------------------------------------------------------------------------


@edit("decompose")
def _decompose(
    model: nn.Module,
    path: str,
    kernels: list[Any],
    middle: int | None,
    method: str,
    act: str | None,
    between: str,
    seed: int,
) -> list[str]:
    old = plain(model, path, *CONVS, nn.Linear)
    try:
        parts = _factors_of(old, kernels, middle, method, act, between, seed)
    except MorphError as error:
        raise MorphError(f"module '{path}': {error}") from None
    replace(model, path, nn.Sequential(*(placed(part, model, path) for part in parts)))
    return [f"{path}: {tuple(old.weight.shape)} -> {', '.join(_name(part) for part in parts)}"]


@edit("module")
def _insert_module(
    model: nn.Module,
    path: str,
    channels: int,
    dims: int,
    kernels: list[Any],
    middle: int | None,
    act: str,
    between: str,
    seed: int,
) -> list[str]:
    sizes = [spatial(k, dims, "kernel") for k in kernels]
    whole = tuple(a + b - 1 for a, b in zip(*sizes, strict=True))
    if any(k % 2 == 0 for k in whole):
        raise MorphError(f"after module '{path}': kernels {sizes} make {whole}, which has no centre tap")
    half = layer(channels, channels, whole).double()
    with torch.no_grad():
        half.weight.copy_(dirac(half.weight) / 2)
        half.bias.zero_()
    try:
        parts = _factors_of(half, kernels, middle, "orthogonal", act, between, seed)
    except MorphError as error:
        raise MorphError(f"after module '{path}': {error}") from None
    body = nn.Sequential(*parts)
    follow(model, path, placed(Parallel(Scale(0.5), body), model, path))
    return [f"{path}: followed by x / 2 + {', '.join(_name(part) for part in parts)}"]


@edit("parallel")
def _split_parallel(model: nn.Module, path: str, seed: int) -> list[str]:
    old = plain(model, path, *CONVS, nn.Linear)
    other = copy.deepcopy(old)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for here, there in zip(old.parameters(), other.parameters(), strict=True):
            share = (torch.rand(here.shape, generator=generator, dtype=torch.float64) / 2 + 0.5).to(here)
            part = here * share
            low, high = torch.minimum(here / 2, here), torch.maximum(here / 2, here)
            part = torch.minimum(torch.maximum(part, low), high)  # w / 2 <= part <= w, so that w - part is exact
            there.copy_(here - part)
            here.copy_(part)
    replace(model, path, Parallel(old, other))
    return [f"{path}: {_name(old)} -> the sum of two"]


def _factors_of(
    old: Any, kernels: list[Any], middle: int | None, method: str, act: str | None, between: str, seed: int
) -> list[nn.Module]:
    """The layers that take the place of `old`."""
    dims = old.weight.ndim - 2
    first, second = (spatial(k, dims, "kernel") for k in kernels)
    size = tuple(old.weight.shape[2:])
    extra = [a + b - 1 - k for a, b, k in zip(first, second, size, strict=True)]
    if any(e < 0 or e % 2 for e in extra):
        raise MorphError(
            f"kernels {first} and {second} compose to {tuple(e + k for e, k in zip(extra, size, strict=True))}; "
            f"that must be {size} or larger by an even number"
        )
    groups = getattr(old, "groups", 1)
    weight = old.weight.detach()
    pieces = weight.chunk(groups)
    outputs, inputs = pieces[0].shape[:2]
    orthogonal = all(k == 1 for k in first) or all(k == 1 for k in second)  # the inverse is then the transpose
    if method == "stable":
        pairs = [_stable(piece, first, second, seed + i) for i, piece in enumerate(pieces)]
        if middle not in (None, len(pairs[0][0])):
            raise MorphError(f"the stable form has {len(pairs[0][0])} middle channels, not {middle}")
        middle = len(pairs[0][0])
    else:
        if middle is None:
            middle = fewest_middle(outputs, inputs, first, second)
            middle += 0 if orthogonal else -(-middle // 4)
        whole = [pad_kernel(piece, [(e // 2, e // 2) for e in extra]) if dims else piece for piece in pieces]
        pairs = [factorise(piece, first, second, middle, seed + i) for i, piece in enumerate(whole)]
    one, two = [p[0] for p in pairs], [p[1] for p in pairs]
    acts: list[nn.Module] = []
    if act is not None and between == "pair":
        phi, scale = paired(act)
        one = [torch.cat([k, -k]) for k in one]
        two = [torch.cat([k, -k], 1).double() * scale for k in two]
        acts = [phi]
    elif act is not None:
        acts = [PAct(activation(act), middle * groups, dims)]
    layers = [_like(old, torch.cat(k).to(weight), size) for k, size in ((one, first), (two, second))]
    if dims:
        _share_geometry(old, layers, first, second, extra)
    with torch.no_grad():
        if old.bias is not None:
            layers[0].bias.zero_()
            layers[1].bias.copy_(old.bias)
    return [layers[0], *acts, layers[1]]


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
    # One tap reads the same grid as the layer behind it: it then carries the stride, or leaves the padding to it.
    strided = layers[0] if all(k == 1 for k in second) else layers[1]
    padded = layers[1] if all(k == 1 for k in first) and strided is layers[1] else layers[0]
    strided.stride = old.stride
    padded.padding_mode = old.padding_mode
    set_padding(padded, tuple(padded.kernel_size), padding)


def _name(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ""
    return f"{type(layer).__name__}{shape}"
