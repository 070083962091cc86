"""Train-mode BatchNorm in pieces, against the float64 oracle and against PyTorch's own, whole and over tiles."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import batch_norm as module
from gigamorph.kernels.batch_norm import (
    Moments,
    gradient_sums,
    launch_normalize_act,
    launch_normalize_act_backward,
    merge_moments,
    moments,
    moments_reference,
    normalize_act,
    normalize_act_backward,
    normalize_act_backward_reference,
    normalize_act_reference,
)
from gigamorph.kernels.layer_norm import Stream

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ACTS = ["none", "relu", "relu6", "silu", "gelu", "hardswish"]
SHAPES = [(2, 24, 5, 7), (1, 130, 9, 3)]
EPS = 1e-5


def vectors(channels: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, rstd, weight, bias."""
    mean, bias = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    rstd, weight = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    mean, rstd, weight, bias = (t.to(dtype).to(DEVICE) for t in (mean, rstd, weight, bias))
    return mean, rstd, weight, bias


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def window(pixels: Tensor) -> Tensor:
    """A copy in the middle of a larger buffer of NaN."""
    n, c, h, w = pixels.shape
    buffer = torch.full((n + 1, c, h + 3, w + 5), float("nan"), dtype=pixels.dtype, device=pixels.device)
    return buffer.contiguous(memory_format=torch.channels_last)[:n, :, 1 : 1 + h, 3 : 3 + w].copy_(pixels)


def small_tiles(pixels: int, channels: int, most: int) -> Stream:
    return Stream(4, 16, 3, 4)


@pytest.fixture(params=["computed", "small tiles"])
def tiles(request, monkeypatch):
    """The configuration of the interpreter, and one with many programs, each of several tiles."""
    if request.param == "small tiles":
        monkeypatch.setattr(module, "stream_config", small_tiles)


# -- statistics ---------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(module, "stream_config", small_tiles)
    x = random_map(1, 5, 12, 16, torch.float32, torch.Generator().manual_seed(3)) + 1000
    x[:, :, :7] = 0
    mean, m2 = moments(x)
    oracle_mean, oracle_m2 = moments_reference(x.double())
    assert_close("mean", mean, oracle_mean)
    assert_close("m2", m2, oracle_m2)


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 9), (0, 12)], ids=str)
def test_moments_of_tiles_merge(cuts):
    x = random_map(2, 7, 12, 5, torch.float64, torch.Generator().manual_seed(4)) + 3
    count, mean, m2 = merged(x.tensor_split(cuts, 2))
    oracle_mean, oracle_m2 = moments_reference(x)
    assert count == 120
    assert_close("mean", mean, oracle_mean)
    assert_close("m2", m2, oracle_m2)


def merged(parts: Sequence[Tensor]) -> Moments:
    """Moments of a map from its tiles."""
    total: Moments = (0, torch.zeros(()), torch.zeros(()))
    for part in parts:
        total = merge_moments(total, (part.shape[0] * part.shape[2] * part.shape[3], *moments(part)))
    return total


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 70), h=st.integers(1, 7), w=st.integers(2, 9), steps=st.integers(1, 5),
    rows=st.sampled_from([1, 2, 8, 32]), columns=st.sampled_from([4, 32, 128]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_size(n, c, h, w, steps, rows, columns, dtype):
    generator = torch.Generator().manual_seed(c)
    x, dy = random_map(n, c, h, w, dtype, generator) + 2, random_map(n, c, h, w, dtype, generator)
    per_channel = vectors(c, dtype, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "stream_config", lambda *_: Stream(rows, columns, steps, 4))
        mean, m2 = moments(x)
        y = normalize_act(x, *per_channel, None, "silu")
        sums = gradient_sums(dy, x, *per_channel, None, "silu")
        dx, _ = normalize_act_backward(dy, x, *per_channel, None, "silu", *per_channel[2:], False)
    oracle_mean, oracle_m2 = moments_reference(x.double())
    oracle_dx, _, *oracle_sums = normalize_act_backward_reference(
        *doubled(dy, x, *per_channel, None), "silu", *doubled(*per_channel[2:])
    )
    assert_close("mean", mean, oracle_mean)
    assert_close("m2", m2, oracle_m2)
    assert_close("y", y, normalize_act_reference(*doubled(x, *per_channel, None), "silu")[0])
    assert_close("dx", dx, oracle_dx)
    scale = (dy.double().abs() * (1 + x.double().abs())).sum((0, 2, 3)) * 4
    for result, oracle in zip(sums, oracle_sums, strict=True):  # signs differ: a sum may be small beside its terms
        assert ((result - oracle).abs() <= (1e-14 if dtype == torch.float64 else 1e-6) * scale).all()


# -- forward and backward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_normalize_act(dtype, shape, act):
    generator = torch.Generator().manual_seed(5)
    x, residual = (random_map(*shape, dtype, generator, 2.0) for _ in range(2))
    per_channel = vectors(shape[1], dtype, generator)
    for keep in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        guarded = Guarded()
        optional = [t if k else None for t, k in zip((*per_channel[2:], residual), keep, strict=True)]
        oracle, _ = normalize_act_reference(*doubled(x, *per_channel[:2], *optional), act)
        y = guarded.empty(*shape, dtype=dtype)
        launch_normalize_act(*(None if t is None else guarded(t) for t in (x, *per_channel[:2], *optional)), act, y)
        guarded.check()
        assert_close("y", y, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True], ids=["recomputed", "gate"])
