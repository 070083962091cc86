"""Train-mode BatchNorm in pieces, against the float64 oracle and against PyTorch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, doubled, random_map, window
from kernel_references import normalize_act_gradients_reference, normalize_act_reference
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import choice, stream
from gigamorph.kernels.activations import activate_reference
from gigamorph.kernels.batch_norm import (
    launch_normalize_act,
    launch_normalize_act_gradients,
    normalize_act,
    normalize_act_gradients,
)
from gigamorph.kernels.moments import moments, moments_backward, moments_reference
from gigamorph.kernels.tiles import StreamConfig

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ACTS = ["none", "relu", "relu6", "silu", "gelu", "hardswish"]
# Each activation in one dtype, and in the others one whose slope shows in its result and one whose does not.
KINDS = [
    *((torch.float32, act) for act in ACTS),
    *((dtype, act) for dtype in DTYPES if dtype != torch.float32 for act in ("relu6", "gelu")),
]
SHAPES = [(2, 24, 5, 7), (1, 130, 9, 3)]
EPS = 1e-5


def vectors(channels: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, rstd, weight, bias."""
    mean, bias = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    rstd, weight = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    mean, rstd, weight, bias = (t.to(dtype).to(DEVICE) for t in (mean, rstd, weight, bias))
    return mean, rstd, weight, bias


def small_tiles(pixels: int, channels: int, most: int) -> StreamConfig:
    return StreamConfig(4, 16, 3, 4)


