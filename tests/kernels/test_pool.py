"""Max-pooling, bit by bit as PyTorch pools."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, poisoned, random_map
from kernel_checks import max_pool2d as with_gradients
from kernel_references import max_pool2d_backward_reference
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import pool
from gigamorph.kernels.pool import (
    launch_max_pool2d,
    launch_max_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
    max_pool2d_reference,
)
from gigamorph.kernels.windows import ConvGeometry

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# kernel; stride, (top, bottom, left, right), dilation
PLACES = [
    ((3, 3), ConvGeometry.of((2, 2), (1, 1, 1, 1), (1, 1))),
    ((3, 3), ConvGeometry.of((2, 2), (0, 1, 1, 0), (1, 1))),
    ((2, 2), ConvGeometry.of((2, 2), (0, 0, 0, 0), (1, 1))),
    ((5, 5), ConvGeometry.of((1, 1), (2, 2, 2, 2), (1, 1))),
    ((3, 2), ConvGeometry.of((1, 3), (2, 0, 0, 1), (2, 1))),
    ((2, 3), ConvGeometry.of((3, 2), (1, 0, 3, 2), (1, 2))),
    ((1, 1), ConvGeometry.of((2, 2), (0, 0, 0, 0), (1, 1))),
    ((2, 2), ConvGeometry.of((3, 3), (1, 1, 0, 2), (3, 2))),
]


def tied_map(n: int, c: int, h: int, w: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A ReLU's output of few values: most windows hold their maximum twice, many are zero all over."""
    return random_map(n, c, h, w, torch.float64, generator).round().relu().to(dtype)


def window_of(x: Tensor, guard: Guarded) -> Tensor:
    """A copy of x as a window of a larger guarded buffer, whose rest is NaN."""
    n, c, h, w = x.shape
    around = guard.empty(n, c, h + 3, w + 5, dtype=x.dtype)
    window = around[:, :, 1:-2, 2:-3]
    window.copy_(x)
    return window


