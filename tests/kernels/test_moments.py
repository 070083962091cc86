"""Moments of maps and their gradient: of windows, of tiles that merge, and out of a convolution's epilogue."""

import pytest
import torch
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, forced, random_map, window
from torch.nn import functional as F

from gigamorph.kernels import choice, stream
from gigamorph.kernels import conv2d as convolutions
from gigamorph.kernels import conv2d_forward as dense
from gigamorph.kernels.conv2d import conv2d_moments
from gigamorph.kernels.moments import (
    launch_moments_backward,
    moments,
    moments_backward,
    moments_backward_reference,
    moments_of_each,
    moments_reference,
)
from gigamorph.kernels.tiles import StreamConfig
from gigamorph.kernels.tuning import Config
from gigamorph.kernels.windows import ConvGeometry

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 24, 5, 7), (1, 130, 9, 3)]


def small_tiles(pixels: int, channels: int, most: int) -> StreamConfig:
    return StreamConfig(4, 16, 3, 4)


@pytest.fixture(params=["computed", "small tiles"])
def tiles(request, monkeypatch):
    """The configuration of the interpreter, and one with many programs, each of several tiles."""
    if request.param == "small tiles":
        monkeypatch.setattr(stream, "stream_config", small_tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1, 4, 5)], ids=str)
@pytest.mark.parametrize("place", ["guarded", "window", "contiguous"])
def test_moments(dtype, shape, place, tiles):
    x = random_map(*shape, dtype, torch.Generator().manual_seed(1), 2.0) + 1
    guarded = Guarded()
    given_ = {"guarded": guarded, "window": window, "contiguous": torch.Tensor.contiguous}[place](x)
    mean, m2 = moments(given_)
    guarded.check()
    oracle_mean, oracle_m2 = moments_reference(x.double())
    assert_close("mean", mean, oracle_mean)
    assert_close("m2", m2, oracle_m2)


@pytest.mark.parametrize("offset", [100.0, 10_000.0])
def test_moments_do_not_cancel(offset, tiles):
    """E[x^2] - E[x]^2 in float32 keeps no digit of the variance at an offset of 10,000."""
    x = random_map(1, 6, 20, 41, torch.float32, torch.Generator().manual_seed(2)) + offset
    _, oracle = moments_reference(x.double())
    _, m2 = moments(x)
    assert ((m2 - oracle) / oracle).abs().max() < 1e-8 * offset + 1e-6
    naive = x.square().sum((0, 2, 3)) - x.sum((0, 2, 3)).square() / (20 * 41)
    assert ((naive - oracle) / oracle).abs().max() > 1e-7 * offset


def test_moments_of_a_map_that_begins_constant(monkeypatch):
    """The background of a mammogram: a shift taken from the first pixels would be of no use."""
    monkeypatch.setattr(stream, "stream_config", small_tiles)
    x = random_map(1, 5, 12, 16, torch.float32, torch.Generator().manual_seed(3)) + 1000
    x[:, :, :7] = 0
    mean, m2 = moments(x)
    oracle_mean, oracle_m2 = moments_reference(x.double())
    assert_close("mean", mean, oracle_mean)
    assert_close("m2", m2, oracle_m2)


@pytest.mark.parametrize("mode", ["triton", "stock"])
def test_moments_of_each_image(mode):
    x = random_map(3, 7, 5, 4, torch.float64, torch.Generator().manual_seed(5)) + 1
    with choice.override(mode):
        means, m2s = moments_of_each(x)
    for image, mean, m2 in zip(x.split(1), means, m2s, strict=True):
        for name, result, oracle in zip(("mean", "m2"), (mean, m2), moments_reference(image), strict=True):
            assert_close(name, result, oracle)