@pytest.fixture(params=["computed", "small tiles"])
def tiles(request, monkeypatch):
    """The configuration of the interpreter, and one with many programs, each of several tiles."""
    if request.param == "small tiles":
        monkeypatch.setattr(stream, "stream_config", small_tiles)


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 40),
    h=st.integers(1, 5),
    w=st.integers(2, 7),
    steps=st.integers(1, 5),
    rows=st.sampled_from([1, 2, 8, 32]),
    columns=st.sampled_from([4, 32, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size(n, c, h, w, steps, rows, columns, dtype):
    generator = torch.Generator().manual_seed(c)
    x, dy = random_map(n, c, h, w, dtype, generator) + 2, random_map(n, c, h, w, dtype, generator)
    per_channel = vectors(c, dtype, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "stream_config", lambda *_: StreamConfig(rows, columns, steps, 4))
        mean, m2 = moments(x)
        y = normalize_act(x, *per_channel, None, "silu")
        dx, _, *sums = normalize_act_gradients(dy, x, *per_channel, None, "silu", False)
    oracle_mean, oracle_m2 = moments_reference(x.double())
    oracle_dx, _, *oracle_sums = normalize_act_gradients_reference(*doubled(dy, x, *per_channel, None), "silu")
    assert_close("mean", mean, oracle_mean)
    assert_close("m2", m2, oracle_m2)
    assert_close("y", y, normalize_act_reference(*doubled(x, *per_channel, None), "silu")[0])
    assert_close("dx", dx, oracle_dx)
    scale = (dy.double().abs() * (1 + x.double().abs())).sum((0, 2, 3)) * 4
    for result, oracle in zip(sums, oracle_sums, strict=True):  # signs differ: a sum may be small beside its terms
        assert ((result - oracle).abs() <= (1e-14 if dtype == torch.float64 else 1e-6) * scale).all()


# -- forward and backward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "act"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


@pytest.mark.parametrize(("dtype", "act"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["recomputed", "gate"])
def test_backward(dtype, shape, act, gated):
    generator = torch.Generator().manual_seed(6)
    dy, x, gate = (random_map(*shape, dtype, generator, 2.0) for _ in range(3))
    mean, rstd, weight, bias = vectors(shape[1], dtype, generator)
    for w, b in ((weight, bias), (None, None)):
        given_ = [dy, x, mean, rstd, w, b, gate if gated else None]
        dx_oracle, dz_oracle, *sums_oracle = normalize_act_gradients_reference(*doubled(*given_), act)
        guarded = Guarded()
        dx, dz = guarded.empty(*shape, dtype=dtype), guarded.empty(*shape, dtype=dtype)
        given_ = [None if t is None else guarded(t) for t in given_]
        sums = launch_normalize_act_gradients(*given_, act, dx, dz)
        guarded.check()
        assert_close("dx of constant statistics", dx, dx_oracle)
        assert_close("dz in one pass", dz, dz_oracle)
        for name, result, oracle in zip(("sum dz", "sum dz * xhat"), sums, sums_oracle, strict=True):
            assert_close(f"{name} in one pass", result, oracle)


@pytest.mark.parametrize("mode", ["triton", "stock"])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", ["wide", "narrow"])
def test_of_16_bits_beside_32(mode, narrow, made):
    """As under autocast: x has 16 bits, the residual 32, the result 32 or 16, each rounded once; and a margin."""
    generator = torch.Generator().manual_seed(8)
    x, (residual, dy) = (
        random_map(1, 20, 5, 6, narrow, generator),
        (random_map(1, 20, 5, 6, torch.float32, generator) for _ in range(2)),
    )
    dtype = torch.float32 if made == "wide" else narrow
    dy = dy.to(dtype)
    per_channel = vectors(20, torch.float32, generator)
    with choice.override(mode):
        whole = normalize_act(x, *per_channel, residual, "relu", dtype, (2, 1))
        y = whole[:, :, 2:, 1:]
        dx, dz, *sums = normalize_act_gradients(dy, x, *per_channel, y, "relu", True)
    oracle, z = normalize_act_reference(*doubled(x, *per_channel, residual), "relu")
    assert (whole.shape, y.dtype, dx.dtype, dz.dtype) == ((1, 20, 7, 7), dtype, narrow, dtype)
    assert_close("y", y, oracle)
    oracles = normalize_act_gradients_reference(*doubled(dy, x, *per_channel, z), "relu")
    for name, result, wanted in zip(("dx", "dz", "sum dz", "sum dz * xhat"), (dx, dz, *sums), oracles, strict=True):
        assert_close(name, result, wanted)


def test_windows_are_read_and_written_in_place(tiles):
    generator = torch.Generator().manual_seed(7)
    dy, x, residual = (random_map(2, 20, 5, 6, torch.float32, generator) for _ in range(3))
    per_channel = vectors(20, torch.float32, generator)
    y, dx, dz = (window(torch.zeros_like(x)) for _ in range(3))
    launch_normalize_act(window(x), *per_channel, window(residual), "silu", y)
    oracle, z = normalize_act_reference(*doubled(x, *per_channel, residual), "silu")
    assert_close("y", y, oracle)
    z = z.float()
    sums = launch_normalize_act_gradients(window(dy), window(x), *per_channel, window(z), "silu", dx, dz)
    oracles = normalize_act_gradients_reference(*doubled(dy, x, *per_channel, z), "silu")
    for name, result, oracle in zip(("dx", "dz", "sum dz", "sum dz * xhat"), (dx, dz, *sums), oracles, strict=True):
        assert_close(name, result, oracle)
    for written in (y, dx, dz):
        assert written._base.isfinite().sum() == written.numel(), "something was written outside the window"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    """Within 1.1 times the error of PyTorch's own batch_norm, which rounds y once."""
    generator = torch.Generator().manual_seed(8)
    x = random_map(2, 32, 12, 13, dtype, generator, 2.0)
    weight, bias = (t.float() for t in vectors(32, dtype, generator)[2:])
    mean, m2 = moments(x)
    rstd = (m2 / (2 * 12 * 13) + EPS).rsqrt()
    stock = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
    oracle = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True, 0.1, EPS)
    assert_close("y", normalize_act(x, mean, rstd, weight, bias, None, "none"), oracle, stock=stock)


def test_order_of_programs(tiles):
    generator = torch.Generator().manual_seed(9)
    x, dy = (random_map(2, 20, 9, 7, torch.float32, generator) for _ in range(2))
    per_channel = vectors(20, torch.float32, generator)
    assert_order_free(
        lambda: (
            *moments(x),
            normalize_act(x, *per_channel, dy, "gelu"),
            *normalize_act_gradients(dy, x, *per_channel, None, "gelu", True),
        )
    )


# -- the pieces together ------------------------------------------------------------------------------------------


class SweptBatchNorm(torch.autograd.Function):
    """act(batch_norm(x) + residual) as the engine's sweeps do it: statistics are values with gradients of their own."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, act):
        count = x.shape[0] * x.shape[2] * x.shape[3]
        mean, m2 = moments(x)
        rstd = (m2 / count + EPS).rsqrt()
        y = normalize_act(x, mean, rstd, weight, bias, residual, act)
        ctx.save_for_backward(x, mean, rstd, weight, bias, None if residual is None else y)
        ctx.act, ctx.count = act, count
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mean, rstd, weight, bias, gate = ctx.saved_tensors
        dx, dz, dbias, dweight = normalize_act_gradients(dy, x, mean, rstd, weight, bias, gate, ctx.act, True)
        dmean, dvar = -weight * rstd * dbias, -weight * rstd.square() * dweight / 2
        dx = moments_backward(x, mean, dmean, dvar, ctx.count, dx)
        return dx, dweight, dbias, dz if ctx.needs_input_grad[3] else None, None


def in_sweeps(*leaves, act):
    return SweptBatchNorm.apply(*leaves, *[None] * (4 - len(leaves)), act)


@pytest.mark.parametrize("mode", ["triton", "stock"])
@pytest.mark.parametrize(("act", "skip"), [("none", False), ("relu", False), ("silu", False), ("relu", True)])
def test_sweeps_equal_batch_norm(mode, act, skip):
    generator = torch.Generator().manual_seed(18)
    x, residual, dy = (random_map(2, 20, 6, 5, torch.float64, generator) for _ in range(3))
    weight, bias = vectors(20, torch.float64, generator)[2:]
    leaves = [t.clone().requires_grad_() for t in (x + 5, weight, bias, residual)][: 4 if skip else 3]
    with choice.override(mode):
        y = in_sweeps(*leaves, act=act)
        results = y.detach(), *torch.autograd.grad(y, leaves, dy)
    z = F.batch_norm(leaves[0], None, None, *leaves[1:3], True, 0.1, EPS)
    y = activate_reference(z + leaves[3] if skip else z, act)
    oracles = y.detach(), *torch.autograd.grad(y, leaves, dy)
    for name, result, oracle in zip(("y", "dx", "dweight", "dbias", "dresidual"), results, oracles, strict=False):
        assert (result - oracle).abs().max() <= 1e-12, name


def test_gradcheck_of_sweeps():
    generator = torch.Generator().manual_seed(19)
    x = random_map(1, 3, 3, 2, torch.float64, generator).requires_grad_()
    weight, bias = (t.requires_grad_() for t in vectors(3, torch.float64, generator)[2:])
    assert torch.autograd.gradcheck(lambda *t: in_sweeps(*t, act="gelu"), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: in_sweeps(*t, act="silu"), (x, weight, bias))


def test_opcheck():
    generator = torch.Generator().manual_seed(12)
    x, dy = (random_map(2, 6, 3, 4, torch.bfloat16, generator) for _ in range(2))
    per_channel = vectors(6, torch.float32, generator)
    torch.library.opcheck(moments, (x,))
    torch.library.opcheck(normalize_act, (x, *per_channel, dy, "relu"))
    torch.library.opcheck(normalize_act, (x, *per_channel[:2], None, None, None, "none"))
    for keep_dz in (True, False):
        torch.library.opcheck(normalize_act_gradients, (dy, x, *per_channel, x, "relu", keep_dz))


def test_empty_map():
    x = torch.empty(2, 3, 0, 5, device=DEVICE)
    zeros = torch.zeros(3, device=DEVICE)
    for sums in (moments(x), normalize_act_gradients(x, x, zeros, zeros, None, None, None, "relu", False)[2:]):
        assert all(torch.equal(s, zeros) for s in sums)
    assert normalize_act(x, zeros, zeros, None, None, None, "relu").shape == x.shape


def test_refusals():
    zeros = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match="normalize_act: unknown activation 'tanh'; use one of none, relu"):
        normalize_act(torch.zeros(1, 3, 2, 2, device=DEVICE), zeros, zeros, None, None, None, "tanh")


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    def test_slope_at_the_wrong_value(self):
        """The bias forgotten where z is computed again."""
        generator = torch.Generator().manual_seed(14)
        dy, x = (random_map(1, 9, 5, 5, torch.float32, generator) for _ in range(2))
        mean, rstd, weight, bias = vectors(9, torch.float32, generator)
        oracle = normalize_act_gradients_reference(*doubled(dy, x, mean, rstd, weight, bias, None), "relu")
        _, _, *sums = normalize_act_gradients(dy, x, mean, rstd, weight, None, None, "relu", False)
        for result, want in zip(sums, oracle[2:], strict=True):
            with pytest.raises(AssertionError):
                assert_close("sum", result, want)
