"""LayerNorm and the linear layer behind it against the float64 oracle: values, gradients, windows, dtypes."""

import contextlib

import pytest
import torch
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, doubled, random_map, window
from torch import Tensor

from gigamorph.kernels import choice, tuning
from gigamorph.kernels.layer_norm import layer_norm_reference
from gigamorph.kernels.layer_norm_linear import (
    launch_linear_act,
    layer_norm_linear_act,
    layer_norm_linear_act_backward,
    layer_norm_linear_act_reference,
)
from gigamorph.kernels.tuning import Config, forced

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def vector(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return (torch.randn(n, generator=generator, dtype=torch.float64) * 0.5 + 1).to(dtype).to(DEVICE)


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


class NormLinear(torch.autograd.Function):
    """The op and its backward as the engine joins them."""

    @staticmethod
    def forward(ctx, act, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.act = act
        return layer_norm_linear_act(*tensors[:3], EPS, *tensors[3:], act)

    @staticmethod
    def backward(ctx, dy):
        x, ln_weight, ln_bias, weight, bias = ctx.saved_tensors
        sums = torch.zeros_like(weight.flatten(1), dtype=torch.promote_types(weight.dtype, torch.float32))
        sums = sums, sums.new_zeros(len(weight))
        given = x, ln_weight, ln_bias, EPS, weight.flatten(1), bias, ctx.act
        found = *layer_norm_linear_act_backward(dy, *given, *sums), *sums
        pairs = zip(found, ctx.saved_tensors, strict=True)
        return None, *(None if leaf is None else grad.reshape(leaf.shape).to(leaf.dtype) for grad, leaf in pairs)


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
    y = window(torch.zeros(2, 24, 5, 6, dtype=x.dtype, device=x.device))
    launch_linear_act(window(x), None, None, EPS, weight, None, "none", y)
    assert_close("y", y, layer_norm_linear_act_reference(x, None, None, EPS, weight, None, "none"))
    assert y._base.isfinite().sum() == y.numel(), "something was written outside the window"


def test_linear_splits_columns_between_programs(monkeypatch):
    """As on a GPU, where a small map would leave the chip idle."""
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
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
    y = NormLinear.apply(act, *leaves[:3], leaves[3][:, :, None, None], leaves[4])
    results = y.detach(), *torch.autograd.grad(y, leaves, dy)
    names = ("y", "dx", "dln_weight", "dln_bias", "dweight", "dbias")
    for name, result, oracle in zip(names, results, linear_gradients(arguments, act, dy), strict=True):
        assert_close(name, result, oracle)


def test_linear_gradcheck():
    generator = torch.Generator().manual_seed(15)
    leaves = [t.requires_grad_() for t in linear_case((1, 3, 1, 2), 2, torch.float64, generator)]
    assert torch.autograd.gradcheck(lambda *t: NormLinear.apply("gelu", *t), leaves)
    assert torch.autograd.gradcheck(
        lambda x, w: NormLinear.apply("silu", x, None, None, w, None), (leaves[0], leaves[3])
    )


def test_linear_opcheck():
    generator = torch.Generator().manual_seed(16)
    x, ln_weight, ln_bias, weight, bias = linear_case((2, 16, 3, 4), 24, torch.float32, generator)
    torch.library.opcheck(layer_norm_linear_act, (x, ln_weight, ln_bias, EPS, weight, bias, "gelu"))


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


@pytest.mark.parametrize("mode", ["triton", "stock"])
@pytest.mark.parametrize("kinds", ["bf16 maps, float32 parameters", "float32 map, bf16 product"])
def test_linear_in_mixed_precision(kinds, mode):
    """Both under autocast: the norm's parameters stay in float32, and so may what it reads; one rounding in between."""
    generator = torch.Generator().manual_seed(19)
    x, ln_weight, ln_bias, weight, bias = linear_case((2, 24, 5, 7), 40, torch.bfloat16, generator)
    if kinds.startswith("float32"):
        x = x.float() + random_map(2, 24, 5, 7, torch.float32, generator, 1e-3)
    arguments = x, ln_weight.float() * 1.001, ln_bias.float() * 1.001, weight, bias.float()
    dy = random_map(2, 40, 5, 7, torch.bfloat16, generator)
    leaves = [t.clone().requires_grad_() for t in arguments]
    with choice.override(mode), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = NormLinear.apply("gelu", *leaves)
    with choice.override(mode):
        results = y.detach(), *torch.autograd.grad(y, leaves, dy)
    oracle = linear_gradients(tuple(t.double() for t in arguments), "gelu", dy.double())
    assert y.dtype == torch.bfloat16 and [t.dtype for t in results[1:]] == [t.dtype for t in arguments]
    for name, result, want in zip(("y", "dx", "dg", "db", "dw", "dbias"), results, oracle, strict=True):
        # n, z, dz and dn are rounded on the way, as in stock PyTorch
        l2 = ((result.double() - want).norm() / want.norm()).item()
        assert l2 < 6e-3, f"{name}: {l2}"


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    @pytest.mark.parametrize("fault", ["eps", "shift of the norm", "one weight", "activation"])
    def test_wrong_parts(self, fault):
        generator = torch.Generator().manual_seed(20)
        arguments = linear_case((1, 24, 5, 7), 40, torch.float32, generator)
        oracle = layer_norm_linear_act_reference(*doubled(*arguments[:3]), EPS, *doubled(*arguments[3:]), "gelu")
        x, scale, shift, weight, bias = (t.clone() for t in arguments)
        eps, act = (0.1, "gelu") if fault == "eps" else (EPS, "silu" if fault == "activation" else "gelu")
        if fault == "one weight":
            weight[7, 3] *= 1.2
        given = x, scale, None if fault.startswith("shift") else shift, eps, weight, bias, act
        with pytest.raises(AssertionError, match="y: relative"):
            assert_close("y", layer_norm_linear_act(*given), oracle, tf32=True)
