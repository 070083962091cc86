"""Checks of every kernel on the hardware, for `gpu.py`: errors against float64, bits of two runs, 4 and 8 warps.

The oracle is the plain-PyTorch reference of each kernel, computed in float64 from the rounded inputs, with the bounds
of the tests (tests/helpers/kernel_checks.py). Outputs are filled with NaN before a kernel writes them, between guard
bands. Inputs are random, with sizes that do not fill tiles evenly.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from kernel_checks import BOUNDS, DEVICE, Guarded, errors, forced, layer_norm, max_pool2d, poisoned, random_map
from kernel_references import (
    conv2d_dgrad_reference,
    conv2d_forward_reference,
    conv2d_wgrad_reference,
    normalize_act_gradients_reference,
    normalize_act_reference,
)

from gigamorph.kernels import batch_norm as bn
from gigamorph.kernels import choice
from gigamorph.kernels.conv2d import conv2d, conv2d_act_grad, conv2d_moments
from gigamorph.kernels.conv2d_dgrad import dgrad
from gigamorph.kernels.conv2d_forward import launch as forward
from gigamorph.kernels.conv2d_wgrad import launch as wgrad
from gigamorph.kernels.layer_norm import layer_norm_reference
from gigamorph.kernels.moments import moments, moments_backward, moments_backward_reference, moments_reference
from gigamorph.kernels.pointwise import act_grad, act_grad_reference
from gigamorph.kernels.pool import max_pool2d_reference
from gigamorph.kernels.stem import stem, stem_gradients
from gigamorph.kernels.stem_reference import Stem, stem_reference
from gigamorph.kernels.tuning import Config
from gigamorph.kernels.windows import ConvGeometry

Check = Callable[[], dict[str, Any]]

# name: filter, stride, dilation, groups, padding
GEOMETRIES = {
    "3x3": (3, 1, 1, 1, (1, 1, 1, 1)),
    "3x3/2": (3, 2, 1, 1, (1, 0, 1, 1)),
    "1x1": (1, 1, 1, 1, (0, 0, 0, 0)),
    "1x1/2": (1, 2, 1, 1, (0, 0, 0, 0)),
    "5x5": (5, 1, 1, 1, (2, 1, 0, 2)),
    "7x7/2": (7, 2, 1, 1, (3, 3, 3, 3)),
    "3x3 dilated": (3, 1, 2, 1, (2, 2, 2, 2)),
    "3x3 grouped": (3, 1, 1, 4, (1, 1, 1, 1)),
    "2x2/2": (2, 2, 1, 1, (0, 0, 0, 0)),
    "7x7/2 of 1": (7, 2, 1, 1, (3, 3, 3, 3)),
    "3x3/2 of 3": (3, 2, 1, 1, (1, 0, 1, 1)),
}
CHANNELS = {"7x7/2 of 1": (1, 64), "3x3/2 of 3": (3, 32)}  # of input and output, if not the default
VARIED = ("3x3", "3x3/2", "1x1")  # checked in every form, tile and number of warps


class Bench:
    """The results of one check."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.row: dict[str, Any] = {"ok": True, "errors": {}, "reproducible": True}

    @property
    def kind(self) -> Any:
        return "tf32" if self.dtype == torch.float32 else self.dtype

    def compare(self, name: str, result: Tensor, oracle: Tensor) -> None:
        """Store relative L2 and max/RMS errors, and whether both are within the bounds."""
        if not bool(torch.isfinite(result).all()):
            self.row["errors"][name], self.row["ok"] = "not finite", False
            return
        found = errors(result, oracle)
        self.row["errors"][name] = found
        self.row["ok"] &= all(e <= bound for e, bound in zip(found, BOUNDS[self.kind], strict=True))

    def twice(self, run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return the first of two runs, which must agree bit by bit."""
        first, second = [t.clone() for t in run()], run()
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
        self.row["reproducible"] &= same
        self.row["ok"] &= same
        return first


def _variants(op: str, dtype: torch.dtype, geometry: str, dry: bool) -> Iterator[tuple[str, Config | None]]:
    """Yield the computed configuration, then forced ones."""
    yield "computed", None
    if geometry not in VARIED or (dry and op != "forward"):
        return
    depth = 64 if dtype.itemsize == 2 else 32
    tiles = [(32, 16, 16)] if dry else [(128, 64, depth), (128, 128, depth)]
    for form, tile, warps in itertools.product(("descriptor", "pointer"), tiles, (4,) if dry else (4, 8)):
        for rows in (1, 8) if form == "descriptor" and op != "wgrad" else (1,):
            parts = 2 if rows > 1 and tile[1] > 64 else 1
            config = Config(form, *tile, num_warps=warps, num_stages=3, rows=rows, parts=parts)
            yield f"{form} {'x'.join(map(str, tile))} w{warps} rows {rows}", config


def conv(op: str, geometry: str, dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    """Check the forward with its whole epilogue, or the data or weight gradient with its prologue."""
    kernel, stride, dilation, groups, pad = GEOMETRIES[geometry]
    h, w = (9, 17) if dry else (61, 267)
    c, k = CHANNELS.get(geometry, (16, 24) if dry else (96, 136))
    bench, g = Bench(dtype), torch.Generator().manual_seed(crc32(f"{op} {geometry}".encode()))
    place = ConvGeometry.of((stride, stride), pad, (dilation, dilation), groups)
    x = random_map(2, c, h, w, dtype, g)
    oh, ow = place.output(x, (kernel, kernel))
    dy = random_map(2, k, oh, ow, dtype, g)
    weight = random_map(k, c // groups, kernel, kernel, dtype, g, (c // groups * kernel**2) ** -0.5)
    residual, gate, mask = (random_map(2, *size, dtype, g) for size in ((k, oh, ow), (k, oh, ow), (c, h, w)))
    addend = random_map(2, c, h, w, dtype, g)
    shift = _vector(g, k)
    for name, config in _variants(op, dtype, geometry, dry):
        guarded = Guarded()
        # The addend covers a part of the map, as at the ends of residual blocks, or all of it.
        at, part = ((1, 0), (slice(1, None), slice(-2))) if name == "computed" else ((0, 0), (slice(None), slice(None)))
        maps = {"gate": gate, "addend": addend[:, :, *part], "mask": mask}
        acts = {"gate_act": "relu", "addend_at": at, "mask_act": "relu"}

        def run(guarded: Guarded = guarded, maps: dict = maps, acts: dict = acts) -> tuple[Tensor, ...]:
            if op == "forward":
                y, z = (guarded.empty(2, k, oh, ow, dtype=dtype) for _ in range(2))
                forward(guarded(x), guarded(weight), y, place, "relu", shift=shift, residual=guarded(residual), z=z)
                return y, z
            if op == "dgrad":
                dx = guarded.empty(2, c, h, w, dtype=dtype)
                rest = {which: guarded(one) for which, one in maps.items()}
                dgrad(guarded(dy), guarded(weight), dx, place, **rest, **acts)
                return (dx,)
            dw = torch.zeros(weight.shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
            dshift = torch.zeros(k, device=DEVICE)
            wgrad(dw, dshift, guarded(x), guarded(dy), guarded(gate), "relu", place)
            return dw, dshift

        with forced(config) if config else contextlib.nullcontext():
            results = bench.twice(run)
        guarded.check()
        x8, weight8, dy8 = (t.double() for t in (x, weight, dy))
        if op == "forward":
            oracle = conv2d_forward_reference(x8, weight8, shift.double(), residual.double(), place, "relu")
        elif op == "dgrad":
            wide_maps = {which: one.double() for which, one in maps.items()}
            oracle = (conv2d_dgrad_reference(dy8, weight8, (h, w), place, **wide_maps, **acts),)
        else:
            oracle = conv2d_wgrad_reference(weight.shape, x8, dy8, gate.double(), "relu", place)
        for number, (result, expected) in enumerate(zip(results, oracle, strict=False)):
            bench.compare(f"{name}, {number}", result, expected)
    return bench.row


def differentiable(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Callable[[torch.Generator], list[Tensor]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Check an op and its gradients, through autograd, against its reference in float64."""
    bench, g = Bench(dtype), torch.Generator().manual_seed(1)
    tensors = inputs(g)
    floating = [t.is_floating_point() for t in tensors]

    def run(function: Callable[..., Tensor], values: list[Tensor], dy: Tensor | None) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(f) for t, f in zip(values, floating, strict=True)]
        with torch.enable_grad():
            y = function(*leaves)
            grad = torch.ones_like(y) if dy is None else dy.to(y.dtype)
            return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad)]

    with choice.override("triton"):
        size = op(*tensors).shape
        dy = random_map(*size, dtype, g) if len(size) == 4 else torch.randn(size, generator=g).to(DEVICE)
        results = bench.twice(lambda: run(op, tensors, dy))
    oracle = run(reference, [t.double() if f else t for t, f in zip(tensors, floating, strict=True)], dy.double())
    for name, result, expected in zip(("y", *map(str, range(len(tensors)))), results, oracle, strict=False):
        bench.compare(name, result, expected)
    return bench.row


