"""The fused stem and its backward against a float64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map

from gigamorph.kernels import stem_kernels, stem_reference, tiles
from gigamorph.kernels.choice import override
from gigamorph.kernels.stem import stem, stem_gradients
from gigamorph.kernels.stem_kernels import stem_backward, stem_forward
from gigamorph.kernels.stem_reference import Stem
from gigamorph.kernels.tiles import StemTile
from gigamorph.kernels.windows import ConvGeometry

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# channels, filters, kernel, stride, padding, pool padding
RESNET = (1, 20, 7, 2, (3, 3, 3, 3), (1, 1, 1, 1))
FORMS = {
    "7x7 grey": RESNET,
    "7x7 colour": (3, 24, 7, 2, (3, 3, 3, 3), (1, 1, 1, 1)),
    "7x7 corner": (1, 16, 7, 2, (3, 0, 0, 3), (1, 0, 0, 1)),
    "3x3": (3, 24, 3, 2, (1, 0, 1, 1), (0, 0, 0, 0)),
    "patchify": (3, 33, 4, 4, (0, 0, 0, 0), (1, 1, 1, 1)),
    "3x3 dense": (1, 16, 3, 1, (1, 1, 1, 1), (0, 1, 1, 0)),
}


def pixels(n, c, h, w, kind, generator):
    """Multiples of 2^-7 between -1 and 1, inside a larger buffer, whose rest would spoil a result."""
    outer = torch.full((n, c, h + 4, w + 6), math.nan, dtype=torch.float64)
    outer[..., 2:-2, 3:-3] = torch.randint(-128, 128, (n, c, h, w), generator=generator) / 128
    return outer.to(kind).to(DEVICE)[..., 2:-2, 3:-3]


def problem(form, dtype, kind=None, size=(14, 19), shifted=True, seed=0):
    """x, weight and shift of `stem`; pixels and weights have few enough bits for TF32."""
    c, k, r = form[:3]
    g = torch.Generator().manual_seed(seed)
    x, weight = pixels(2, c, *size, kind or dtype, g), random_map(k, c, r, r, dtype, g, 0.2)
    if dtype == torch.float32:
        weight = weight.to(torch.float16).float()
    return x, weight, random_map(1, k, 1, 1, dtype, g).flatten() if shifted else None


def window(form):
    return ConvGeometry.of((form[3],) * 2, form[4]), form[5]


def reference(*arguments):
    return stem_reference.stem_reference(Stem(*arguments))


def oracle(inputs, form, act):
    """y, its spots, and the gradients of weight and shift for a dy, in float64; dy in the inputs' dtype."""
    x, *leaves = inputs
    wide = [None if t is None else t.double().requires_grad_() for t in leaves]
    call = (x.to(leaves[0].dtype).double(), *wide, *window(form), act)
    y = reference(*call)
    g = torch.Generator().manual_seed(1)
    dy = random_map(*y.shape, leaves[0].dtype, g)
    if dy.dtype == torch.float32:
        dy = dy.to(torch.float16).float()
    grads = torch.autograd.grad(y, [t for t in wide if t is not None], dy.double())
    spots = stem_reference.stem_spots_reference(Stem(*call))[1]
    return y.detach(), spots, dy.contiguous(memory_format=torch.channels_last), grads


def guarded_spots(shape):
    """Room for spots amid bytes of 77, and all of it."""
    around = torch.full((shape[0], shape[2] + 2, shape[3] + 2, shape[1]), 77, dtype=torch.uint8, device=DEVICE)
    return around[:, 1:-1, 1:-1].permute(0, 3, 1, 2), around


