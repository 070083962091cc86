"""The fused 3x3 and 1x1 convolutions against a float64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map

from gigamorph.kernels.conv_conv1x1 import (
    conv_conv1x1,
    conv_conv1x1_fits,
    conv_conv1x1_launch,
    conv_conv1x1_reference,
)
from gigamorph.kernels.tuning import Config, forced
from gigamorph.kernels.windows import ConvGeometry, output_size

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TILE = Config("descriptor", 16, 16, 16)  # several segments, blocks of outputs and steps of depth


def problem(dtype, stride=1, padding=(1, 1, 1, 1), size=(9, 21), channels=(24, 32, 40), residual=True, seed=0):
    """x, weight1, shift1, weight2, shift2, residual."""
    g = torch.Generator().manual_seed(seed)
    c, m, k = channels
    oh = output_size(size[0], 3, stride, 1, padding[0], padding[1])
    ow = output_size(size[1], 3, stride, 1, padding[2], padding[3])
    return (
        random_map(2, c, *size, dtype, g),
        random_map(m, c, 3, 3, dtype, g, 0.1),
        random_map(1, m, 1, 1, dtype, g).flatten(),
        random_map(k, m, 1, 1, dtype, g, 0.2),
        random_map(1, k, 1, 1, dtype, g).flatten(),
        random_map(2, k, oh, ow, dtype, g) if residual else None,
    )


ONE = ConvGeometry.of(padding=(1, 1, 1, 1))


def check(inputs, stride, padding, act="relu", config=TILE, tf32=False):
    guarded, geometry = Guarded(), ConvGeometry.of((stride, stride), padding)
    oracle = conv_conv1x1_reference(*(None if t is None else t.double() for t in inputs), geometry, "relu", act)
    stock = conv_conv1x1_reference(*inputs, geometry, "relu", act)
    x, *rest = inputs
    y = guarded.empty(*oracle.shape, dtype=x.dtype)
    with forced(config):
        conv_conv1x1_launch(guarded(x), *(None if t is None else guarded(t) for t in rest), y, geometry, "relu", act)
    guarded.check()
    assert_close("y", y, oracle, tf32=tf32, stock=stock)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, stride):
    tf32 = dtype == torch.float32
    check(problem(dtype, stride), stride, (1, 1, 1, 1), tf32=tf32)


def test_float32_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(problem(torch.float32), 1, (1, 1, 1, 1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 1, 0)])
def test_borders(padding, stride):
    check(problem(torch.float64, stride, padding), stride, padding)


@pytest.mark.parametrize("act", ["none", "silu"])
def test_other_activations_and_no_residual(act):
    check(problem(torch.float64, residual=False), 1, (1, 1, 1, 1), act)


@settings(max_examples=6, deadline=None)
@given(
    stride=st.sampled_from([1, 2]),
    padding=st.tuples(*[st.integers(0, 1)] * 4),
    h=st.integers(3, 8),
    w=st.integers(3, 40),
    c=st.sampled_from([8, 16, 24]),
    m=st.sampled_from([16, 32]),
    k=st.sampled_from([8, 24, 40]),
    residual=st.booleans(),
    rows=st.sampled_from([1, 2, 8]),
)
def test_random_sizes(stride, padding, h, w, c, m, k, residual, rows):
    inputs = problem(torch.float64, stride, padding, (h, w), (c, m, k), residual)
    check(inputs, stride, padding, config=Config("descriptor", 32, 32, 16, rows=rows))


def test_windows_of_larger_buffers():
    x, *rest = problem(torch.float16)
    outer = torch.full((2, 12, 26, 40), float("nan"), dtype=x.dtype, device=DEVICE).permute(0, 3, 1, 2)
    window = outer[:, 8:32, 2:11, 3:24]
    window.copy_(x)
    assert torch.equal(
        conv_conv1x1(window, *rest, ONE, "relu", "relu"),
        conv_conv1x1(x, *rest, ONE, "relu", "relu"),
    )


def test_order_of_programs():
    inputs = problem(torch.bfloat16)

    def run():
        with forced(TILE):
            return conv_conv1x1(*inputs, ONE, "relu", "relu")

    assert_order_free(run)


@pytest.mark.parametrize("mistake", ["shift1", "residual", "tap"])
def test_mistakes_are_seen(mistake):
    inputs = list(problem(torch.bfloat16))
    wrong = [t.clone() for t in inputs]
    if mistake == "shift1":
        wrong[2].zero_()
    elif mistake == "residual":
        wrong[5][0, 3, 4, 5] += 1
    else:
        wrong[1][:, :, 2, 2] = 0
    oracle = conv_conv1x1_reference(*(t.double() for t in inputs), ONE, "relu", "none")
    with pytest.raises(AssertionError):
        assert_close("y", conv_conv1x1(*wrong, ONE, "relu", "none"), oracle)


def test_operator():
    torch.library.opcheck(conv_conv1x1, (*problem(torch.float32), ONE, "relu", "relu"))


def test_refusals():
    x, weight1, shift1, weight2, shift2, residual = problem(torch.float32)
    assert conv_conv1x1_fits(x, weight1, weight2, residual, ONE)
    assert not conv_conv1x1_fits(x, weight1, weight2, residual, ONE._replace(stride_h=3, stride_w=3))
    assert not conv_conv1x1_fits(x, weight1[:24], weight2, residual, ONE)
    assert not conv_conv1x1_fits(x.contiguous(), weight1, weight2, residual, ONE)
    with pytest.raises(ValueError, match="separately"):
        conv_conv1x1(x, weight1[:24], shift1[:24], weight2[:, :24], shift2, residual, ONE, "relu", "relu")
