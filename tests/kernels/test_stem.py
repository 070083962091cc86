"""The fused stem and its backward against a float64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map

from gigamorph.kernels import stem_kernels, stem_reference, tiles
from gigamorph.kernels.choice import override
from gigamorph.kernels.stem import stem, stem_and_spots, stem_gradients
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
    "3x3": (3, 24, 3, 2, (1, 0, 1, 1), None),
    "patchify": (3, 33, 4, 4, (0, 0, 0, 0), None),
    "3x3 dense, pooled": (1, 16, 3, 1, (1, 1, 1, 1), (0, 1, 1, 0)),
}
BOUNDS = (-0.75, 0.875)  # some pixels lie beyond either


def pixels(n, c, h, w, kind, generator):
    """Pixels inside a larger buffer, whose rest would spoil a result."""
    outer = torch.full((n, c, h + 4, w + 6), math.nan if kind.is_floating_point else 255, dtype=torch.float64)
    outer[..., 2:-2, 3:-3] = torch.randint(0, 256, (n, c, h, w), generator=generator)
    integer = {torch.uint16: torch.int32, torch.int16: torch.int32}.get(kind, kind)
    outer = outer.to(integer)
    if kind in (torch.uint16, torch.int16):
        outer = (outer * 257).to(torch.uint16)  # up to 65535: the sign bit is in use
        outer = outer.view(kind)
    return outer.to(DEVICE)[..., 2:-2, 3:-3]


def problem(form, dtype, kind=torch.uint8, size=(14, 19), affine=True, seed=0, dense=None):
    """Arguments of `stem` from x to offset, whose normalised pixels and weights have few enough bits for TF32."""
    c, k, r = form[:3]
    g = torch.Generator().manual_seed(seed)
    x = pixels(2, c, *size, kind, g)
    wide = torch.promote_types(dtype, torch.float32)
    levels = 65792 if kind in (torch.uint16, torch.int16) else 256  # 257 * 256
    gain = torch.full((c,), 2 / levels, dtype=wide, device=DEVICE)
    offset = torch.linspace(-1, -0.75, c, dtype=wide, device=DEVICE)
    weight = random_map(k, c, r, r, dtype, g, 0.2)
    if dtype == torch.float32:
        weight = weight.to(torch.float16).float()
    scale, shift = (random_map(1, k, 1, 1, dtype, g).flatten() for _ in range(2))  # scales of both signs
    return x, weight, *((scale, shift) if affine else (None, None)), gain, offset


def window(form):
    return ConvGeometry.of((form[3],) * 2, form[4]), form[5]


def reference(*arguments):
    return stem_reference.stem_reference(Stem(*arguments))


def oracle(inputs, form, act):
    """y, its spots, and the gradients of weight, scale and shift for a dy, in float64; dy in the inputs' dtype."""
    x, *leaves, gain, offset = inputs
    wide = [None if t is None else t.double().requires_grad_() for t in leaves]
    # Normalised as the kernel does it, in float32, and rounded to the dtype of the weights.
    v = x.to(torch.uint16) if x.dtype == torch.uint16 else x.view(torch.uint16) if x.dtype == torch.int16 else x
    v = (v.to(gain.dtype) * gain.reshape(-1, 1, 1) + offset.reshape(-1, 1, 1)).clamp(*BOUNDS).to(leaves[0].dtype)
    call = (v.double(), *wide, None, None, -math.inf, math.inf, *window(form), act)
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
    x, weight, scale, shift, gain, offset = inputs
    y_oracle, spots_oracle, dy, grads = oracle(inputs, form, act)
    guarded = Guarded()
    given_ = (None if t is None else guarded(t) for t in (weight, scale, shift, gain, offset))
    whole = Stem(x, *given_, *BOUNDS, *window(form), act)
    y = guarded.empty(*y_oracle.shape, dtype=weight.dtype)
    spots, around = guarded_spots(y.shape)
    stem_forward(whole, y, spots)
    if weight.dtype == torch.float64:  # with fewer bits, nearly equal positions may change places
        assert torch.equal(spots, spots_oracle)
    assert (around == 77).sum() == around.numel() - spots.numel()
    stock = reference(*inputs, *BOUNDS, *window(form), act)
    assert_close("y", y, y_oracle, tf32=weight.dtype == torch.float32, stock=stock)

    wide = torch.promote_types(weight.dtype, torch.float32)
    sums = [
        guarded(torch.ones(t.shape, dtype=wide, device=DEVICE))
        for t in (weight, weight[:, 0, 0, 0], weight[:, 0, 0, 0])
    ]
    stem_backward(whole, guarded(dy), spots, sums[0], dscale=sums[1], dshift=sums[2])
    guarded.check()
    for name, total, grad in zip(("dweight", "dscale", "dshift"), sums, grads, strict=False):
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