def check(inputs, form, act="relu"):
    x, weight, shift = inputs
    y_oracle, spots_oracle, dy, grads = oracle(inputs, form, act)
    guarded = Guarded()
    given_ = (None if t is None else guarded(t) for t in (weight, shift))
    whole = Stem(x, *given_, *window(form), act)
    y = guarded.empty(*y_oracle.shape, dtype=weight.dtype)
    spots, around = guarded_spots(y.shape)
    stem_forward(whole, y, spots)
    if weight.dtype == torch.float64:  # with fewer bits, nearly equal positions may change places
        assert torch.equal(spots, spots_oracle)
    assert (around == 77).sum() == around.numel() - spots.numel()
    stock = reference(*inputs, *window(form), act)
    assert_close("y", y, y_oracle, tf32=weight.dtype == torch.float32, stock=stock)

    wide = torch.promote_types(weight.dtype, torch.float32)
    sums = [guarded(torch.ones(t.shape, dtype=wide, device=DEVICE)) for t in (weight, weight[:, 0, 0, 0])]
    stem_backward(whole, guarded(dy), spots, *sums)
    guarded.check()
    for name, total, grad in zip(("dweight", "dshift"), sums, grads, strict=False):
        # What was in the buffer is still there; errors of the sum are those of its terms' magnitude.
        tf32 = weight.dtype == torch.float32
        assert_close(name, total - 1, grad, tf32=tf32, dtype=None if tf32 else weight.dtype)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(f, d) for f in FORMS for d in DTYPES if d in (torch.float64, torch.bfloat16) or f == "7x7 grey"],
    ids=str,
)
def test_values(dtype, form):
    check(problem(FORMS[form], dtype), FORMS[form])


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("form", ["7x7 grey", "3x3", "patchify"])
def test_nan_and_infinity_as_in_pytorch(form, act):
    """The maximum of a window with NaN is its last NaN, in the image or in a filter."""
    x, weight, shift = problem(FORMS[form], torch.float64)
    x[0, 0, 3, 4], x[1, 0, 5, 9], x[1, 0, 9, 14] = math.nan, math.inf, -math.inf
    weight[3, 0, 1, 1] = math.nan
    call = (x, weight, shift, *window(FORMS[form]), act)
    expected, spots_expected = stem_reference.stem_spots_reference(Stem(*call))
    assert 0 < expected.isnan().sum() < expected.numel()
    y = torch.empty_like(expected, memory_format=torch.channels_last)
    spots, _ = guarded_spots(expected.shape)
    stem_forward(Stem(*call), y, spots)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.equal(spots, spots_expected)


def test_float32_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(problem(RESNET, torch.float32), RESNET)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_kinds_of_pixels(kind):
    check(problem(RESNET, torch.float64, kind), RESNET)
    check(problem(RESNET, torch.bfloat16, kind), RESNET)


@pytest.mark.parametrize("act", ["none", "relu6"])
@pytest.mark.parametrize("form", ["7x7 grey", "3x3"])
def test_other_activations_without_shift(act, form):
    check(problem(FORMS[form], torch.float64, shifted=False), FORMS[form], act)


def small_tiles(monkeypatch):
    for name in ("stem_tile", "stem_backward_tile"):
        monkeypatch.setattr(stem_kernels, name, lambda *_: StemTile(16, 16, 16))


def test_several_strips_and_splits(monkeypatch):
    """Tiles as on a GPU: many programs, ragged in every direction."""
    small_tiles(monkeypatch)
    form = (2, 20, 3, 2, (1, 1, 1, 1), (1, 1, 1, 1))
    check(problem(form, torch.float64, size=(9, 36)), form)
    monkeypatch.setattr(tiles, "interpreting", lambda: False)  # strips of one row, a split per tile
    check(problem(form, torch.float64, size=(9, 36)), form)


def test_pixels_side_by_side():
    """An image as files hold it, (height, width, channels)."""
    x, *rest = problem(FORMS["7x7 colour"], torch.float32)
    inside_out = x.contiguous(memory_format=torch.channels_last)
    call = (*rest, *window(RESNET), "relu", False)
    assert torch.equal(stem(inside_out, *call)[0], stem(x, *call)[0])


@settings(max_examples=5, deadline=None)
@given(
    c=st.sampled_from([1, 3]),
    k=st.integers(1, 24),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    pool=st.tuples(*[st.integers(0, 1)] * 4),
    h=st.integers(15, 20),
    w=st.integers(15, 26),
)
def test_random_sizes(c, k, kernel, stride, padding, pool, h, w):
    form = (c, k, kernel, stride, padding, pool)
    check(problem(form, torch.float64, size=(h, w)), form)