# -- gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_", ["both", "dvar", "addend"])
@pytest.mark.parametrize("place", ["guarded", "window"])
def test_backward(dtype, given_, place, tiles):
    generator = torch.Generator().manual_seed(6)
    x, addend = (random_map(2, 24, 5, 7, dtype, generator, 2.0) for _ in range(2))
    mean, dmean, dvar = (torch.randn(24, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(3))
    if dtype != torch.float64:
        dmean, dvar = dmean.float(), dvar.float()
    dmean, addend = None if given_ == "dvar" else dmean, None if given_ == "dvar" else addend
    guarded = Guarded()
    put = guarded if place == "guarded" else window
    dx = put(torch.full_like(x, float("nan")))
    vectors = [None if t is None else guarded(t) for t in (mean, dmean, dvar)]
    launch_moments_backward(put(x), *vectors, 70, None if addend is None else put(addend), dx)
    guarded.check()
    wide = [None if t is None else t.double() for t in (x, mean, dmean, dvar)]
    oracle = moments_backward_reference(*wide, 70, None if addend is None else addend.double())
    assert_close("dx", dx, oracle)
    if place == "window":
        assert dx._base.isfinite().sum() == dx.numel(), "something was written outside the window"


@pytest.mark.parametrize("mode", ["triton", "stock"])
def test_backward_is_the_gradient_of_the_moments(mode):
    generator = torch.Generator().manual_seed(7)
    x, dy = (random_map(1, 6, 5, 4, torch.float64, generator) for _ in range(2))
    leaf = x.clone().requires_grad_()
    var, mean = torch.var_mean(leaf, (0, 2, 3), correction=0)
    dmean, dvar = (torch.randn(6, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(2))
    (oracle,) = torch.autograd.grad((leaf * dy).sum() + (mean * dmean).sum() + (var * dvar).sum(), leaf)
    with choice.override(mode):
        assert_close("dx", moments_backward(x, mean.detach(), dmean, dvar, 20, dy), oracle)


# -- out of a convolution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride", "groups", "size", "config"),
    [
        (24, 24, 3, 1, 1, (5, 35), Config("descriptor", 16, 16, 16)),  # ragged ends of rows
        (24, 24, 3, 1, 1, (7, 11), Config("descriptor", 16, 16, 16, rows=4)),  # ragged ends of boxes
        (24, 40, 1, 1, 1, (9, 30), Config("descriptor", 32, 16, 16)),  # all pixels as one row
        (8, 16, 3, 2, 1, (9, 40), Config("descriptor", 16, 16, 16)),
        (12, 8, 3, 1, 4, (7, 9), Config("pointer", 16, 16, 16)),
        (3, 5, 3, 1, 1, (1, 1), Config("pointer", 16, 16, 16)),
        (8, 8, 3, 1, 8, (6, 5), None),  # depthwise
    ],
    ids=str,
)
def test_epilogue(dtype, channels, filters, kernel, stride, groups, size, config):
    """Of the values as they are stored, bias and all, with room left for a carry."""
    generator = torch.Generator().manual_seed(8)
    guarded = Guarded()
    x = guarded(random_map(1, channels, *size, dtype, generator) + 1)
    weight = guarded(random_map(filters, channels // groups, kernel, kernel, dtype, generator, 0.3))
    shift = guarded(torch.randn(filters, generator=generator).to(DEVICE) + 2)
    place = ConvGeometry.of([stride] * 2, [kernel // 2] * 4, groups=groups)
    if config is None:
        whole, means, m2s = conv2d_moments(x, weight, shift, place, [2, 1])
    else:
        with forced(config):
            whole, means, m2s = conv2d_moments(x, weight, shift, place, [2, 1])
    guarded.check()
    y = whole[:, :, 2:, 1:]
    oracle = F.conv2d(x.double(), weight.double(), shift.double(), stride, kernel // 2, 1, groups)
    assert_close("y", y, oracle, tf32=dtype == torch.float32)
    mean, m2 = moments_reference(y.double())
    assert_close("mean", means[0] + 3, mean + 3)
    assert means.shape == m2s.shape == (1, filters)
    if m2.any():
        assert_close("m2", m2s[0], m2)
    else:
        assert not m2s.any()


def test_epilogue_of_a_batch_and_of_stock():
    generator = torch.Generator().manual_seed(9)
    x, weight = random_map(2, 8, 5, 9, torch.float64, generator), random_map(8, 8, 3, 3, torch.float64, generator)
    place = ConvGeometry.of(padding=(1, 1, 1, 1)), [0, 0]
    y, mean, m2 = conv2d_moments(x, weight, None, *place)
    with choice.override("stock"):
        found = conv2d_moments(x, weight, None, *place)
    for name, result, oracle in zip(("y", "mean", "m2"), found, (y, mean, m2), strict=True):
        assert_close(name, result, oracle)
    for image, *own in zip(y.split(1), mean, m2, strict=True):
        for result, oracle in zip(own, moments_reference(image), strict=True):
            assert_close("moments", result, oracle)


def test_order_of_programs(tiles):
    generator = torch.Generator().manual_seed(10)
    x, dy = (random_map(1, 16, 9, 37, torch.float32, generator) for _ in range(2))
    weight = random_map(16, 16, 3, 3, torch.float32, generator)
    mean, dmean, dvar = (torch.randn(16, generator=generator).to(DEVICE) for _ in range(3))
    with forced(Config("descriptor", 16, 16, 16)):
        assert_order_free(
            lambda: (
                *moments(x),
                moments_backward(x, mean, dmean, dvar, 7, dy),
                *conv2d_moments(x, weight, None, ConvGeometry.of(padding=(1, 1, 1, 1)), [0, 0]),
            )
        )


def test_opcheck():
    generator = torch.Generator().manual_seed(11)
    x, dy = (random_map(2, 6, 3, 4, torch.bfloat16, generator) for _ in range(2))
    mean, dmean, dvar = (torch.randn(6, generator=generator).to(DEVICE) for _ in range(3))
    torch.library.opcheck(moments, (x,))
    torch.library.opcheck(moments_backward, (x, mean, dmean, dvar, 12, dy))
    torch.library.opcheck(moments_backward, (x, mean, None, dvar, 12, None))
    weight = random_map(5, 6, 3, 3, torch.bfloat16, generator)
    for images in (1, 2):
        torch.library.opcheck(conv2d_moments, (x[:images], weight, None, ConvGeometry.of(padding=(1, 1, 1, 1)), [0, 0]))


def test_empty_map():
    y, mean, m2 = conv2d_moments(
        torch.zeros(1, 3, 0, 5, device=DEVICE),
        torch.ones(2, 3, 1, 1, device=DEVICE),
        None,
        ConvGeometry(),
        [0, 0],
    )
    assert y.shape == (1, 2, 0, 5) and not mean.any() and not m2.any()


def test_refusals():
    with pytest.raises(ValueError, match=r"moments: a map of .* pixels is too large"):
        stream.Stream("moments", 128, torch.empty(2, 8, 32768, 32768, device="meta"))


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    @pytest.mark.parametrize("fault", ["last tile of a row taken for a whole one", "share of the neighbour"])
    def test_tiles_merged_with_wrong_counts(self, monkeypatch, fault):
        merge = dense.merge_parts
        wrong = (
            (lambda p, box, size: merge(p, box, tuple(-(-n // b) * b for n, b in zip(size, box, strict=True))))
            if fault.startswith("last")
            else (lambda p, box, size: merge(p, (box[0], box[1] // 2), (size[0], size[1] // 2)))
        )
        monkeypatch.setattr(dense, "merge_parts", wrong)
        with pytest.raises(AssertionError):
            test_epilogue(torch.float32, 24, 24, 3, 1, 1, (5, 35), Config("descriptor", 16, 16, 16))

    def test_moments_of_values_before_rounding(self, monkeypatch):
        """Those of the result in float32: normalised with them, a bfloat16 map would not have mean zero."""
        wide = convolutions.dense_forward.launch

        def launch(x, weight, y, *rest, **options):
            mine = wide(x, weight, y, *rest, **options)
            exact = torch.empty_like(y, dtype=torch.float32)
            shift = options["shift"]
            exact.copy_(F.conv2d(x.float(), weight.float(), shift, 1, 1))
            return None if mine is None else moments_reference(exact)

        monkeypatch.setattr(convolutions.dense_forward, "launch", launch)
        with pytest.raises(AssertionError, match=r"m2|mean"):
            test_epilogue(torch.bfloat16, 24, 24, 3, 1, 1, (5, 35), Config("descriptor", 16, 16, 16))

    def test_merging_without_the_distance_of_means(self):
        x = random_map(2, 7, 12, 5, torch.float64, torch.Generator().manual_seed(13))
        m2 = sum(moments(part)[1] for part in x.tensor_split((5,), 2))
        with pytest.raises(AssertionError):
            assert_close("m2", m2, moments_reference(x)[1])

    def test_masked_pixels_counted(self, monkeypatch):
        """A pixel of zeros behind the last one is taken for part of the map."""
        longer = random_map(1, 9, 6, 5, torch.float32, torch.Generator().manual_seed(15)) + 1
        longer[:, :, 5] = 0
        x = longer[:, :, :5]
        monkeypatch.setattr(stream, "count_pixels", lambda t, op: 26)
        with pytest.raises(AssertionError):
            assert_close("mean", moments(x)[0], moments_reference(x.double())[0])

    def test_read_past_the_pixels(self, monkeypatch):
        x = Guarded()(random_map(1, 9, 5, 5, torch.float32, torch.Generator().manual_seed(16)))
        monkeypatch.setattr(stream, "count_pixels", lambda t, op: 26)
        with pytest.raises(AssertionError, match="not finite"):
            assert_close("mean", moments(x)[0], moments_reference(x.double())[0])

    def test_program_that_takes_its_neighbours_share(self, monkeypatch):
        monkeypatch.setattr(stream, "stream_config", small_tiles)
        x = random_map(1, 9, 5, 5, torch.float32, torch.Generator().manual_seed(17))
        monkeypatch.setattr(StreamConfig, "share", property(lambda config: config.block_m))
        with pytest.raises(AssertionError):
            assert_close("m2", moments(x)[1], moments_reference(x.double())[1])
