"""The registered convolution ops: finite differences, PyTorch's own checks of ops, both implementations."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, assert_close, random_map
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import choice
from gigamorph.kernels.activations import ACTIVATIONS, activate_reference
from gigamorph.kernels.conv2d import conv2d, conv2d_act_grad, conv2d_dgrad, conv2d_forward, conv2d_wgrad_
from gigamorph.kernels.windows import ConvGeometry


def tensors(groups: int = 1, stride: int = 1) -> list[Tensor]:
    """x, weight, scale, shift, residual."""
    channels = filters = 4
    dtype = torch.float64
    g = torch.Generator().manual_seed(0)
    size = (5 + 2 - 3) // stride + 1
    found = [
        random_map(1, channels, 5, 5, dtype, g),
        random_map(filters, channels // groups, 3, 3, dtype, g, 0.3),
        (torch.rand(filters, generator=g) + 0.5).to(DEVICE, dtype),
        torch.randn(filters, generator=g).to(DEVICE, dtype),
        random_map(1, filters, size, size, dtype, g),
    ]
    return [t.requires_grad_() for t in found]


@pytest.mark.parametrize(
    ("act", "groups", "stride"),
    [("none", 1, 1), ("relu", 1, 2), ("relu6", 2, 1), ("silu", 1, 1), ("gelu", 4, 2), ("hardswish", 1, 2)],
)
def test_gradcheck(act: str, groups: int, stride: int) -> None:
    def run(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        return conv2d(
            x, weight, scale=scale, shift=shift, residual=residual, stride=stride, padding=1, groups=groups, act=act
        )

    assert torch.autograd.gradcheck(run, tensors(groups, stride), fast_mode=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["triton", "stock"])
@pytest.mark.parametrize("groups", [1, 4])
def test_both_implementations_agree_with_autograd(mode: str, act: str, groups: int) -> None:
    inputs = tensors(groups, 2)
    x, weight, scale, shift, residual = inputs
    z = F.conv2d(F.pad(x, [1, 0, 0, 1]), weight, None, 1, 0, 1, groups)
    residual = residual[:, :, :1, :1].expand(-1, -1, *z.shape[2:])
    expected = activate_reference(z * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1) + residual, act)
    weights = torch.randn(expected.shape, dtype=torch.float64, device=DEVICE)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    with choice.override(mode):
        y = conv2d(x, weight, scale=scale, shift=shift, residual=residual, padding=(0, 1, 1, 0), groups=groups, act=act)
        got = torch.autograd.grad((y * weights).sum(), inputs)
    assert_close("y", y, expected)
    for name, have, want in zip(("dx", "dw", "dscale", "dshift", "dresidual"), got, wanted, strict=True):
        assert_close(name, have, want)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4], [1, 3]])
def test_only_the_gradients_that_are_wanted(wanted: list[int]) -> None:
    inputs = [t.detach() for t in tensors()]
    for i in wanted:
        inputs[i].requires_grad_()
    x, weight, scale, shift, residual = inputs
    y = conv2d(x, weight, scale=scale, shift=shift, residual=residual, padding=1, act="relu")
    z = F.conv2d(x, weight, None, 1, 1) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1) + residual
    leaves = [inputs[i] for i in wanted]
    for have, want in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z.relu().sum(), leaves), strict=True
    ):
        assert_close("gradient", have, want)


@pytest.mark.parametrize("mode", ["triton", "stock"])
def test_registered_as_pytorch_wants_ops(mode: str) -> None:
    x, weight, _, shift, residual = (t.detach() for t in tensors())
    place = ConvGeometry.of(padding=(1, 1, 1, 1))
    y = residual.relu()
    sums = torch.zeros_like(weight), torch.zeros_like(shift)
    with choice.override(mode):
        # Without gradients: these are the parts that the differentiable op, or an engine, is made of.
        torch.library.opcheck(conv2d_forward, (x, weight, shift, residual, place, "silu", True, [0, 0]))
        torch.library.opcheck(conv2d_dgrad, (residual, weight, y, "relu", x, [0, 0], x, "relu", [5, 5], place))
        part = x[:, :, 1:4].contiguous(memory_format=torch.channels_last)
        torch.library.opcheck(conv2d_dgrad, (residual, weight, y, "relu", part, [1, 0], x, "relu", [5, 5], place))
        torch.library.opcheck(conv2d_act_grad, (residual, x, weight, shift, "gelu", place))
        torch.library.opcheck(conv2d_wgrad_, (*sums, x, residual, y, "relu", place))


def test_under_torch_compile_and_checkpoint() -> None:
    x, weight, _, shift, _ = tensors()

    def run(x: Tensor) -> Tensor:
        return conv2d(x, weight, shift=shift, padding=1, act="relu").sum()

    (plain,) = torch.autograd.grad(run(x), x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_close("compiled", torch.autograd.grad(compiled(x), x)[0], plain)
    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    assert_close("checkpoint", torch.autograd.grad(again, x)[0], plain)


def test_the_margin_is_left_alone() -> None:
    x, weight, _, _, _ = (t.detach() for t in tensors())
    place = ConvGeometry.of(padding=(1, 1, 1, 1))
    for mode in ("triton", "stock"):
        with choice.override(mode):
            whole, _ = conv2d_forward(x, weight, None, None, place, "none", False, [2, 3])
        assert whole.shape == (1, 4, 7, 8)
        assert whole[:, :, :2].isnan().all() and whole[:, :, :, :3].isnan().all()  # poisoned, not written
        assert_close("y", whole[:, :, 2:, 3:], F.conv2d(x, weight, padding=1))


def test_weight_gradients_are_added_to_what_is_there() -> None:
    x, weight, _, shift, dy = (t.detach() for t in tensors())
    place = ConvGeometry.of(padding=(1, 1, 1, 1))
    for mode in ("triton", "stock"):
        dw, dshift = torch.ones_like(weight), torch.ones_like(shift)
        with choice.override(mode):
            for _ in range(2):
                conv2d_wgrad_(dw, dshift, x, dy, None, "none", place)
        assert_close("dw", dw, 1 + 2 * torch.nn.grad.conv2d_weight(x, weight.shape, dy, padding=1))
        assert_close("dshift", dshift, 1 + 2 * dy.sum((0, 2, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "groups=3"),
        ({"act": "tanh"}, "tanh"),
        ({"residual": torch.zeros(1, 4, 2, 2, dtype=torch.float64)}, "residual"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict, message: str) -> None:
    x, weight, *_ = tensors()
    with pytest.raises(ValueError, match=message) as error:
        conv2d(x, weight, padding=1, **change)
    assert "\n" not in str(error.value)