def guarded_taps(n: int, c: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Taps filled with 77 inside a longer buffer of 77, and that buffer."""
    buffer = torch.full((n * h * w * c + 512,), 77, dtype=torch.uint8, device=DEVICE)
    return buffer[256:-256].view(n, h, w, c).permute(0, 3, 1, 2), buffer


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_value_and_gradient(place, dtype):
    g = torch.Generator().manual_seed(1)
    x = tied_map(2, 12, 9, 11, dtype, g)
    guard = Guarded()
    n, c, oh, ow = max_pool2d_reference(x.double(), *place).shape
    y = guard.empty(n, c, oh, ow, dtype=dtype)
    xw = window_of(x, guard)
    launch_max_pool2d(xw, *place, y=y)
    assert torch.equal(y.double(), max_pool2d_reference(x.double(), *place))

    dy = random_map(n, c, oh, ow, dtype, g)
    taps, around = guarded_taps(n, c, oh, ow)
    dx = guard.empty(*x.shape, dtype=dtype)
    launch_max_pool2d(xw, *place, taps=taps)
    launch_max_pool2d_backward(window_of(dy, guard), taps, dx, *place)
    if dtype in (torch.float64, torch.float32):
        assert torch.equal(dx.cpu(), max_pool2d_backward_reference(dy.cpu(), x.cpu(), *place))
    assert_close("dx", dx, max_pool2d_backward_reference(dy.double(), x.double(), *place))
    guard.check()
    assert (around[:256] == 77).all() and (around[-256:] == 77).all()


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_several_tiles(place, monkeypatch):
    """Tiles that divide neither rows nor columns nor channels; in the interpreter one tile holds a small map."""
    monkeypatch.setattr(pool, "pool_tile", lambda *sizes: (4, 4, 4))
    g = torch.Generator().manual_seed(10)
    x = tied_map(1, 6, 7, 6, torch.float32, g)
    y = max_pool2d(x, *place)
    dy = random_map(*y.shape, torch.float32, g)
    assert torch.equal(y, max_pool2d_reference(x, *place))
    expected = max_pool2d_backward_reference(dy.cpu(), x.cpu(), *place)
    assert torch.equal(max_pool2d_backward(dy, x, *place).cpu(), expected)


@pytest.mark.parametrize("act", ["relu", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slope_of_the_activation_that_made_x(act, dtype):
    g = torch.Generator().manual_seed(2)
    place = PLACES[0]
    x = (tied_map(2, 8, 10, 7, dtype, g) * 3).clamp(max=6)
    y = max_pool2d(x, *place)
    dy = random_map(*y.shape, dtype, g)
    dx = max_pool2d_backward(dy, x, *place, act)
    oracle = max_pool2d_backward_reference(dy.double(), x.double(), *place, act)
    assert_close("dx", dx, oracle)
    assert (oracle == 0).sum() > (max_pool2d_backward_reference(dy.double(), x.double(), *place) == 0).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(3, 2, 1, 1), (3, 1, 1, 2), (2, 2, 0, 1), (4, 3, 2, 1)], ids=str)
def test_nan_and_minus_infinity_as_in_pytorch(case, dtype):
    """The last NaN of a window is its maximum; a window of -inf gives its gradient to its first pixel."""
    kernel, stride, pad, dilation = case
    place = (kernel,) * 2, ConvGeometry.of((stride,) * 2, (pad,) * 4, (dilation,) * 2)
    g = torch.Generator().manual_seed(3)
    x = random_map(1, 16, 11, 9, dtype, g)
    x[torch.rand(x.shape, generator=g) < 0.1] = float("nan")
    x[torch.rand(x.shape, generator=g) < 0.6] = float("-inf")
    x[0, :4] = float("-inf")
    stock = x.cpu().clone().requires_grad_()
    expected = F.max_pool2d(stock, kernel, stride, pad, dilation)
    dy = torch.randint(1, 9, expected.shape, generator=g).to(dtype)
    expected.backward(dy)
    y = max_pool2d(x, *place)
    assert same(y.cpu(), expected.detach())
    assert torch.equal(max_pool2d_backward(dy.to(DEVICE), x, *place).cpu(), stock.grad)


def test_strided_pixels_and_one_channel():
    """Every second column of a buffer, channels that are no multiple of 16 bytes, and a map of one channel."""
    g = torch.Generator().manual_seed(4)
    place = PLACES[1]
    for c in (1, 3, 24):
        x = tied_map(2, c, 9, 20, torch.float32, g)[:, :, :, 1::2]
        y = max_pool2d(x, *place)
        dy = random_map(*y.shape, torch.float32, g)
        assert torch.equal(y, max_pool2d_reference(x, *place))
        expected = max_pool2d_backward_reference(dy.cpu(), x.cpu(), *place)
        assert torch.equal(max_pool2d_backward(dy, x, *place).cpu(), expected)
        nchw = max_pool2d_backward(dy.contiguous(), x.contiguous(), *place)
        assert torch.equal(nchw.cpu(), expected)


def test_padding_beyond_the_window():
    """Windows that lie in the padding are -inf and give no gradient."""
    x = random_map(1, 4, 3, 3, torch.float32, torch.Generator().manual_seed(5))
    place = (2, 2), ConvGeometry.of((2, 2), (4, 4, 2, 3))
    y = max_pool2d(x, *place)
    assert torch.equal(y, max_pool2d_reference(x, *place)) and (y == float("-inf")).any()
    dx = max_pool2d_backward(torch.ones_like(y), x, *place)
    assert dx.sum() == (y > float("-inf")).sum()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tile=st.sampled_from([(8, 4, 8), (4, 8, 4), (16, 16, 8)]),
)
def test_any_place(monkeypatch, sizes, kernel, stride, padding, dilation, tile):
    n, c, h, w = sizes
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if h + padding[0] + padding[1] < reach[0] or w + padding[2] + padding[3] < reach[1]:
        return
    monkeypatch.setattr(pool, "pool_tile", lambda *sizes: tile)
    place = kernel, ConvGeometry.of(stride, padding, dilation)
    g = torch.Generator().manual_seed(sum(sizes))
    x = tied_map(n, c, h, w, torch.float32, g)
    y = max_pool2d(x, *place)
    assert torch.equal(y, max_pool2d_reference(x, *place))
    dy = random_map(*y.shape, torch.float32, g)
    expected = max_pool2d_backward_reference(dy.cpu(), x.cpu(), *place)
    assert torch.equal(max_pool2d_backward(dy, x, *place).cpu(), expected)


def test_order_of_programs(monkeypatch):
    monkeypatch.setattr(pool, "pool_tile", lambda *sizes: (2, 4, 4))
    g = torch.Generator().manual_seed(6)
    x = tied_map(1, 6, 7, 8, torch.bfloat16, g)
    place = PLACES[0]
    dy = random_map(1, 6, 4, 4, torch.bfloat16, g)
    assert_order_free(lambda: (max_pool2d(x, *place), max_pool2d_backward(dy, x, *place)))


def test_planted_errors():
    """What the checks above must see, they see."""
    g = torch.Generator().manual_seed(7)
    place = PLACES[0]
    x = tied_map(1, 8, 9, 11, torch.float32, g).cpu()
    dy = random_map(1, 8, 5, 6, torch.float32, g).cpu()
    dx = max_pool2d_backward_reference(dy, x, *place)
    # The last maximum in place of the first.
    last = max_pool2d_backward_reference(dy.flip(2, 3), x.flip(2, 3), *place).flip(2, 3)
    assert not torch.equal(last, dx)
    # Every maximum in place of the first: what an equality with y would give.
    windows = F.unfold(F.pad(x, (1, 1, 1, 1)), 3, stride=2).view(8, 9, -1)
    assert (windows == windows.amax(1, keepdim=True)).sum() > 2 * dy.numel()
    # Padding one row off.
    taps, _ = guarded_taps(1, 8, 5, 6)
    off = torch.empty_like(x).to(DEVICE)
    launch_max_pool2d(x.to(DEVICE), *place, taps=taps)
    launch_max_pool2d_backward(dy.to(DEVICE), taps, off, place[0], place[1]._replace(top=0))
    assert not torch.equal(off.cpu(), dx)
    # Windows added in another order.
    wide = (5, 5), ConvGeometry.of(padding=(2, 2, 2, 2))
    dy = random_map(1, 8, 9, 11, torch.float32, g).cpu()
    turned = max_pool2d_backward_reference(dy.double(), x.double(), *wide).float()
    assert not torch.equal(turned, max_pool2d_backward_reference(dy, x, *wide))
    # A gradient written one row too far.
    guard = Guarded()
    short = guard.empty(1, 8, 8, 11, dtype=torch.float32)
    long = short.as_strided((1, 8, 9, 11), short.stride())
    launch_max_pool2d_backward(dy[:, :, :5, :6].to(DEVICE), taps, long, *place)
    with pytest.raises(AssertionError, match="were written"):
        guard.check()


def test_gradcheck_and_opcheck():
    g = torch.Generator().manual_seed(8)
    x = random_map(1, 2, 4, 5, torch.float64, g).requires_grad_()
    for place in PLACES[:2]:
        assert torch.autograd.gradcheck(lambda t, p=place: with_gradients(t, *p), (x,))
    x = x.detach()
    y = max_pool2d(x, *PLACES[0])
    torch.library.opcheck(max_pool2d, (x, *PLACES[0]))
    torch.library.opcheck(max_pool2d_backward, (y, x, *PLACES[0], "relu"))


def test_empty_maps():
    x = torch.zeros(0, 4, 6, 6, device=DEVICE)
    with poisoned():
        assert max_pool2d(x, *PLACES[0]).shape == (0, 4, 3, 3)
        assert max_pool2d_backward(torch.zeros(0, 4, 3, 3, device=DEVICE), x, *PLACES[0]).shape == x.shape


def test_errors():
    x = torch.zeros(1, 4, 6, 6, device=DEVICE)
    with pytest.raises(ValueError, match="more than 255 taps"):
        max_pool2d(x, (16, 16), ConvGeometry.of(padding=(8, 8, 8, 8)))
    with pytest.raises(ValueError, match="larger than the map"):
        max_pool2d(x, (9, 9), ConvGeometry.of(padding=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="silu"):
        max_pool2d_backward(x[:, :, :3, :3], x, *PLACES[0], "silu")
    with pytest.raises(ValueError, match="must have the shape of the output"):
        max_pool2d_backward(x, x, *PLACES[0])
