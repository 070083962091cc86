"""The gradient of an activation in one pass."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map
from torch import Tensor

from gigamorph.kernels import stream
from gigamorph.kernels.activations import ACTIVATIONS, slope_reference
from gigamorph.kernels.pointwise import act_grad, act_grad_reference, launch_act_grad
from gigamorph.kernels.tiles import StreamConfig

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(2, 16, 5, 7), (1, 3, 6, 4), (2, 1, 9, 5), (1, 24, 1, 11)]


def window_of(x: Tensor, guard: Guarded, step: int = 1) -> Tensor:
    """A copy of x as a window of a larger guarded buffer, whose rest is NaN; every `step`-th pixel of it."""
    n, c, h, w = x.shape
    around = guard.empty(n, c, h + 3, w * step + 5, dtype=x.dtype)
    window = around[:, :, 1:-2, 2 : 2 + w * step : step]
    window.copy_(x)
    return window


LAYOUTS = {
    "dense": lambda x, guard: guard(x),
    "window": window_of,
    "every second pixel": lambda x, guard: window_of(x, guard, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradient(act, dtype, layout):
    for seed, sizes in enumerate(SIZES):
        g, guard, lay = torch.Generator().manual_seed(seed), Guarded(), LAYOUTS[layout]
        dy, gate = (random_map(*sizes, dtype, g, 2.0) for _ in range(2))
        dz = lay(torch.full_like(dy, float("nan")), guard)
        launch_act_grad(lay(dy, guard), lay(gate, guard), act, dz)
        assert_close("dz", dz, act_grad_reference(dy.double(), gate.double(), act))
        guard.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_act_grad(act, dtype):
    g = torch.Generator().manual_seed(4)
    dy, gate = (random_map(1, 12, 7, 9, dtype, g, 2.0) for _ in range(2))
    stock = act_grad_reference(dy, gate, act)
    assert_close("dz", act_grad(dy, gate, act), act_grad_reference(dy.double(), gate.double(), act), stock=stock)
    one = torch.ones((), dtype=dtype, device=DEVICE).expand(dy.shape)  # the gradient of a sum
    assert_close("dz", act_grad(one, gate, act), slope_reference(gate.double(), act))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    tile=st.sampled_from([(32, 4, 1), (16, 8, 2), (8, 16, 3)]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    act=st.sampled_from(ACTIVATIONS),
)
def test_any_size(monkeypatch, sizes, tile, layouts, act):
    """Several tiles, each map laid out in its own way."""
    monkeypatch.setattr(stream, "stream_config", lambda *_: StreamConfig(*tile, 4))
    g = torch.Generator().manual_seed(sum(sizes))
    guard = Guarded()
    dy, gate = (LAYOUTS[name](random_map(*sizes, torch.float32, g), guard) for name in layouts[:2])
    dz = LAYOUTS[layouts[2]](torch.full_like(dy, float("nan")), guard)
    launch_act_grad(dy, gate, act, dz)
    assert_close("dz", dz, act_grad_reference(dy.double(), gate.double(), act))
    guard.check()


def test_order_of_programs(monkeypatch):
    monkeypatch.setattr(stream, "stream_config", lambda *_: StreamConfig(4, 8, 1, 4))
    g = torch.Generator().manual_seed(7)
    dy, gate = (random_map(1, 12, 7, 6, torch.bfloat16, g) for _ in range(2))
    assert_order_free(lambda: act_grad(dy, gate, "gelu"))


def test_planted_errors():
    """What the checks above must see, they see."""
    g = torch.Generator().manual_seed(8)
    dy, gate = (random_map(1, 16, 9, 8, torch.bfloat16, g) for _ in range(2))
    guard = Guarded()
    short = guard.empty(1, 16, 8, 8, dtype=torch.bfloat16)
    launch_act_grad(dy, gate, "relu", short.as_strided(dy.shape, dy.stride()))
    with pytest.raises(AssertionError, match="were written"):
        guard.check()
    with pytest.raises(AssertionError, match="not finite"):  # a row read beyond the window
        inner, dz = window_of(dy, guard), torch.empty_like(dy)
        below = inner.as_strided(dy.shape, inner.stride(), inner.storage_offset() + inner.stride(2))
        launch_act_grad(below, gate, "none", dz)
        assert_close("dz", dz, dy.double())
    with pytest.raises(AssertionError):  # the slope of another activation
        assert_close("dz", act_grad(dy, gate, "silu"), act_grad_reference(dy.double(), gate.double(), "gelu"))


def test_opcheck():
    dy, gate = (random_map(1, 2, 3, 2, torch.float64, torch.Generator().manual_seed(9)) for _ in range(2))
    torch.library.opcheck(act_grad, (dy, gate, "relu"))


def test_errors():
    x = torch.zeros(1, 4, 6, 6, device=DEVICE)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        act_grad(x, x, "tanh")
    with pytest.raises(ValueError, match="must have the same shape"):
        act_grad(x, x[:, :2], "relu")


def test_empty_maps():
    x = torch.zeros(0, 4, 6, 6, device=DEVICE)
    assert act_grad(x, x, "silu").shape == x.shape
