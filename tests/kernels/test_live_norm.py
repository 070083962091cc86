"""The whole gradient of a BatchNorm in training, against PyTorch's own in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, assert_close, assert_order_free, doubled, random_map
from kernel_references import normalize_act_gradients_reference
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import choice, stream
from gigamorph.kernels.activations import activate_reference
from gigamorph.kernels.batch_norm import (
    normalize_act,
    normalize_act_gradients,
)
from gigamorph.kernels.moments import moments_reference
from gigamorph.kernels.tiles import StreamConfig

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def statistics(x: Tensor, together: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and rstd of each channel's group of the values themselves, in at least float32."""
    n, c, h, w = x.shape
    mean, m2 = moments_reference(x.double().reshape(n, c // together, together * h, w))
    rstd = (m2 / (n * together * h * w) + EPS).rsqrt()
    wide = torch.promote_types(x.dtype, torch.float32)
    return mean.repeat_interleave(together).to(wide), rstd.repeat_interleave(together).to(wide)


def norm(x, weight, bias, together=1) -> Tensor:
    if together > 1:
        return F.group_norm(x, x.shape[1] // together, weight, bias, EPS)
    return F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)


def oracle(dy, x, weight, bias, residual, act, together=1) -> list[Tensor]:
    """dx, dz, dbias and dweight by autograd in float64."""
    dy, x, weight, bias, residual = doubled(dy, x, weight, bias, residual)
    leaves = [t.requires_grad_() for t in (x, residual, bias, weight) if t is not None]
    z = norm(x, weight, bias, together)
    y = activate_reference(z if residual is None else z + residual, act)
    return list(torch.autograd.grad(y, leaves, dy))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(["triton", "stock"]),
    n=st.integers(1, 3),
    c=st.integers(9, 40),  # of one channel a sum may cancel, and its error is no longer that of a rounding
    h=st.integers(4, 7),
    w=st.integers(5, 9),
    act=st.sampled_from(["none", "relu", "relu6", "silu", "gelu", "hardswish"]),
    summed=st.booleans(),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    small=st.booleans(),
    together=st.sampled_from([1, 1, 2, 5]),
    seed=st.integers(0, 2**16),
)
def test_any(mode, n, c, h, w, act, summed, affine, dtype, small, together, seed):
    if together > 1:
        n, c = 1, -(-c // together) * together
    generator = torch.Generator().manual_seed(seed)
    dy, x, residual = (random_map(n, c, h, w, dtype, generator) for _ in range(3))
    mean, rstd = statistics(x, together)
    weight, bias = (torch.rand(2, c, generator=generator, dtype=torch.float64) + 0.5).to(mean.dtype).to(DEVICE)
    if not affine:
        weight = bias = None
    if act not in ("none", "relu", "relu6") and (summed or (mode == "stock" and dtype.itemsize == 2)):
        act = "relu"  # a sum does not show others' slopes; stock rounds in 16 bits what they are multiplied with
    gate = normalize_act(x, mean, rstd, weight, bias, residual, act) if summed and act != "none" else None
    keep = gate is not None
    with choice.override(mode), pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(stream, "stream_config", lambda pixels, channels, most: StreamConfig(4, 16, 3, 4))
        dx, dz, dbias, dweight = normalize_act_gradients(dy, x, mean, rstd, weight, bias, gate, act, keep, together)
    expected = oracle(dy, x, weight, bias, residual if summed else None, act, together)
    if gate is not None:
        # Where rounding has moved a value over the edge of a slope, one has a gradient and the other none.
        z = activate_reference(norm(x.double(), *doubled(weight, bias), together) + residual, act)
        if not torch.equal((gate > 0) & (gate < 6), (z > 0) & (z < 6)):
            return
    assert_close("dx", dx, expected.pop(0))
    if summed:
        dresidual = expected.pop(0)
        assert_close("dz", dz if keep else dy, dresidual)
    if affine:
        assert_close("dbias", dbias, expected.pop(0))
        assert_close("dweight", dweight, expected.pop(0))


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("together", [1, 3])
def test_the_reference_is_autograd_s(act, together):
    generator = torch.Generator().manual_seed(3)
    dy, x = (random_map(1 if together > 1 else 2, 9, 5, 4, torch.float64, generator) for _ in range(2))
    weight, bias = torch.rand(2, 9, generator=generator, dtype=torch.float64).to(DEVICE)
    dx, _, *sums = normalize_act_gradients_reference(dy, x, *statistics(x, together), weight, bias, None, act, together)
    for found, expected in zip((dx, *sums), oracle(dy, x, weight, bias, None, act, together), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["triton", "stock"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("together", [0, 1, 3])
def test_what_the_gradient_lacks(mode, act, together):
    """That of a sum over y's pixels, which is added as the gradient is read."""
    generator = torch.Generator().manual_seed(7)
    dy, x = (random_map(1, 9, 5, 4, torch.float64, generator) for _ in range(2))
    weight, bias, plus = torch.rand(3, 9, generator=generator, dtype=torch.float64).to(DEVICE)
    given = x, *statistics(x, together or 1), weight, bias, None, act, False, together
    with choice.override(mode):
        found = normalize_act_gradients(dy, *given, plus)
        expected = normalize_act_gradients(dy + plus.reshape(-1, 1, 1), *given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_order_of_programs():
    generator = torch.Generator().manual_seed(4)
    dy, x = (random_map(1, 20, 9, 7, torch.bfloat16, generator) for _ in range(2))
    mean, rstd = statistics(x)
    assert_order_free(lambda: normalize_act_gradients(dy, x, mean, rstd, None, None, None, "relu", False, 1))


def test_opcheck():
    generator = torch.Generator().manual_seed(5)
    dy, x = (random_map(2, 6, 3, 4, torch.bfloat16, generator) for _ in range(2))
    mean, rstd = statistics(x)
    for keep in (True, False):
        torch.library.opcheck(normalize_act_gradients, (dy, x, mean, rstd, None, None, x, "relu", keep, 1))
    torch.library.opcheck(normalize_act_gradients, (dy, x, mean, rstd, None, None, None, "relu", False, 1, mean))


def test_empty_map():
    x, zeros = torch.empty(2, 3, 0, 5, device=DEVICE), torch.zeros(3, device=DEVICE)
    dx, _, *sums = normalize_act_gradients(x, x, zeros, zeros, None, None, None, "relu", False, 1)
    assert dx.shape == x.shape and all(torch.equal(s, zeros) for s in sums)


def test_a_planted_error_is_seen():
    """Statistics taken for constants."""
    generator = torch.Generator().manual_seed(6)
    dy, x = (random_map(1, 9, 5, 5, torch.float32, generator) for _ in range(2))
    (dx,) = oracle(dy, x, None, None, None, "none")
    with pytest.raises(AssertionError):
        assert_close("dx", dy * statistics(x)[1].reshape(-1, 1, 1), dx)