def _vector(g: torch.Generator, n: int) -> Tensor:
    return torch.rand(n, generator=g).add(0.5).to(DEVICE)


def _size(dry: bool) -> tuple[int, int, int]:
    """Return channels, rows and columns of the maps in checks other than the dense convolution's."""
    return (16, 9, 17) if dry else (96, 61, 267)


def norm(dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    c, h, w = _size(dry)
    return differentiable(
        lambda x, a, b: layer_norm(x, a, b, 1e-6),
        lambda x, a, b: layer_norm_reference(x, a, b, 1e-6),
        lambda g: [random_map(2, c, h, w, dtype, g), _vector(g, c), _vector(g, c)],
        dtype,
    )


def act_grad_again(dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    """Check dz of a linear layer whose z is computed again."""
    (c, h, w), g = _size(dry), torch.Generator().manual_seed(4)
    x, dy = random_map(2, c, h, w, dtype, g), random_map(2, 2 * c, h, w, dtype, g)
    last = random_map(2 * c, c, 1, 1, dtype, g, c**-0.5), _vector(g, 2 * c)
    bench = Bench(dtype)
    with choice.override("triton"):
        (dz,) = bench.twice(lambda: (conv2d_act_grad(dy, x, *last, "gelu", ConvGeometry()),))
    z = F.conv2d(x.double(), last[0].double(), last[1].double())
    bench.compare("dz", dz, act_grad_reference(dy.double(), z, "gelu"))
    return bench.row


def slopes(act: str, dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    bench, g = Bench(dtype), torch.Generator().manual_seed(5)
    dy, gate = (random_map(2, *_size(dry), dtype, g) for _ in range(2))
    with choice.override("triton"):
        (dz,) = bench.twice(lambda: (act_grad(dy, gate, act),))
    bench.compare("dz", dz, act_grad_reference(dy.double(), gate.double(), act))
    return bench.row


def pool(dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    place = (3, 3), ConvGeometry.of((2, 2), (1, 0, 1, 1))
    return differentiable(
        lambda x: max_pool2d(x, *place),
        lambda x: max_pool2d_reference(x, *place),
        lambda g: [random_map(2, *_size(dry), dtype, g)],
        dtype,
    )


def depthwise(stride: int, act: str, dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    (c, h, w), size = _size(dry), _depthwise_side(dry)
    place = ConvGeometry.of((stride, stride), (size // 2,) * 4, groups=c)
    return differentiable(
        lambda x, k, b: conv2d(x, k, shift=b, stride=stride, padding=size // 2, groups=c, act=act),
        lambda x, k, b: conv2d_forward_reference(x, k, b, None, place, act)[0],
        lambda g: [random_map(2, c, h, w, dtype, g), random_map(c, 1, size, size, dtype, g, 1 / size), _vector(g, c)],
        dtype,
    )


def _depthwise_side(dry: bool) -> int:
    return 3 if dry else 7


def whole_stem(dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    """Check from pixels to the map after the pooling, and the gradients.

    Pixels are multiples of 2^-7 and weights of 2^-8, both below 1, so that their products and sums are exact in TF32
    and bfloat16. Otherwise, of two nearly equal positions, another could be the maximum than in float64, and its
    gradient would go to other pixels, which is not an error of the kernel and not bounded by rounding.
    """
    side, filters = (21, 16) if dry else (157, 64)
    form = ConvGeometry.of((2, 2), (3, 3, 3, 3)), [1, 1, 1, 1], "relu"
    bench, g = Bench(dtype), torch.Generator().manual_seed(1)
    x = (torch.randint(0, 128, (2, 1, side, side + 8), generator=g) / 128).to(dtype).to(DEVICE)
    weight = random_map(filters, 1, 7, 7, dtype, g, 1 / 7).mul(256).round().clamp(-255, 255) / 256
    wide = [t.double().requires_grad_() for t in (weight, _vector(g, filters))]
    y = stem_reference(Stem(x.double(), *wide, *form))
    dy = random_map(*y.shape, dtype, g)
    inputs = x, weight, wide[1].detach().float(), *form

    def run() -> Sequence[Tensor]:
        made, spots = stem(*inputs, True)
        return made, *stem_gradients(dy, spots, *inputs)

    with choice.override("triton"):
        results = bench.twice(run)
    oracle = y.detach(), *torch.autograd.grad(y, wide, dy.double())
    for name, result, expected in zip(("y", "dweight", "dshift"), results, oracle, strict=True):
        bench.compare(name, result, expected)
    return bench.row


@choice.override("triton")
def batch_norm(c: int, dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    """Check moments, normalisation and its gradient; statistics from a convolution, and a norm before one."""
    h, w = (9, 17) if dry else (61, 268)
    bench, g = Bench(dtype), torch.Generator().manual_seed(2)
    x, dy = (random_map(2, c, h, w, dtype, g) for _ in range(2))
    weight, bias = _vector(g, c), _vector(g, c)

    def compare_moments(of: str, results: Sequence[Tensor], written: Tensor) -> None:
        for name, result, expected in zip(("mean", "m2"), results, moments_reference(written.double()), strict=True):
            # Not a rounded map but a float32 sum: its error is relative to the spread of x.
            more = 1.0 if name == "mean" else 0.0
            bench.row["errors"][name + of] = found = errors(result.double() + more, expected + more)
            bench.row["ok"] &= found[1] <= BOUNDS[torch.float32][1]

    mean, m2 = bench.twice(lambda: moments(x))
    compare_moments("", (mean, m2), x)
    rstd = (m2 / (2 * h * w)).add(1e-5).rsqrt()
    shared = (mean, rstd, weight, bias)
    wide = tuple(t.double() for t in shared)
    (y,) = bench.twice(lambda: (bn.normalize_act(x, *shared, None, "relu"),))
    bench.compare("y", y, normalize_act_reference(x.double(), *wide, None, "relu")[0])
    oracle = normalize_act_gradients_reference(dy.double(), x.double(), *wide, y.double(), "relu")
    results = bench.twice(lambda: bn.normalize_act_gradients(dy, x, *shared, y, "relu", True))
    whole = normalize_act_gradients_reference(dy.double(), x.double(), *wide, None, "relu", 1)[0]
    bench.compare(
        "dx", bench.twice(lambda: bn.normalize_act_gradients(dy, x, *shared, None, "relu", False, 1))[0], whole
    )
    for name, result, expected in zip(("dx, constant statistics", "dz"), results, oracle, strict=False):
        bench.compare(name, result, expected)
    (dx,) = bench.twice(lambda: (moments_backward(x, mean, bias, weight, 2 * h * w, dy),))
    given = x, mean, bias, weight
    bench.compare(
        "gradient of moments", dx, moments_backward_reference(*(t.double() for t in given), 2 * h * w, dy.double())
    )
    one = x[:1]
    for size in (1, 3):
        filters = random_map(2 * c, c, size, size, dtype, g, 1 / (size * c**0.5))
        place = ConvGeometry.of(padding=(size // 2,) * 4)
        made = bench.twice(lambda f=filters, p=place: conv2d_moments(one, f, None, p, [0, 0]))
        bench.compare(f"{size}x{size}", made[0], F.conv2d(one.double(), filters.double(), None, 1, size // 2))
        compare_moments(f" of {size}x{size}", [part[0] for part in made[1:]], made[0])
    image, filters = random_map(1, 1, h, w, dtype, g), random_map(64, 1, 7, 7, dtype, g, 1 / 7)
    place = ConvGeometry.of((2, 2), (3, 3, 3, 3))
    made = bench.twice(lambda: conv2d_moments(image, filters, None, place, [0, 0]))
    bench.compare("of one channel", made[0], F.conv2d(image.double(), filters.double(), None, 2, 3))
    compare_moments(" of one channel", [part[0] for part in made[1:]], made[0])
    return bench.row


def _others(dry: bool) -> dict[str, Callable[[torch.dtype, bool], dict[str, Any]]]:
    """Return checks of the ops other than the dense convolution."""
    side = _depthwise_side(dry)
    return {
        "layer_norm": norm,
        "conv2d_act_grad gelu": act_grad_again,
        "act_grad relu": partial(slopes, "relu"),
        "act_grad gelu": partial(slopes, "gelu"),
        "max_pool2d": pool,
        f"depthwise {side}x{side}/1 none": partial(depthwise, 1, "none"),
        f"depthwise {side}x{side}/2 relu": partial(depthwise, 2, "relu"),
        "stem": whole_stem,
        "batch_norm": partial(batch_norm, 16 if dry else 96),
        "batch_norm, pixels folded": partial(batch_norm, 24 if dry else 144),
    }


def checks(dry: bool) -> dict[str, Check]:
    """Return every check by name; each returns {"ok", "errors": {tensor: (relative L2, max/RMS)}, "reproducible"}."""
    found: dict[str, Check] = {}
    dtypes = (torch.bfloat16,) if dry else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for op, geometry in itertools.product(("forward", "dgrad", "wgrad"), GEOMETRIES):
            if dry and geometry not in ("3x3", "1x1/2", "7x7/2 of 1"):
                continue
            if dtype == torch.float16 and geometry not in VARIED:
                continue
            found[f"conv {op} {geometry} {name}"] = partial(conv, op, geometry, dtype, dry)
        for op, check in _others(dry).items():
            found[f"{op} {name}"] = partial(check, dtype, dry)
    return {name: partial(_guarded, check) for name, check in found.items()}


def _guarded(check: Check) -> dict[str, Any]:
    # As in stock convolutions and products; tensors in float64 are not affected.
    torch.backends.cudnn.allow_tf32 = True
    with poisoned():
        return check()