def test_float32_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(problem(RESNET, torch.float32), RESNET)


@pytest.mark.parametrize("kind", [torch.uint16, torch.int16, torch.float32, torch.float16, torch.bfloat16])
def test_kinds_of_pixels(kind):
    check(problem(RESNET, torch.float64, kind), RESNET)


@pytest.mark.parametrize("act", ["none", "relu6"])
@pytest.mark.parametrize("form", ["7x7 grey", "3x3"])
def test_other_activations_without_affine(act, form):
    check(problem(FORMS[form], torch.float64, affine=False), FORMS[form], act)


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
    call = (*rest, *BOUNDS, *window(RESNET), "relu")
    assert torch.equal(stem(inside_out, *call), stem(x, *call))


def test_no_normalisation_and_clamp_alone():
    x, weight, scale, shift, *_ = problem(RESNET, torch.float64, torch.float32)
    for low, high in ((-math.inf, math.inf), (20.0, 200.0), (-math.inf, 100.0)):
        call = (weight, scale, shift, None, None, low, high, *window(RESNET), "relu")
        assert_close("y", stem(x, *call), reference(x, *call))


@settings(max_examples=5, deadline=None)
@given(
    c=st.sampled_from([1, 3]),
    k=st.integers(1, 24),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    pool=st.none() | st.tuples(*[st.integers(0, 1)] * 4),
    h=st.integers(9, 14),
    w=st.integers(9, 20),
)
def test_random_sizes(c, k, kernel, stride, padding, pool, h, w):
    form = (c, k, kernel, stride, padding, pool)
    check(problem(form, torch.float64, size=(h, w)), form)


def test_gradient_goes_to_the_first_maximum():
    """Equal conv outputs: PyTorch's order, row by row."""
    x = torch.ones(1, 1, 9, 9, dtype=torch.float64, device=DEVICE)
    x[..., 4:, 3:] = 2
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE).reshape(1, 1, 2, 2).requires_grad_()
    arguments = (None, None, None, None, -math.inf, math.inf, ConvGeometry(), (1, 1, 1, 1), "none")
    x[0, 0, 1::2, 1::2] += (
        torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE) / 9
    )
    dy = torch.arange(16.0, dtype=torch.float64, device=DEVICE).reshape(1, 1, 4, 4)
    (mine,) = torch.autograd.grad(stem(x, weight, *arguments), weight, dy)
    (theirs,) = torch.autograd.grad(reference(x, weight, *arguments), weight, dy)
    assert_close("dweight", mine, theirs)


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
def test_spots_of_equal_values(act):
    """Windows in which many outputs are equal, at borders and inside; stock's spots are the same."""
    g = torch.Generator().manual_seed(5)
    x = torch.randint(-2, 8, (2, 1, 11, 14), generator=g).double().to(DEVICE)
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64, device=DEVICE).reshape(2, 1, 1, 1)
    for pool in ((1, 1, 1, 0), None):
        call = (x, weight, None, None, None, None, -math.inf, math.inf, ConvGeometry(), pool, act)
        y, spots = stem_and_spots(*call, True)
        expected = stem_reference.stem_spots_reference(Stem(*call))
        assert torch.equal(y, expected[0]) and torch.equal(spots, expected[1])
        assert act == "none" or (spots == stem_reference.NO_SPOT).any()
        dy = random_map(*y.shape, torch.float64, g)
        with override("stock"):
            assert torch.equal(stem_and_spots(*call, True)[1], spots)
            theirs = stem_gradients(dy, spots, *call)
        for mine, their in zip(stem_gradients(dy, spots, *call), theirs, strict=True):
            assert_close("gradient", mine, their)


def test_order_of_programs(monkeypatch):
    form = (1, 20, 3, 2, (1, 1, 1, 1), (1, 1, 1, 1))
    inputs = problem(form, torch.float32)
    _, _, dy, _ = oracle(inputs, form, "relu")
    small_tiles(monkeypatch)
    call = (*inputs, *BOUNDS, *window(form), "relu")
    y, spots = stem_and_spots(*call, True)
    assert_order_free(lambda: (*stem_and_spots(*call, True), *stem_gradients(dy, spots, *call)))
    assert torch.equal(stem(*call), y)  # nothing but y is written


