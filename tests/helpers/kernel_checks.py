"""Checks for kernels: errors against a float64 oracle, guard bands around buffers, both orders of the grid.

The oracle is computed in float64 from the inputs as they were rounded to the kernel's dtype. Two numbers are bounded:

    relative L2   ||y - ref|| / ||ref||
    max / RMS     max |y - ref| / max(rms(ref), |ref|)      one wrong pixel is seen here and not in the first

The bounds are those of one rounding of the result and sums in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
import triton
from interpreter import reversed_grid
from torch import Tensor

from gigamorph.kernels import conv2d_forward, conv2d_wgrad
from gigamorph.kernels import layer_norm as ops
from gigamorph.kernels import pool as ops_pool
from gigamorph.kernels.tuning import Config, flattens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# (relative L2, max / RMS); "tf32" is float32 whose products are rounded to ten bits
BOUNDS = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 1e-5),
    "tf32": (1e-3, 5e-3),
    torch.float16: (4e-4, 2e-3),
    torch.bfloat16: (3e-3, 1.2e-2),
}


def errors(result: Tensor, oracle: Tensor) -> tuple[float, float]:
    result, oracle = result.double(), oracle.double()
    scale = oracle.square().mean().sqrt()
    far = (result - oracle).abs() / oracle.abs().clamp_min(scale.clamp_min(1e-300))
    return ((result - oracle).norm() / oracle.norm().clamp_min(1e-300)).item(), far.max().item()


def assert_close(
    name: str,
    result: Tensor,
    oracle: Tensor,
    *,
    tf32: bool = False,
    stock: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Fail if `result` is farther from the float64 oracle than one rounding explains.

    Args:
        tf32: float32 whose products were rounded to TF32.
        stock: what PyTorch computes in the same dtype; 16-bit results must be within 1.1 times its error.
        dtype: the dtype of the inputs where the result has another (float32 sums of 16-bit products).
    """
    assert result.shape == oracle.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    if not oracle.numel():
        return
    assert torch.isfinite(result).all(), f"{name}: {(~torch.isfinite(result)).sum().item()} values are not finite"
    l2, peak = errors(result, oracle)
    kind = "tf32" if tf32 else dtype or result.dtype
    bound_l2, bound_peak = BOUNDS[kind]
    told = f"{name}: relative L2 {l2:.2e} (bound {bound_l2:.0e}), max/RMS {peak:.2e} (bound {bound_peak:.0e})"
    assert l2 <= bound_l2 and peak <= bound_peak, told
    if stock is not None and result.dtype in (torch.float16, torch.bfloat16):
        own = errors(stock, oracle)[0]
        # Below a few thousand elements the ratio of two rounding errors is a matter of chance.
        slack = 1.1 + 2 / oracle.numel() ** 0.5
        assert l2 <= slack * own, f"{told}; stock's own relative L2 is {own:.2e}"


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def window(pixels: Tensor) -> Tensor:
    """A copy in the middle of a larger channels-last buffer of NaN."""
    n, c, h, w = pixels.shape
    buffer = torch.full((n + 1, c, h + 3, w + 5), float("nan"), dtype=pixels.dtype, device=pixels.device)
    return buffer.contiguous(memory_format=torch.channels_last)[:n, :, 1 : 1 + h, 3 : 3 + w].copy_(pixels)


class Guarded:
    """Tensors inside buffers of NaN: a read outside makes the result NaN, a write outside changes the band."""

    def __init__(self, band: int = 4096):
        self.band = band
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, in the same memory order, with NaN on both sides."""
        order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
        dense = tensor.permute(order)
        buffer = torch.full((dense.numel() + 2 * self.band,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        inner = buffer[self.band : self.band + dense.numel()].view(dense.shape)
        inner.copy_(dense)
        self.buffers.append((buffer, inner))
        return inner.permute([order.index(d) for d in range(tensor.dim())])

    def empty(self, *shape: int, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
        """An output filled with NaN, guarded."""
        tensor = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
        if channels_last and len(shape) == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return self(tensor)

    def check(self) -> None:
        for buffer, inner in self.buffers:
            ends = torch.cat([buffer[: self.band], buffer[self.band + inner.numel() :]])
            assert ends.isnan().all(), f"{(~ends.isnan()).sum().item()} elements around a buffer were written"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty and its kin return NaN, so that what a kernel leaves unwritten is seen."""
    plain = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    with torch.device("cpu"):
        torch.empty(0)  # at the first use of a default device PyTorch lists these functions

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.detach().fill_(float("nan"))
            return tensor

        return call

    for name, function in plain.items():
        setattr(torch, name, wrap(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(torch, name, function)


def assert_order_free(run: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """Fail unless two runs agree bit by bit: in both orders of the grid (interpreter), one after another (GPU)."""
    first = run()
    with contextlib.nullcontext() if DEVICE.type == "cuda" else reversed_grid():
        second = run()
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    for a, b in pairs:
        assert torch.equal(a, b), "the result depends on the order in which programs run"


class WithGradients(torch.autograd.Function):
    """An op and the op of its gradients as one: `WithGradients.apply(op, gradients, *inputs)`.

    Gradients of the op are cast as the engine casts them: sums are in float32, or float64.
    """

    @staticmethod
    def forward(ctx, op, gradients, *inputs):
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)
        return op(*inputs)

    @staticmethod
    def backward(ctx, dy):
        given = ctx.saved_tensors
        found = ctx.gradients(dy, *given)
        return None, None, *(None if t is None else d.to(t.dtype) for t, d in zip(given, found, strict=True))


def layer_norm(x, weight, bias, eps):
    """`layer_norm` with gradients."""
    op = lambda x, w, b: ops.layer_norm(x, w, b, eps)  # noqa: E731
    return WithGradients.apply(op, lambda dy, x, w, b: ops.layer_norm_backward(dy, x, w, eps), x, weight, bias)


def max_pool2d(x, kernel, geometry):
    """`max_pool2d` with gradients."""
    op = lambda x: ops_pool.max_pool2d(x, kernel, geometry)  # noqa: E731
    return WithGradients.apply(op, lambda dy, x: [ops_pool.max_pool2d_backward(dy, x, kernel, geometry)], x)


@contextlib.contextmanager
def forced(config: Config) -> Iterator[None]:
    """Context in which matrix products have this configuration, in another form where descriptors cannot be used."""

    def product(device, dtype, images, lines, run, channels, depth, described, maps=1, taps=1, *rest) -> Config:
        if described:
            return replace(config, rows=min(config.rows, triton.next_power_of_2(lines)))
        return replace(config, form="columns" if flattens(depth, taps) else "pointer", rows=1)

    def sums(device, dtype, run, filters, depth, taps, described, gate_act="none") -> Config:
        return config if described else replace(config, form="pointer")

    with patch.object(conv2d_forward, "matmul_config", product), patch.object(conv2d_wgrad, "wgrad_config", sums):
        yield


def random_map(
    n: int, c: int, h: int, w: int, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """A channels-last map of normal numbers on the test device."""
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype).contiguous(memory_format=torch.channels_last).to(DEVICE)
