"""Additions, scales and activations in one pass, and their gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import pointwise
from gigamorph.kernels.activations import ACTIVATIONS, MASKS, slope_reference
from gigamorph.kernels.pointwise import (
    act_grad,
    act_grad_reference,
    add_act,
    affine_act,
    affine_act_backward,
    affine_act_reference,
    fold,
    launch_backward,
    launch_forward,
)

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


def slope_at(y: Tensor, z: Tensor, act: str) -> Tensor:
    """The slope in float64, from y as it was rounded where kernels take it from y."""
    return slope_reference(y.double() if act in MASKS else z, act)


def channel_vectors(c: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    scale = torch.rand(c, generator=g, dtype=torch.float64) + 0.5
    shift = torch.randn(c, generator=g, dtype=torch.float64)
    return scale.to(dtype).to(DEVICE), shift.to(dtype).to(DEVICE)


def assert_sum_close(name: str, total: Tensor, terms: Tensor) -> None:
    """As assert_close, but against the size of the terms: the sum of a few may cancel."""
    size = terms.square().sum((0, 2, 3)).sqrt()
    assert torch.isfinite(total).all(), name
    error = ((total.double() - terms.sum((0, 2, 3))).abs() / size.clamp_min(1e-300)).max().item()
    bound = 1e-12 if total.dtype == torch.float64 else 2e-6
    assert error <= bound, f"{name}: error {error:.1e} of the terms' norm (bound {bound:.0e})"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_value_and_gradients(act, dtype, layout):
    for seed, sizes in enumerate(SIZES):
        g = torch.Generator().manual_seed(seed)
        guard = Guarded()
        lay = LAYOUTS[layout]
        x, residual, dy = (random_map(*sizes, dtype, g, 2.0) for _ in range(3))
        scale, shift = channel_vectors(sizes[1], dtype if seed % 2 or dtype == torch.float64 else torch.float32, g)
        scale, shift = guard(scale), guard(shift)
        wide = [t.double() for t in (x, scale, shift, residual)]
        blank = torch.full_like(x, float("nan"))
        xw, rw, dyw, yw, dxw, dzw = (lay(t, guard) for t in (x, residual, dy, blank, blank, blank))

        launch_forward(xw, yw, act, scale=scale, shift=shift, residual=rw)
        assert_close("y", yw, affine_act_reference(*wide, act))

        z = affine_act_reference(*wide, "none")
        dz = dy.double() * slope_at(yw, z, act)
        y = yw if act in MASKS else None
        sums = launch_backward(dyw, act, x=xw, scale=scale, shift=shift, residual=rw, y=y, dx=dxw, dz=dzw, sums=True)
        assert sums is not None
        assert_close("dz", dzw, dz)
        assert_close("dx", dxw, dz * wide[1].reshape(-1, 1, 1))
        assert sums[0].dtype == sums[1].dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert_sum_close("dscale", sums[0], dz * wide[0])
        assert_sum_close("dshift", sums[1], dz)
        guard.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_add_act(act, dtype):
    """Through autograd, with x in place of y as the target of the sum and inputs in any memory order."""
    g = torch.Generator().manual_seed(3)
    x, residual, dy = (random_map(2, 24, 6, 5, dtype, g, 2.0) for _ in range(3))
    z = x.double() + residual.double()
    leaves = [x.requires_grad_(), residual.contiguous().requires_grad_()]
    y = add_act(*leaves, act)
    stock = affine_act_reference(x, None, None, residual, act)
    assert_close("y", y, affine_act_reference(z, None, None, None, act), stock=stock)
    dx, dresidual = torch.autograd.grad(y, leaves, dy)
    oracle = dy.double() * slope_at(y, z, act)
    assert_close("dx", dx, oracle)
    assert torch.equal(dx, dresidual)
    in_place = x.detach().clone(memory_format=torch.preserve_format)
    launch_forward(in_place, in_place, act, residual=residual)
    assert torch.equal(in_place, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_act_grad(act, dtype):
    g = torch.Generator().manual_seed(4)
    dy, gate, residual = (random_map(1, 12, 7, 9, dtype, g, 2.0) for _ in range(3))
    stock = act_grad_reference(dy, gate, act)
    assert_close("dz", act_grad(dy, gate, act), act_grad_reference(dy.double(), gate.double(), act), stock=stock)
    oracle = act_grad_reference(dy.double(), gate.double(), act, residual.double())
    assert_close("dz", act_grad(dy, gate, act, residual), oracle)
    one = torch.ones((), dtype=dtype, device=DEVICE).expand(dy.shape)  # the gradient of a sum
    assert_close("dz", act_grad(one, gate, act), slope_reference(gate.double(), act))


@pytest.mark.parametrize("wants", ["scale", "x", "residual"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_affine_act_keeps_and_returns_what_is_wanted(act, wants):
    g = torch.Generator().manual_seed(5)
    x, residual = (random_map(1, 8, 5, 6, torch.float32, g) for _ in range(2))
    scale, shift = channel_vectors(8, torch.float32, g)
    leaves = {"x": x, "scale": scale, "shift": shift, "residual": residual}
    leaves[wants].requires_grad_()
    y = affine_act(*leaves.values(), act)
    dy = random_map(1, 8, 5, 6, torch.float32, g)
    (result,) = torch.autograd.grad(y, leaves[wants], dy)
    wide = {name: t.detach().double() for name, t in leaves.items()}
    wide[wants].requires_grad_()
    (oracle,) = torch.autograd.grad(affine_act_reference(*wide.values(), act), wide[wants], dy.double())
    assert_close(wants, result, oracle)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    tile=st.sampled_from([(4, 8, 4), (2, 16, 8), (1, 16, 8), (16, 16, 16)]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    act=st.sampled_from(ACTIVATIONS),
)
def test_any_size(monkeypatch, sizes, tile, layouts, act):
    """Several tiles, each map laid out in its own way."""
    monkeypatch.setattr(pointwise, "tile_shape", lambda *sizes: tile)
    g = torch.Generator().manual_seed(sum(sizes))
    guard = Guarded()
    x, dy = (LAYOUTS[name](random_map(*sizes, torch.float32, g), guard) for name in layouts[:2])
    out = LAYOUTS[layouts[2]](torch.full_like(x, float("nan")), guard)
    scale, shift = channel_vectors(sizes[1], torch.float32, g)
    launch_forward(x, out, act, residual=dy)
    assert_close("y", out, affine_act_reference(x.double(), None, None, dy.double(), act))
    z = affine_act_reference(x.double(), scale.double(), shift.double(), None, "none")
    sums = launch_backward(dy, act, x=x, scale=scale, shift=shift, dx=out, sums=True)
    assert sums is not None
    dz = dy.double() * slope_reference(z, act)
    assert_close("dx", out, dz * scale.double().reshape(-1, 1, 1))
    assert_sum_close("dscale", sums[0], dz * x.double())
    assert_sum_close("dshift", sums[1], dz)
    guard.check()


def test_sums_over_many_pixels(monkeypatch):
    """Terms of one sign over 2^16 pixels, which one float32 sum after another would not hold."""
    monkeypatch.setattr(pointwise, "tile_shape", lambda *sizes: (16, 64, 4))  # the interpreter adds rows one by one
    x = random_map(1, 4, 256, 256, torch.bfloat16, torch.Generator().manual_seed(6)).abs()
    sums = launch_backward(x, "none", x=x, dx=None, sums=True)
    assert sums is not None
    assert_close("dscale", sums[0], x.double().square().sum((0, 2, 3)))
    assert_close("dshift", sums[1], x.double().sum((0, 2, 3)))


def test_fold_joins_what_adjoins():
    dense = torch.zeros(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    inner = torch.zeros(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)[:, :, 2:7, 1:7]
    assert fold(dense, dense, channels=True) == ((1, 1, 1, 2 * 5 * 6 * 2), [(0, 0, 0)] * 2, 4)
    assert fold(dense, channels=False) == ((1, 1, 60, 2), [(0, 0, 2)], 4)
    assert fold(dense, channels=False, images=False) == ((2, 1, 30, 2), [(60, 0, 2)], 4)
    assert fold(inner, channels=True) == ((2, 5, 1, 12), [(162, 18, 0)], 4)
    assert fold(dense, None, inner, channels=False) == ((2, 5, 6, 2), [(60, 12, 2), (0, 0, 0), (162, 18, 2)], 4)
    assert fold(inner[:, :, 1::2], channels=True)[0] == (2, 2, 1, 12)
    assert fold(inner[..., ::2], channels=True)[0] == (2, 5, 3, 2)
    assert fold(inner[:, 1:4], channels=True) == ((2, 5, 6, 3), [(648, 72, 8)], 1)


def test_order_of_programs(monkeypatch):
    monkeypatch.setattr(pointwise, "tile_shape", lambda *sizes: (4, 4, 8))
    g = torch.Generator().manual_seed(7)
    x, residual, dy = (random_map(1, 12, 7, 6, torch.bfloat16, g) for _ in range(3))
    scale, shift = channel_vectors(12, torch.float32, g)
    y = affine_act(x, scale, shift, residual, "relu")
    assert_order_free(
        lambda: (
            affine_act(x, scale, shift, residual, "relu"),
            *affine_act_backward(dy, x, scale, shift, residual, y, "relu", True, True),
            add_act(x, residual, "gelu"),
        )
    )


def test_planted_errors():
    """What the checks above must see, they see."""
    g = torch.Generator().manual_seed(8)
    x, residual = (random_map(1, 16, 9, 8, torch.bfloat16, g) for _ in range(2))
    oracle = affine_act_reference(x.double(), None, None, residual.double(), "silu")
    y = add_act(x, residual, "silu")
    assert_close("y", y, oracle)
    with pytest.raises(AssertionError):  # the sum rounded to bfloat16 before the activation
        rounded = affine_act_reference((x + residual).float(), None, None, None, "silu").bfloat16()
        assert_close("y", rounded, oracle, stock=y)
    with pytest.raises(AssertionError):  # an activation's approximation
        assert_close("y", F.gelu(x.double(), approximate="tanh").float(), F.gelu(x.double()))
    guard = Guarded()
    short = guard.empty(1, 16, 8, 8, dtype=torch.bfloat16)
    launch_forward(x, short.as_strided(x.shape, x.stride()), "relu", residual=residual)
    with pytest.raises(AssertionError, match="were written"):
        guard.check()
    with pytest.raises(AssertionError, match="not finite"):  # a row read beyond the window
        inner = window_of(x, guard)
        out = torch.empty_like(x)
        launch_forward(inner.as_strided(x.shape, inner.stride(), inner.storage_offset() + inner.stride(2)), out, "relu")
        assert_close("y", out, x.double().relu())
    scale, shift = channel_vectors(16, torch.float32, g)
    _, _, dscale, _ = affine_act_backward(x, x, scale, shift, None, None, "none", True, False)
    with pytest.raises(AssertionError):  # one pixel's term missing from a sum
        terms = x.double().square()
        terms[..., -1, -1] = 0
        assert_close("dscale", dscale, terms.sum((0, 2, 3)))


def test_gradcheck_and_opcheck():
    g = torch.Generator().manual_seed(9)
    x, residual = (random_map(1, 2, 3, 2, torch.float64, g).requires_grad_() for _ in range(2))
    scale, shift = (t.requires_grad_() for t in channel_vectors(2, torch.float64, g))
    for act in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *t, a=act: affine_act(*t, a), (x, scale, shift, residual))
    for act in ("none", "relu6", "gelu"):
        assert torch.autograd.gradcheck(lambda *t, a=act: add_act(*t, a), (x, residual))
    torch.library.opcheck(add_act, (x, residual, "silu"))
    torch.library.opcheck(affine_act, (x, scale, shift, residual, "relu"))
    flat = [t.detach() for t in (x, x, scale, shift)]
    torch.library.opcheck(act_grad, (flat[0], flat[1], "relu"))
    torch.library.opcheck(affine_act_backward, (*flat, None, None, "silu", True, True))


def test_errors():
    x = torch.zeros(1, 4, 6, 6, device=DEVICE)
    one = torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        add_act(x, x, "tanh")
    with pytest.raises(ValueError, match="give maps of one size"):
        add_act(x, x[:, :, 1:], "relu")
    with pytest.raises(ValueError, match="give maps of one size"):
        act_grad(x, x[:, :2], "relu")
    with pytest.raises(ValueError, match="one number per channel"):
        affine_act(x, one[:3], one, None, "relu")


def test_empty_maps():
    x = torch.zeros(0, 4, 6, 6, device=DEVICE)
    one = torch.ones(4, device=DEVICE)
    assert affine_act(x, one, one, x, "silu").shape == x.shape
    assert affine_act_backward(x, x, one, one, x, None, "silu", True, False)[2].tolist() == [0.0] * 4
