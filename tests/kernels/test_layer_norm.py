"""LayerNorm over channels against the float64 oracle: values, gradients, windows, guard bands, order of programs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, doubled, random_map, window
from kernel_checks import layer_norm as with_gradients
from torch import Tensor

from gigamorph.kernels import choice, stream
from gigamorph.kernels.layer_norm import (
    launch_backward,
    launch_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_reference,
)
from gigamorph.kernels.tiles import MOST_NORM_CHANNELS, StreamConfig, stream_config

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def vector(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return (torch.randn(n, generator=generator, dtype=torch.float64) * 0.5 + 1).to(dtype).to(DEVICE)


def gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and, where they exist, dweight and dbias of the reference in the inputs' dtype."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    given = iter(leaves)
    y = layer_norm_reference(*(None if t is None else next(given) for t in (x, weight, bias)), EPS)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.fixture(params=["computed", "small tiles"])
def tiles(request, monkeypatch):
    """The configuration of the interpreter, and one with several programs of several tiles."""
    if request.param == "small tiles":

        def small(pixels, channels, most):
            return StreamConfig(4, stream_config(pixels, channels, most).block_c, 3, 4)

        monkeypatch.setattr(stream, "stream_config", small)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (1, 96, 9, 3), (3, 1, 4, 5), (1, 130, 1, 11)], ids=str)
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_values_and_gradients(dtype, shape, affine, tiles):
    generator = torch.Generator().manual_seed(1)
    channels = shape[1]
    x = random_map(*shape, dtype, generator, 2.0) + 1
    dy = random_map(*shape, dtype, generator)
    weight = vector(channels, dtype, generator) if affine != "none" else None
    bias = vector(channels, dtype, generator) if affine == "both" else None
    oracle_y, oracle_dx, *oracle_sums = gradients(*doubled(x, weight, bias, dy))
    stock_y, stock_dx, *_ = gradients(x, weight, bias, dy)

    guarded = Guarded()
    y, dx = guarded.empty(*shape, dtype=dtype), guarded.empty(*shape, dtype=dtype)
    x, dy, weight, bias = (None if t is None else guarded(t) for t in (x, dy, weight, bias))
    launch_forward(x, weight, bias, EPS, y)
    sums = launch_backward(dy, x, weight, EPS, dx)
    guarded.check()
    if channels > 1:  # of one channel only the bias is left
        assert_close("y", y, oracle_y, stock=stock_y)
        assert_close("dx", dx, oracle_dx, stock=stock_dx)
        for name, sum_, oracle in zip(("dweight", "dbias"), sums, oracle_sums, strict=False):
            assert_close(name, sum_, oracle)
    else:
        assert torch.equal(y.double(), oracle_y) and not dx.any() and not sums[0].any()


@pytest.mark.parametrize("channels", [2048, 2500])
def test_many_channels(channels):
    generator = torch.Generator().manual_seed(2)
    x, dy = (random_map(1, channels, 3, 3, torch.float32, generator) for _ in range(2))
    weight, bias = vector(channels, torch.float32, generator), vector(channels, torch.float32, generator)
    oracle = gradients(*doubled(x, weight, bias, dy))
    assert_close("y", layer_norm(x, weight, bias, EPS), oracle[0])
    for name, result, want in zip(
        ("dx", "dweight", "dbias"), layer_norm_backward(dy, x, weight, EPS), oracle[1:], strict=True
    ):
        assert_close(name, result, want)


def test_parameters_of_another_dtype():
    """Mixed precision: 16-bit maps, float32 parameters whose gradients are float32."""
    generator = torch.Generator().manual_seed(3)
    x, dy = (random_map(1, 40, 6, 7, torch.bfloat16, generator) for _ in range(2))
    weight, bias = (vector(40, torch.float32, generator).requires_grad_() for _ in range(2))
    leaf = x.clone().requires_grad_()
    y = with_gradients(leaf, weight, bias, EPS)
    y.backward(dy)
    oracle = gradients(*doubled(x, weight.detach(), bias.detach(), dy))
    for name, result, want in zip(("y", "dx", "dw", "db"), (y, leaf.grad, weight.grad, bias.grad), oracle, strict=True):
        assert_close(name, result.detach(), want)
    assert weight.grad.dtype == bias.grad.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mode", ["triton", "stock"])
def test_result_of_another_dtype(mode, affine):
    """As under autocast: a 16-bit map gives a float32 one, whose gradient is float32."""
    generator = torch.Generator().manual_seed(13)
    x, dy = random_map(2, 24, 5, 7, torch.bfloat16, generator), random_map(2, 24, 5, 7, torch.float32, generator)
    weight, bias = (vector(24, torch.float32, generator) if affine else None for _ in range(2))
    oracle = gradients(*doubled(x, weight, bias, dy))
    with choice.override(mode), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = layer_norm(x, weight, bias, EPS, torch.float32)
        dx, *sums = layer_norm_backward(dy, x, weight, EPS)
    assert y.dtype == torch.float32 and dx.dtype == x.dtype and all(s.dtype == torch.float32 for s in sums)
    for name, result, want in zip(("y", "dx", "dweight", "dbias"), (y, dx, *sums), oracle, strict=False):
        assert_close(name, result, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_are_read_and_written_in_place(dtype, tiles):
    generator = torch.Generator().manual_seed(4)
    x, dy = (random_map(2, 20, 5, 6, dtype, generator) for _ in range(2))
    weight, bias = vector(20, dtype, generator), vector(20, dtype, generator)
    oracle_y, oracle_dx, oracle_dweight, oracle_dbias = gradients(*doubled(x, weight, bias, dy))
    y, dx = window(torch.zeros_like(x)), window(torch.zeros_like(x))
    x, dy = window(x), window(dy)
    launch_forward(x, weight, bias, EPS, y)
    dweight, dbias = launch_backward(dy, x, weight, EPS, dx)
    for name, result, oracle in (
        ("y", y, oracle_y),
        ("dx", dx, oracle_dx),
        ("dweight", dweight, oracle_dweight),
        ("dbias", dbias, oracle_dbias),
    ):
        assert_close(name, result, oracle)
    for result in (y, dx):
        assert result._base.isfinite().sum() == result.numel(), "something was written outside the window"


def test_large_mean_does_not_cancel():
    """E[x^2] - E[x]^2 in float32 has no correct digit here."""
    generator = torch.Generator().manual_seed(5)
    x = random_map(1, 64, 4, 4, torch.float32, generator) + 10_000
    y = layer_norm(x, None, None, EPS)
    oracle = layer_norm_reference(x.double(), None, None, EPS)
    assert (y - oracle).abs().max() < 2e-3  # the mean itself is known to 5e-4
    variance = x.square().mean(1) - x.mean(1).square()
    assert ((variance - x.double().var(1, correction=0)).abs() > 0.1).any()


def test_constant_pixels_are_finite():
    x = torch.full((1, 8, 2, 2), 3.0, device=DEVICE).contiguous(memory_format=torch.channels_last)
    dx, _, _ = layer_norm_backward(torch.ones_like(x), x, None, EPS)
    assert not layer_norm(x, None, None, EPS).any() and not dx.any()


def test_order_of_programs(tiles):
    generator = torch.Generator().manual_seed(6)
    x, dy = (random_map(2, 12, 9, 7, torch.float32, generator) for _ in range(2))
    weight = vector(12, torch.float32, generator)
    assert_order_free(lambda: (layer_norm(x, weight, weight, EPS), *layer_norm_backward(dy, x, weight, EPS)))


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(2, 70),
    h=st.integers(1, 6),
    w=st.integers(1, 9),
    rows=st.sampled_from([1, 2, 8]),
    steps=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size(n, c, h, w, rows, steps, dtype):
    generator = torch.Generator().manual_seed(c)
    x, dy = (random_map(n, c, h, w, dtype, generator) for _ in range(2))
    weight, bias = vector(c, dtype, generator), vector(c, dtype, generator)
    # Gradients of two or three channels cancel: what is left of float32 is told by the size of the terms.
    oracle = gradients(*doubled(x, weight, bias, dy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stream, "stream_config", lambda p, c, m: StreamConfig(rows, stream_config(p, c, m).block_c, steps, 4)
        )
        y, (dx, dweight, dbias) = layer_norm(x, weight, bias, EPS), layer_norm_backward(dy, x, weight, EPS)
    assert_close("y", y, oracle[0])
    if c >= 8:
        assert_close("dx", dx, oracle[1])
    assert_close("dweight", dweight, oracle[2])
    assert_close("dbias", dbias, oracle[3])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(memory_format, affine):
    generator = torch.Generator().manual_seed(7)
    x = random_map(2, 3, 2, 2, torch.float64, generator).contiguous(memory_format=memory_format).requires_grad_()
    if affine:
        parameters = [vector(3, torch.float64, generator).requires_grad_() for _ in range(2)]
        assert torch.autograd.gradcheck(lambda *t: with_gradients(*t, EPS), (x, *parameters))
    else:
        assert torch.autograd.gradcheck(lambda t: with_gradients(t, None, None, EPS), (x,))


def test_expanded_gradient():
    """The gradient of a sum has strides of zero."""
    generator = torch.Generator().manual_seed(8)
    x = random_map(1, 6, 3, 4, torch.float64, generator).requires_grad_()
    weight = vector(6, torch.float64, generator)
    with_gradients(x, weight, None, EPS).sum().backward()
    assert_close("dx", x.grad, gradients(x.detach(), weight, None, torch.ones_like(x))[1])


def test_opcheck():
    generator = torch.Generator().manual_seed(9)
    x, dy = (random_map(2, 6, 3, 4, torch.float32, generator) for _ in range(2))
    weight, bias = vector(6, torch.float32, generator), vector(6, torch.float32, generator)
    torch.library.opcheck(layer_norm, (x, weight, bias, EPS))
    torch.library.opcheck(layer_norm, (x, None, None, EPS))
    torch.library.opcheck(layer_norm_backward, (dy, x, weight, EPS))


def test_empty_map():
    x = torch.empty(0, 6, 3, 4, device=DEVICE)
    dx, dweight, dbias = layer_norm_backward(x, x, None, EPS)
    assert layer_norm(x, None, None, EPS).shape == dx.shape == x.shape
    assert not dweight.any() and not dbias.any()


def test_refusals():
    x = torch.zeros(1, MOST_NORM_CHANNELS + 1, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="8193 channels; use at most 8192"):
        layer_norm(x, None, None, EPS)
    with pytest.raises(ValueError, match="use smaller tiles"):
        stream.count_pixels(torch.empty(2, 8, 32768, 32768, device="meta"), "layer_norm")


def test_tiles_cover_every_pixel():
    for pixels in (1, 7, 49, 4096, 3328 * 2560, 2**30):
        for channels in (1, 3, 96, 768, 2048, MOST_NORM_CHANNELS):
            config = stream_config(pixels, channels, MOST_NORM_CHANNELS)
            assert config.block_c >= channels and config.steps <= 1024
            assert (config.programs(pixels) - 1) * config.share < pixels <= config.programs(pixels) * config.share


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    def case(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(10)
        x = random_map(1, 40, 6, 7, torch.bfloat16, generator) + 1
        weight = vector(40, torch.bfloat16, generator)
        return x, weight, layer_norm_reference(x.double(), weight.double(), None, EPS)

    def test_second_rounding(self):
        x, weight, oracle = self.case()
        twice = (layer_norm(x, None, None, EPS) * weight.reshape(-1, 1, 1)).to(torch.bfloat16)
        with pytest.raises(AssertionError, match="stock"):
            assert_close("y", twice, oracle, stock=layer_norm_reference(x, weight, None, EPS))

    def test_unbiased_variance(self):
        x, weight, oracle = self.case()
        with pytest.raises(AssertionError, match="relative L2"):
            assert_close("y", layer_norm(x, weight, None, EPS) * (39 / 40) ** 0.5, oracle)

    def test_read_past_the_channels(self):
        x, _, _ = self.case()
        guarded = Guarded()
        x, y = guarded(x), guarded.empty(*x.shape, dtype=x.dtype)
        wide = [torch.as_strided(t, (1, 41, 6, 7), (1680, 1, 280, 40)) for t in (x, y)]  # a channel more than there is
        launch_forward(wide[0], None, None, EPS, wide[1])
        with pytest.raises(AssertionError, match="not finite"):
            assert_close("y", y, layer_norm_reference(x.double(), None, None, EPS))

    def test_write_past_the_pixels(self):
        x, _, _ = self.case()
        guarded = Guarded()
        y = guarded.empty(*x.shape, dtype=x.dtype)
        launch_forward(torch.cat([x, x], 2), None, None, EPS, torch.as_strided(y, (1, 40, 12, 7), (3360, 1, 280, 40)))
        with pytest.raises(AssertionError, match="around a buffer"):
            guarded.check()

    def test_window_taken_for_a_dense_map(self, monkeypatch):
        x, weight, oracle = self.case()
        monkeypatch.setattr(stream, "is_flat", lambda *maps: True)
        y = torch.empty_like(x)
        launch_forward(window(x), weight, None, EPS, y)
        with pytest.raises(AssertionError, match="not finite"):
            assert_close("y", y, oracle)