def test_gradient_goes_to_the_first_maximum():
    """Equal conv outputs: PyTorch's order, row by row."""
    x = torch.ones(1, 1, 9, 9, dtype=torch.float64, device=DEVICE)
    x[..., 4:, 3:] = 2
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE).reshape(1, 1, 2, 2).requires_grad_()
    arguments = (None, ConvGeometry(), (1, 1, 1, 1), "none")
    x[0, 0, 1::2, 1::2] += (
        torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE) / 9
    )
    dy = torch.arange(16.0, dtype=torch.float64, device=DEVICE).reshape(1, 1, 4, 4)
    _, spots = stem(x, weight, *arguments, True)
    mine, _ = stem_gradients(dy, spots, x, weight, *arguments)
    (theirs,) = torch.autograd.grad(reference(x, weight, *arguments), weight, dy)
    assert_close("dweight", mine, theirs)


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
def test_spots_of_equal_values(act):
    """Windows in which many outputs are equal, at borders and inside; stock's spots are the same."""
    g = torch.Generator().manual_seed(5)
    x = torch.randint(-2, 8, (2, 1, 11, 14), generator=g).double().to(DEVICE)
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64, device=DEVICE).reshape(2, 1, 1, 1)
    call = (x, weight, None, ConvGeometry(), (1, 1, 1, 0), act)
    y, spots = stem(*call, True)
    expected = stem_reference.stem_spots_reference(Stem(*call))
    assert torch.equal(y, expected[0]) and torch.equal(spots, expected[1])
    assert act == "none" or (spots == stem_reference.NO_SPOT).any()
    dy = random_map(*y.shape, torch.float64, g)
    with override("stock"):
        assert torch.equal(stem(*call, True)[1], spots)
        theirs = stem_gradients(dy, spots, *call)
    for mine, their in zip(stem_gradients(dy, spots, *call), theirs, strict=True):
        assert_close("gradient", mine, their)


def test_order_of_programs(monkeypatch):
    form = (1, 20, 3, 2, (1, 1, 1, 1), (1, 1, 1, 1))
    inputs = problem(form, torch.float32)
    _, _, dy, _ = oracle(inputs, form, "relu")
    small_tiles(monkeypatch)
    call = (*inputs, *window(form), "relu")
    y, spots = stem(*call, True)
    assert_order_free(lambda: (*stem(*call, True), *stem_gradients(dy, spots, *call)))
    assert torch.equal(stem(*call, False)[0], y)  # nothing but y is written


@pytest.mark.parametrize("mistake", ["shift", "padding", "pool", "pixel", "weight"])
def test_mistakes_are_seen(mistake):
    inputs = list(problem(RESNET, torch.bfloat16))
    y, _, dy, grads = oracle(inputs, RESNET, "relu")
    geometry, pool_padding = window(RESNET)
    if mistake == "shift":
        inputs[2] = inputs[2] + 0.05
    elif mistake == "padding":
        # Other values than zeros beyond the image.
        inputs[0] = torch.nn.functional.pad(inputs[0], [3, 3, 3, 3], value=0.5)
        geometry = ConvGeometry.of((2, 2))
    elif mistake == "pool":
        inputs[0], pool_padding = torch.nn.functional.pad(inputs[0], [4, 0, 4, 0]), (0, 1, 0, 1)
    elif mistake == "pixel":
        inputs[0] = inputs[0].clone()
        inputs[0][0, 0, 10, 10] += 1
    else:
        inputs[1] = inputs[1].clone()
        inputs[1][3] *= 1.1
    call = (*inputs, geometry, pool_padding, "relu")
    found, spots = stem(*call, True)
    with pytest.raises(AssertionError):
        assert_close("y", found, y)
    if mistake in ("padding", "pixel"):
        with pytest.raises(AssertionError):
            assert_close("dweight", stem_gradients(dy, spots, *call)[0], grads[0], dtype=torch.bfloat16)


def test_operators():
    form = (1, 4, 3, 2, (1, 1, 1, 1), (1, 1, 1, 1))
    inputs = problem(form, torch.float32, torch.float32, size=(9, 11))
    call = (*inputs, *window(form), "relu")
    torch.library.opcheck(stem, (*call, True))
    y, spots = stem(*call, False)
    assert not spots.numel()
    _, spots = stem(*call, True)
    torch.library.opcheck(stem_gradients, (y, spots, *call))


def test_refusals():
    inputs = problem(RESNET, torch.float32)
    geometry, pool_padding = window(RESNET)
    with pytest.raises(ValueError, match="is not monotonic"):
        stem(*inputs, geometry, pool_padding, "silu", False)
    with pytest.raises(ValueError, match="0 or 1"):
        stem(*inputs, geometry, (2, 1, 1, 1), "relu", False)
    with pytest.raises(ValueError, match=r"pixels have . channels"):
        stem(inputs[0].expand(-1, 3, -1, -1), *inputs[1:], geometry, pool_padding, "relu", False)