def test_backward(dtype, shape, act, gated):
    generator = torch.Generator().manual_seed(6)
    dy, x, gate = (random_map(*shape, dtype, generator, 2.0) for _ in range(3))
    mean, rstd, weight, bias = vectors(shape[1], dtype, generator)
    means = vectors(shape[1], dtype, generator)[:2]
    for w, b in ((weight, bias), (None, None)):
        given_ = [dy, x, mean, rstd, w, b, gate if gated else None]
        dx_oracle, dz_oracle, *sums_oracle = normalize_act_backward_reference(*doubled(*given_), act, *doubled(*means))
        guarded = Guarded()
        dx, dz = guarded.empty(*shape, dtype=dtype), guarded.empty(*shape, dtype=dtype)
        given_ = [None if t is None else guarded(t) for t in given_]
        launch_normalize_act_backward(*given_, act, *map(guarded, means), dx, dz)
        sums = gradient_sums(*given_, act)
        guarded.check()
        assert_close("dx", dx, dx_oracle)
        assert_close("dz", dz, dz_oracle)
        for name, result, oracle in zip(("sum dz", "sum dz * xhat"), sums, sums_oracle, strict=True):
            assert_close(name, result, oracle)


def test_windows_are_read_and_written_in_place(tiles):
    generator = torch.Generator().manual_seed(7)
    dy, x, residual = (random_map(2, 20, 5, 6, torch.float32, generator) for _ in range(3))
    per_channel = vectors(20, torch.float32, generator)
    y, dx, dz = (window(torch.zeros_like(x)) for _ in range(3))
    launch_normalize_act(window(x), *per_channel, window(residual), "silu", y)
    oracle, z = normalize_act_reference(*doubled(x, *per_channel, residual), "silu")
    assert_close("y", y, oracle)
    z = z.float()
    launch_normalize_act_backward(
        window(dy), window(x), *per_channel, window(z), "silu", *per_channel[:2], dx, dz
    )  # fmt: skip
    sums = gradient_sums(window(dy), window(x), *per_channel, window(z), "silu")
    oracles = normalize_act_backward_reference(
        *doubled(dy, x, *per_channel, z), "silu", *doubled(*per_channel[:2])
    )  # fmt: skip
    for name, result, oracle in zip(("dx", "dz", "sum dz", "sum dz * xhat"), (dx, dz, *sums), oracles, strict=True):
        assert_close(name, result, oracle)
    for written in (y, dx, dz):
        assert written._base.isfinite().sum() == written.numel(), "something was written outside the window"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    """Within 1.1 times the error of PyTorch's own batch_norm, which rounds y once."""
    generator = torch.Generator().manual_seed(8)
    x, dy = (random_map(2, 32, 12, 13, dtype, generator, 2.0) for _ in range(2))
    weight, bias = (t.float() for t in vectors(32, dtype, generator)[2:])
    mean, m2 = moments(x)
    rstd = (m2 / (2 * 12 * 13) + EPS).rsqrt()
    leaf = x.clone().requires_grad_()
    stock = F.batch_norm(leaf, None, None, weight, bias, True, 0.1, EPS)
    (stock_dx,) = torch.autograd.grad(stock, leaf, dy)
    leaf = x.double().requires_grad_()
    oracle = F.batch_norm(leaf, None, None, weight.double(), bias.double(), True, 0.1, EPS)
    (oracle_dx,) = torch.autograd.grad(oracle, leaf, dy.double())
    sums = gradient_sums(dy, x, mean, rstd, weight, bias, None, "none")
    dx, _ = normalize_act_backward(
        dy, x, mean, rstd, weight, bias, None, "none", *(s / (2 * 12 * 13) for s in sums), False
    )  # fmt: skip
    y = normalize_act(x, mean, rstd, weight, bias, None, "none")
    assert_close("y", y, oracle.detach(), stock=stock.detach())
    assert_close("dx", dx, oracle_dx, stock=stock_dx)


