"""Factorisation of a kernel into two that compose to it, and the minimum number of channels between them.

Correlation kernels compose by full convolution: K[o, c, u] = sum over m, v of K2[o, m, v] K1[m, c, u - v], of size
k1 + k2 - 1. With K1 given this is linear in K2 and solvable for every K if middle * |k2| >= inputs * |k| (rank
condition of NetMorph, Wei et al. 2016). By symmetry K1 can be solved for if middle * |k1| >= outputs * |k|. The given
factor is random with orthonormal rows, because the condition number of the linear system determines the error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import MorphError
from .deepen import dirac

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
