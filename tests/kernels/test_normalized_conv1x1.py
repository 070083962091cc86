"""The 1x1 convolution of a normalised map, against the float64 oracle: values, statistics, guard bands, order."""

import contextlib

import pytest
import torch
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map
from torch import Tensor

from gigamorph.kernels import choice
from gigamorph.kernels import normalized_conv1x1 as module
from gigamorph.kernels.moments import moments_reference
from gigamorph.kernels.normalized_conv1x1 import launch, normalized_conv1x1, normalized_conv1x1_reference
from gigamorph.kernels.tuning import Config, forced

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CASES = [
    ((1, 24, 5, 7), 40, "relu", Config("pointer", 16, 16, 16)),
    ((1, 96, 3, 5), 130, "none", None),
    ((1, 17, 4, 9), 33, "silu", Config("pointer", 32, 32, 16)),
    ((1, 50, 1, 11), 7, "relu", Config("pointer", 16, 16, 64)),
]


@pytest.fixture(params=["ieee", "tf32"])
def tf32(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param == "tf32")
    return request.param == "tf32"


def case(shape, filters, dtype, seed=1) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(x, mean, rstd, weight, bias), w, shift."""
    generator = torch.Generator().manual_seed(seed)
    c = shape[1]
    mean, bias, shift = (torch.randn(n, generator=generator).to(DEVICE) for n in (c, c, filters))
    rstd, weight = ((torch.rand(c, generator=generator) + 0.5).to(DEVICE) for _ in range(2))
    x = random_map(*shape, dtype, generator, 2.0) + 1
    return (x, mean, rstd, weight, bias), random_map(filters, c, 1, 1, dtype, generator, c**-0.5), shift + 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "filters", "act", "config"), CASES, ids=str)
def test_values(dtype, shape, filters, act, config, tf32):
    given, w, shift = case(shape, filters, dtype)
    oracle = normalized_conv1x1_reference(*(t.double() for t in given), act, w.double(), shift.double())
    guarded = Guarded()
    y = guarded.empty(*oracle.shape, dtype=dtype)
    with forced(config) if config else contextlib.nullcontext():
        found = launch(*map(guarded, given), act, guarded(w).flatten(1), guarded(shift), y, True)
    guarded.check()
    # Half-precision products are of a map that was rounded once, as it would be if it were stored.
    stock = normalized_conv1x1_reference(*(t.to(dtype) for t in given), act, w, shift.to(dtype))
    assert_close("y", y, oracle, tf32=tf32 and dtype == torch.float32, stock=stock)
    mean, m2 = moments_reference(y.double())
    assert_close("mean", found[0] + 3, mean + 3)
    assert_close("m2", found[1], m2)


@pytest.mark.parametrize("mode", ["triton", "stock"])
@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("images", [1, 3])
def test_op(mode, moments, images):
    """Statistics of each image, room for a carry, a window of a larger map."""
    given, w, _ = case((images, 12, 8, 9), 10, torch.float64)
    x = given[0][:, :, 2:7, 1:]
    oracle = normalized_conv1x1_reference(x, *(t.double() for t in given[1:]), "gelu", w, None)
    with choice.override(mode):
        whole, *found = normalized_conv1x1(x, *(t.double() for t in given[1:]), "gelu", w, None, moments, [2, 1])
    y = whole[:, :, 2:, 1:]
    assert_close("y", y, oracle)
    if not moments:
        assert not any(part.numel() for part in found)
        return
    for image, *own in zip(y.split(1), *found, strict=True):
        for result, want in zip(own, moments_reference(image), strict=True):
            assert_close("moments", result, want)


def test_order_of_programs():
    given, w, shift = case((1, 20, 9, 7), 40, torch.float32)
    with forced(Config("pointer", 16, 16, 16)):
        assert_order_free(lambda: normalized_conv1x1(*given, "relu", w, shift, True, [0, 0]))


def test_opcheck():
    given, w, shift = case((2, 6, 3, 4), 5, torch.bfloat16)
    for moments in (True, False):
        torch.library.opcheck(normalized_conv1x1, (*given, "relu", w, shift, moments, [0, 0]))


def test_refusals_and_empty_maps():
    given, w, shift = case((1, 6, 3, 4), 5, torch.float32)
    with pytest.raises(ValueError, match="unknown activation 'tanh'; use one of none, relu"):
        normalized_conv1x1(*given, "tanh", w, shift, True, [0, 0])
    y, *found = normalized_conv1x1(given[0][:, :, :0], *given[1:], "relu", w, shift, True, [0, 0])
    assert y.shape == (1, 5, 0, 4) and not any(part.any() for part in found)


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    @pytest.mark.parametrize("fault", ["activation", "statistics"])
    def test_wrong_parts(self, monkeypatch, fault):
        right = module.launch

        def wrong(x, mean, rstd, weight, bias, act, *rest):
            mean, act = (mean, "none") if fault == "activation" else (mean * 1.01, act)
            return right(x, mean, rstd, weight, bias, act, *rest)

        monkeypatch.setitem(globals(), "launch", wrong)
        with pytest.raises(AssertionError, match="y: "):
            test_values(torch.float32, *CASES[0], False)

    def test_pixels_past_the_end_counted(self, monkeypatch):
        monkeypatch.setattr(module, "merge_parts", lambda p, box, size: right(p, box, (1, size[1] + 1)))
        from gigamorph.kernels.moments import merge_parts as right

        with pytest.raises(AssertionError, match="m"):
            test_values(torch.float32, *CASES[0], False)