def test_order_of_programs(tiles):
    generator = torch.Generator().manual_seed(9)
    x, dy = (random_map(2, 20, 9, 7, torch.float32, generator) for _ in range(2))
    per_channel = vectors(20, torch.float32, generator)
    assert_order_free(
        lambda: (
            *moments(x), normalize_act(x, *per_channel, dy, "gelu"),
            *gradient_sums(dy, x, *per_channel, None, "gelu"),
            *normalize_act_backward(dy, x, *per_channel, None, "gelu", *per_channel[:2], True),
        )
    )  # fmt: skip


# -- the pieces together ------------------------------------------------------------------------------------------


class TiledBatchNorm(torch.autograd.Function):
    """act(batch_norm(x) + residual) in training, over tiles of rows that never meet in memory."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, act, cuts):
        count, mean, m2 = merged(x.tensor_split(cuts, 2))
        rstd = (m2 / count + EPS).rsqrt()
        residuals = [None] * (len(cuts) + 1) if residual is None else residual.tensor_split(cuts, 2)
        y = torch.cat(
            [
                normalize_act(part, mean, rstd, weight, bias, r, act)
                for part, r in zip(x.tensor_split(cuts, 2), residuals, strict=True)
            ], 2,
        )  # fmt: skip
        ctx.save_for_backward(x, mean, rstd, weight, bias, y if residual is not None else None)
        ctx.act, ctx.cuts, ctx.count = act, cuts, count
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mean, rstd, weight, bias, y = ctx.saved_tensors
        gates = [None] * (len(ctx.cuts) + 1) if y is None else y.tensor_split(ctx.cuts, 2)
        parts = list(zip(dy.tensor_split(ctx.cuts, 2), x.tensor_split(ctx.cuts, 2), gates, strict=True))
        sums = [gradient_sums(d, p, mean, rstd, weight, bias, g, ctx.act) for d, p, g in parts]
        dbias, dweight = (sum(s) for s in zip(*sums, strict=True))
        means = dbias / ctx.count, dweight / ctx.count
        results = [
            normalize_act_backward(d, p, mean, rstd, weight, bias, g, ctx.act, *means, y is not None)
            for d, p, g in parts
        ]
        dx, dz = ([r[i] for r in results] for i in range(2))
        return torch.cat(dx, 2), dweight, dbias, None if y is None else torch.cat(dz, 2), None, None


@pytest.mark.parametrize("cuts", [(), (4,), (1, 5)], ids=str)
@pytest.mark.parametrize(
    ("act", "skip"), [("relu", False), ("silu", False), ("relu", True)], ids=["relu", "silu", "residual, relu"]
)
def test_equals_batch_norm(cuts, act, skip, tiles):
    generator = torch.Generator().manual_seed(10)
    x, residual, dy = (random_map(2, 20, 6, 5, torch.float64, generator) for _ in range(3))
    weight, bias = vectors(20, torch.float64, generator)[2:]
    leaves = [t.clone().requires_grad_() for t in (x + 5, weight, bias, residual)][: 4 if skip else 3]
    y = TiledBatchNorm.apply(*leaves, *([] if skip else [None]), act, cuts)
    results = y.detach(), *torch.autograd.grad(y, leaves, dy)
    z = F.batch_norm(leaves[0], None, None, *leaves[1:3], True, 0.1, EPS)
    y = {"relu": F.relu, "silu": F.silu}[act](z + leaves[3] if skip else z)
    oracles = y.detach(), *torch.autograd.grad(y, leaves, dy)
    for name, result, oracle in zip(("y", "dx", "dweight", "dbias", "dresidual"), results, oracles, strict=False):
        assert_close(name, result, oracle)
        assert (result - oracle).abs().max() <= 1e-12, name


def test_gradcheck():
    generator = torch.Generator().manual_seed(11)
    x = random_map(1, 3, 3, 2, torch.float64, generator).requires_grad_()
    weight, bias = (t.requires_grad_() for t in vectors(3, torch.float64, generator)[2:])
    assert torch.autograd.gradcheck(lambda *t: TiledBatchNorm.apply(*t, None, "gelu", (1,)), (x, weight, bias))


def test_opcheck():
    generator = torch.Generator().manual_seed(12)
    x, dy = (random_map(2, 6, 3, 4, torch.bfloat16, generator) for _ in range(2))
    per_channel = vectors(6, torch.float32, generator)
    torch.library.opcheck(moments, (x,))
    torch.library.opcheck(normalize_act, (x, *per_channel, dy, "relu"))
    torch.library.opcheck(normalize_act, (x, *per_channel[:2], None, None, None, "none"))
    torch.library.opcheck(gradient_sums, (dy, x, *per_channel, x, "relu"))
    for keep_dz in (True, False):
        args = (dy, x, *per_channel, None, "relu", *per_channel[:2], keep_dz)
        torch.library.opcheck(normalize_act_backward, args)


def test_empty_map():
    x = torch.empty(2, 3, 0, 5, device=DEVICE)
    zeros = torch.zeros(3, device=DEVICE)
    for sums in (moments(x), gradient_sums(x, x, zeros, zeros, None, None, None, "relu")):
        assert all(torch.equal(s, zeros) for s in sums)
    assert normalize_act(x, zeros, zeros, None, None, None, "relu").shape == x.shape


def test_refusals():
    zeros = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match="normalize_act: unknown activation 'tanh'; use one of none, relu"):
        normalize_act(torch.zeros(1, 3, 2, 2, device=DEVICE), zeros, zeros, None, None, None, "tanh")
    with pytest.raises(ValueError, match=r"moments: a map of .* pixels is too large"):
        module._config(torch.empty(2, 8, 32768, 32768, device="meta"), "moments")


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    def test_merging_without_the_distance_of_means(self):
        x = random_map(2, 7, 12, 5, torch.float64, torch.Generator().manual_seed(13))
        m2 = sum(moments(part)[1] for part in x.tensor_split((5,), 2))
        with pytest.raises(AssertionError):
            assert_close("m2", m2, moments_reference(x)[1])

    def test_slope_at_the_wrong_value(self):
        """The bias forgotten where z is computed again."""
        generator = torch.Generator().manual_seed(14)
        dy, x = (random_map(1, 9, 5, 5, torch.float32, generator) for _ in range(2))
        mean, rstd, weight, bias = vectors(9, torch.float32, generator)
        oracle = normalize_act_backward_reference(
            *doubled(dy, x, mean, rstd, weight, bias, None), "relu", *doubled(mean, mean)
        )
        sums = gradient_sums(dy, x, mean, rstd, weight, None, None, "relu")
        for result, want in zip(sums, oracle[2:], strict=True):
            with pytest.raises(AssertionError):
                assert_close("sum", result, want)

    def test_masked_pixels_counted(self, monkeypatch):
        """A pixel of zeros behind the last one is taken for part of the map."""
        longer = random_map(1, 9, 6, 5, torch.float32, torch.Generator().manual_seed(15)) + 1
        longer[:, :, 5] = 0
        x = longer[:, :, :5]
        monkeypatch.setattr(module, "count_pixels", lambda t, op: 26)
        with pytest.raises(AssertionError):
            assert_close("mean", moments(x)[0], moments_reference(x.double())[0])

    def test_read_past_the_pixels(self, monkeypatch):
        x = Guarded()(random_map(1, 9, 5, 5, torch.float32, torch.Generator().manual_seed(16)))
        monkeypatch.setattr(module, "count_pixels", lambda t, op: 26)
        with pytest.raises(AssertionError, match="not finite"):
            assert_close("mean", moments(x)[0], moments_reference(x.double())[0])

    def test_program_that_takes_its_neighbours_share(self, monkeypatch):
        monkeypatch.setattr(module, "stream_config", small_tiles)
        x = random_map(1, 9, 5, 5, torch.float32, torch.Generator().manual_seed(17))
        monkeypatch.setattr(Stream, "share", property(lambda config: config.block_m))
        with pytest.raises(AssertionError):
            assert_close("m2", moments(x)[1], moments_reference(x.double())[1])
