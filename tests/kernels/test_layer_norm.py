"""LayerNorm over channels against the float64 oracle: values, gradients, windows, guard bands, order of programs."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map
from torch import Tensor

from gigamorph.kernels import layer_norm as module
from gigamorph.kernels.layer_norm import (
    MOST_CHANNELS,
    Stream,
    launch_backward,
    launch_forward,
    launch_linear_act,
    layer_norm,
    layer_norm_backward,
    layer_norm_linear_act,
    layer_norm_linear_act_reference,
    layer_norm_reference,
    stream_config,
)
from gigamorph.kernels.tuning import Config, forced

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


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def inside(t: Tensor, pixels: Tensor) -> Tensor:
    """A window in the middle of a larger buffer of NaN, holding `pixels`."""
    n, c, h, w = pixels.shape
    buffer = torch.full((n + 1, c, h + 3, w + 5), float("nan"), dtype=t.dtype, device=t.device)
    window = buffer.contiguous(memory_format=torch.channels_last)[:n, :, 1 : 1 + h, 3 : 3 + w]
    return window.copy_(pixels)


@pytest.fixture(params=["computed", "small tiles"])
def tiles(request, monkeypatch):
    """The configuration of the interpreter, and one with several programs of several tiles."""
    if request.param == "small tiles":

        def small(pixels, channels, most):
            return Stream(4, stream_config(pixels, channels, most).block_c, 3, 4)

        monkeypatch.setattr(module, "stream_config", small)


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
    y = layer_norm(leaf, weight, bias, EPS)
    y.backward(dy)
    oracle = gradients(*doubled(x, weight.detach(), bias.detach(), dy))
    for name, result, want in zip(("y", "dx", "dw", "db"), (y, leaf.grad, weight.grad, bias.grad), oracle, strict=True):
        assert_close(name, result.detach(), want)
    assert weight.grad.dtype == bias.grad.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_are_read_and_written_in_place(dtype, tiles):
    generator = torch.Generator().manual_seed(4)
    x, dy = (random_map(2, 20, 5, 6, dtype, generator) for _ in range(2))
    weight, bias = vector(20, dtype, generator), vector(20, dtype, generator)
    oracle_y, oracle_dx, oracle_dweight, oracle_dbias = gradients(*doubled(x, weight, bias, dy))
    y, dx = inside(x, torch.zeros_like(x)), inside(x, torch.zeros_like(x))
    x, dy = inside(x, x), inside(x, dy)
    launch_forward(x, weight, bias, EPS, y)
    dweight, dbias = launch_backward(dy, x, weight, EPS, dx)
    for name, result, oracle in (
        ("y", y, oracle_y), ("dx", dx, oracle_dx), ("dweight", dweight, oracle_dweight), ("dbias", dbias, oracle_dbias),
    ):  # fmt: skip
        assert_close(name, result, oracle)
    for window in (y, dx):
        assert window._base.isfinite().sum() == window.numel(), "something was written outside the window"


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
    n=st.integers(1, 3), c=st.integers(2, 70), h=st.integers(1, 6), w=st.integers(1, 9),
    rows=st.sampled_from([1, 2, 8]), steps=st.integers(1, 4), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_size(n, c, h, w, rows, steps, dtype):
    generator = torch.Generator().manual_seed(c)
    x, dy = (random_map(n, c, h, w, dtype, generator) for _ in range(2))
    weight, bias = vector(c, dtype, generator), vector(c, dtype, generator)
    # Gradients of two or three channels cancel: what is left of float32 is told by the size of the terms.
    oracle = gradients(*doubled(x, weight, bias, dy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "stream_config", lambda p, c, m: Stream(rows, stream_config(p, c, m).block_c, steps, 4))
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
    x = random_map(2, 5, 2, 3, torch.float64, generator).contiguous(memory_format=memory_format).requires_grad_()
    if affine:
        parameters = [vector(5, torch.float64, generator).requires_grad_() for _ in range(2)]
        assert torch.autograd.gradcheck(lambda *t: layer_norm(*t, EPS), (x, *parameters))
    else:
        assert torch.autograd.gradcheck(lambda t: layer_norm(t, None, None, EPS), (x,))


def test_expanded_gradient():
    """The gradient of a sum has strides of zero."""
    generator = torch.Generator().manual_seed(8)
    x = random_map(1, 6, 3, 4, torch.float64, generator).requires_grad_()
    weight = vector(6, torch.float64, generator)
    layer_norm(x, weight, None, EPS).sum().backward()
    assert_close("dx", x.grad, gradients(x.detach(), weight, None, torch.ones_like(x))[1])


def test_opcheck():
    generator = torch.Generator().manual_seed(9)
    x, dy = (random_map(2, 6, 3, 4, torch.float32, generator) for _ in range(2))
    weight, bias = vector(6, torch.float32, generator), vector(6, torch.float32, generator)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(layer_norm, (*leaves, EPS))
    torch.library.opcheck(layer_norm, (leaves[0], None, None, EPS))
    torch.library.opcheck(layer_norm_backward, (dy, x, weight, EPS))


def test_empty_map():
    x = torch.empty(0, 6, 3, 4, device=DEVICE)
    dx, dweight, dbias = layer_norm_backward(x, x, None, EPS)
    assert layer_norm(x, None, None, EPS).shape == dx.shape == x.shape
    assert not dweight.any() and not dbias.any()


def test_refusals():
    x = torch.zeros(1, MOST_CHANNELS + 1, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="8193 channels; use at most 8192"):
        layer_norm(x, None, None, EPS)
    with pytest.raises(ValueError, match="use smaller tiles"):
        module.count_pixels(torch.empty(2, 8, 32768, 32768, device="meta"), "layer_norm")


def test_tiles_cover_every_pixel():
    for pixels in (1, 7, 49, 4096, 3328 * 2560, 2**30):
        for channels in (1, 3, 96, 768, 2048, MOST_CHANNELS):
            config = stream_config(pixels, channels, MOST_CHANNELS)
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
        monkeypatch.setattr(module, "is_flat", lambda *maps: True)
        y = torch.empty_like(x)
        launch_forward(inside(x, x), weight, None, EPS, y)
        with pytest.raises(AssertionError, match="not finite"):
            assert_close("y", y, oracle)


# -- followed by a 1x1 convolution --------------------------------------------------------------------------------


@pytest.fixture(params=["ieee", "tf32"])
def tf32(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param == "tf32")
    return request.param == "tf32"


def linear_case(shape, filters, dtype, generator) -> tuple[Tensor, ...]:
    """x, ln_weight, ln_bias, weight, bias."""
    x = random_map(*shape, dtype, generator, 2.0) + 1
    ln_weight, ln_bias = vector(shape[1], dtype, generator), vector(shape[1], dtype, generator)
    weight = torch.randn(filters, shape[1], generator=generator, dtype=torch.float64) / shape[1] ** 0.5
    return x, ln_weight, ln_bias, weight.to(dtype).to(DEVICE), vector(filters, dtype, generator)


def linear_gradients(arguments: tuple[Tensor, ...], act: str, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    y = layer_norm_linear_act_reference(*leaves[:3], EPS, *leaves[3:], act)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "filters", "act", "config"),
    [
        ((2, 24, 5, 7), 40, "gelu", Config("pointer", 16, 16, 16)),
        ((1, 96, 3, 5), 130, "none", None),
        ((1, 17, 4, 9), 33, "relu", Config("pointer", 32, 32, 16)),
        ((1, 50, 1, 11), 7, "silu", Config("pointer", 16, 16, 64)),
    ],
    ids=str,
)
def test_linear(dtype, shape, filters, act, config, tf32):
    generator = torch.Generator().manual_seed(11)
    arguments = linear_case(shape, filters, dtype, generator)
    oracle = layer_norm_linear_act_reference(
        *(t.double() for t in arguments[:3]), EPS, *(t.double() for t in arguments[3:]), act
    )
    stock = layer_norm_linear_act_reference(*arguments[:3], EPS, *arguments[3:], act)
    guarded = Guarded()
    y = guarded.empty(*oracle.shape, dtype=dtype)
    x, ln_weight, ln_bias, weight, bias = map(guarded, arguments)
    with forced(config) if config else contextlib.nullcontext():
        launch_linear_act(x, ln_weight, ln_bias, EPS, weight, bias, act, y)
    guarded.check()
    assert_close("y", y, oracle, tf32=tf32 and dtype == torch.float32, stock=stock)


def test_linear_without_parameters_between_windows():
    generator = torch.Generator().manual_seed(12)
    x, _, _, weight, _ = linear_case((2, 20, 5, 6), 24, torch.float64, generator)
    y = inside(x, torch.zeros(2, 24, 5, 6))
    launch_linear_act(inside(x, x), None, None, EPS, weight, None, "none", y)
    assert_close("y", y, layer_norm_linear_act_reference(x, None, None, EPS, weight, None, "none"))
    assert y._base.isfinite().sum() == y.numel(), "something was written outside the window"


def test_linear_splits_columns_between_programs(monkeypatch):
    """As on a GPU, where a small map would leave the chip idle."""
    monkeypatch.setattr(module, "interpreting", lambda: False)
    generator = torch.Generator().manual_seed(13)
    x, *parameters = linear_case((1, 20, 3, 6), 90, torch.float32, generator)
    oracle = layer_norm_linear_act_reference(*doubled(x, *parameters[:2]), EPS, *doubled(*parameters[2:]), "gelu")
    with forced(Config("pointer", 16, 16, 16)):
        assert_close("y", layer_norm_linear_act(x, *parameters[:2], EPS, *parameters[2:], "gelu"), oracle, tf32=True)
        assert_order_free(lambda: layer_norm_linear_act(x, *parameters[:2], EPS, *parameters[2:], "gelu"))


@pytest.mark.parametrize("act", ["none", "gelu", "relu"])
def test_linear_gradients(act):
    generator = torch.Generator().manual_seed(14)
    arguments = linear_case((2, 12, 3, 5), 20, torch.float64, generator)
    dy = random_map(2, 20, 3, 5, torch.float64, generator)
    leaves = [t.clone().requires_grad_() for t in arguments]
    y = layer_norm_linear_act(*leaves[:3], EPS, leaves[3][:, :, None, None], leaves[4], act)
    results = y.detach(), *torch.autograd.grad(y, leaves, dy)
    names = ("y", "dx", "dln_weight", "dln_bias", "dweight", "dbias")
    for name, result, oracle in zip(names, results, linear_gradients(arguments, act, dy), strict=True):
        assert_close(name, result, oracle)


def test_linear_gradcheck():
    generator = torch.Generator().manual_seed(15)
    leaves = [t.requires_grad_() for t in linear_case((1, 3, 1, 2), 2, torch.float64, generator)]
    assert torch.autograd.gradcheck(lambda *t: layer_norm_linear_act(*t[:3], EPS, *t[3:], "gelu"), leaves)
    assert torch.autograd.gradcheck(
        lambda x, w: layer_norm_linear_act(x, None, None, EPS, w, None, "silu"), (leaves[0], leaves[3])
    )


def test_linear_opcheck():
    generator = torch.Generator().manual_seed(16)
    x, ln_weight, ln_bias, weight, bias = linear_case((2, 16, 3, 4), 24, torch.float32, generator)
    leaves = [t.clone().requires_grad_() for t in (x, ln_weight, ln_bias, weight, bias)]
    torch.library.opcheck(module._layer_norm_linear_act, (*leaves[:3], EPS, *leaves[3:], "gelu"))


def test_linear_keeps_nothing_but_x():
    """What autograd saves are the arguments."""
    generator = torch.Generator().manual_seed(17)
    leaves = [t.requires_grad_() for t in linear_case((1, 16, 6, 6), 24, torch.float32, generator)]
    given_ = {t.data_ptr() for t in leaves}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer_norm_linear_act(*leaves[:3], EPS, *leaves[3:], "gelu")
    assert saved and {t.data_ptr() for t in saved} <= given_


def test_linear_refusals():
    x, weight = torch.zeros(1, 8, 2, 2, device=DEVICE), torch.zeros(4, 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight \(4, 9\) does not fit 8 channels"):
        layer_norm_linear_act(x, None, None, EPS, weight, None, "gelu")
    with pytest.raises(ValueError, match="unknown activation 'tanh'; use one of none, relu"):
        layer_norm_linear_act(x, None, None, EPS, weight[:, :8], None, "tanh")


def test_linear_statistics_do_not_cancel():
    """Blocks of channels far from each other and from zero: merged variances, not E[x^2] - E[x]^2."""
    x = random_map(1, 64, 2, 3, torch.float32, torch.Generator().manual_seed(18)) + 10_000
    x[:, 32:] += 3
    eye = torch.eye(64, device=DEVICE)
    with forced(Config("pointer", 16, 16, 16)):
        y = layer_norm_linear_act(x, None, None, EPS, eye, None, "none")
    oracle = layer_norm_reference(x.double(), None, None, EPS)
    assert (y - oracle).abs().max() < 4e-3  # the mean itself is known to 5e-4; TF32 rounds to 1e-3