@pytest.mark.parametrize("mistake", ["offset", "padding", "pool", "pixel", "scale"])
def test_mistakes_are_seen(mistake):
    inputs = list(problem(RESNET, torch.bfloat16))
    y, _, dy, grads = oracle(inputs, RESNET, "relu")
    geometry, pool_padding = window(RESNET)
    if mistake == "offset":
        inputs[5] = inputs[5] + 0.01
    elif mistake == "padding":
        # Zeros beyond the image before normalisation, in place of after it.
        inputs[0] = torch.nn.functional.pad(inputs[0], [3, 3, 3, 3])
        geometry = ConvGeometry.of((2, 2))
    elif mistake == "pool":
        inputs[0], pool_padding = torch.nn.functional.pad(inputs[0], [4, 0, 4, 0]), (0, 1, 0, 1)
    elif mistake == "pixel":
        inputs[0] = inputs[0].clone()
        inputs[0][0, 0, 10, 10] += 128
    else:
        inputs[2] = inputs[2].clone()
        inputs[2][3] *= 1.1
    call = (*inputs, *BOUNDS, geometry, pool_padding, "relu")
    with pytest.raises(AssertionError):
        assert_close("y", stem(*call), y)
    _, spots = stem_and_spots(*call, True)
    if mistake != "pool":
        with pytest.raises(AssertionError):
            assert_close("dweight", stem_gradients(dy, spots, *call)[0], grads[0], dtype=torch.bfloat16)


@pytest.mark.parametrize("pool", [None, (1, 0, 0, 1)])
def test_gradcheck(pool):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 1, 7, 8, generator=g, dtype=torch.float64).to(DEVICE)
    weight = torch.randn(3, 1, 3, 3, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    scale, shift = (torch.randn(3, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_() for _ in range(2))
    gain, offset = (torch.tensor([v], dtype=torch.float64, device=DEVICE) for v in (0.7, 0.1))

    def run(weight, scale, shift):
        return stem(
            x, weight, scale, shift, gain, offset, -1.5, 1.5, ConvGeometry.of((2, 2), (1, 0, 1, 1)), pool, "relu"
        )

    assert torch.autograd.gradcheck(run, (weight, scale, shift), fast_mode=True)


def test_operator():
    form = (1, 4, 3, 2, (1, 1, 1, 1), (1, 1, 1, 1))
    x, *leaves, gain, offset = problem(form, torch.float32, torch.float32, size=(9, 11))
    leaves = [t.requires_grad_() for t in leaves]
    call = (x, *leaves, gain, offset, *BOUNDS, *window(form), "relu")
    torch.library.opcheck(stem_and_spots, (*call, True))
    with torch.no_grad():
        y, spots = stem_and_spots(*call, False)
        assert not spots.numel()
        _, spots = stem_and_spots(*call, True)
        torch.library.opcheck(stem_gradients, (y, spots, *call))


def test_refusals():
    inputs = problem(RESNET, torch.float32)
    geometry, pool_padding = window(RESNET)
    with pytest.raises(ValueError, match="is not monotonic"):
        stem(*inputs, *BOUNDS, geometry, pool_padding, "silu")
    with pytest.raises(ValueError, match="together, or neither"):
        stem(*inputs[:5], None, *BOUNDS, geometry, pool_padding, "relu")
    with pytest.raises(ValueError, match="0 or 1"):
        stem(*inputs, *BOUNDS, geometry, (2, 1, 1, 1), "relu")
    with pytest.raises(ValueError, match="stem_reference"):
        image = torch.zeros(1, 1, 9, 9, device=DEVICE).requires_grad_()
        stem(image, *inputs[1:], *BOUNDS, geometry, pool_padding, "relu").sum().backward()
    with pytest.raises(ValueError, match="keep=True"):
        inputs[1].requires_grad_()
        stem_and_spots(*inputs, *BOUNDS, geometry, pool_padding, "relu", False)[0].sum().backward()
    with pytest.raises(ValueError, match=r"pixels have . channels"):
        stem(inputs[0].expand(-1, 3, -1, -1), *inputs[1:], *BOUNDS, geometry, pool_padding, "relu")
