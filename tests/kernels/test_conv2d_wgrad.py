"""The weight gradient against float64: every dtype, border, stride, dilation, group and split."""

from __future__ import annotations

import contextlib
import itertools
from unittest.mock import patch

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, forced, random_map
from kernel_references import conv2d_wgrad_reference
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import conv2d_wgrad as wgrad
from gigamorph.kernels import tuning
from gigamorph.kernels.activations import ACTIVATIONS, activate_reference, slope_reference
from gigamorph.kernels.conv2d import conv2d_wgrad_
from gigamorph.kernels.tuning import SHARED_LIMIT, Config
from gigamorph.kernels.windows import ConvGeometry, output_size

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# channels, filters, height, width, filter, stride, (top, bottom, left, right), dilation, groups, form
CASES = {
    "3x3": (16, 24, 3, 37, 3, 1, (1, 1, 1, 1), 1, 1, "descriptor"),
    "3x3/2": (16, 24, 7, 11, 3, 2, (1, 1, 1, 1), 1, 1, "descriptor"),
    "3x3/2 odd left": (24, 16, 6, 9, 3, 2, (0, 1, 0, 1), 1, 1, "descriptor"),
    "3x3/2 dilated by 3": (16, 16, 9, 12, 3, 2, (3, 2, 3, 1), 3, 1, "descriptor"),
    "3x3 dilated by 2": (16, 16, 7, 9, 3, 1, (2, 0, 1, 2), 2, 1, "descriptor"),
    "1x1": (40, 24, 5, 9, 1, 1, (0, 0, 0, 0), 1, 1, "descriptor"),
    "1x1 padded": (16, 16, 3, 4, 1, 1, (1, 0, 0, 2), 1, 1, "descriptor"),
    "1x1/2": (16, 40, 5, 9, 1, 2, (0, 0, 0, 0), 1, 1, "descriptor"),
    "5x5": (16, 16, 6, 7, 5, 1, (0, 2, 3, 1), 1, 1, "descriptor"),
    "7x7/2": (16, 16, 9, 10, 7, 2, (3, 2, 3, 3), 1, 1, "descriptor"),
    "filter larger than map": (16, 16, 2, 2, 5, 1, (2, 2, 2, 2), 1, 1, "descriptor"),
    "3x3 by pointers": (16, 24, 5, 9, 3, 1, (1, 0, 1, 1), 1, 1, "pointer"),
    "1x1 by pointers": (16, 24, 5, 9, 1, 1, (0, 0, 0, 0), 1, 1, "pointer"),
    "3x3/3": (16, 24, 8, 11, 3, 3, (1, 0, 1, 1), 1, 1, "pointer"),
    "stem of 1": (1, 24, 11, 12, 7, 2, (3, 3, 3, 3), 1, 1, "pointer"),
    "stem of 3": (3, 16, 9, 11, 7, 2, (2, 3, 3, 1), 1, 1, "pointer"),
    "patches of 4": (3, 24, 8, 12, 4, 4, (0, 0, 0, 0), 1, 1, "pointer"),
    "odd channels": (5, 7, 6, 5, 3, 1, (1, 1, 1, 1), 1, 1, "pointer"),
    "groups": (12, 24, 6, 7, 3, 2, (1, 0, 0, 1), 2, 4, "pointer"),
    "depthwise": (6, 6, 7, 8, 5, 1, (2, 2, 2, 2), 1, 6, "pointer"),
}


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def launch(splits: int | None, *given: object) -> None:
    """`wgrad.launch` with this number of parts of the pixels; None computes it."""
    with contextlib.nullcontext() if splits is None else patch.object(wgrad, "split_count", lambda *_: splits):
        wgrad.launch(*given)


class Problem:
    """Inputs of one launch, buffers that hold something already, and what they must hold afterwards."""

    def __init__(self, case: tuple, dtype: torch.dtype, gate_act: str = "relu", images: int = 2, seed: int = 0):
        channels, filters, h, w, kernel, stride, self.padding, dilation, self.groups, self.form = case
        top, bottom, left, right = self.padding
        oh = output_size(h, kernel, stride, dilation, top, bottom)
        ow = output_size(w, kernel, stride, dilation, left, right)
        g = generator(seed)
        self.dtype, self.gate_act = dtype, gate_act
        self.stride, self.dilation = (stride, stride), (dilation, dilation)
        self.x = random_map(images, channels, h, w, dtype, g)
        self.dy = random_map(images, filters, oh, ow, dtype, g)
        self.gate = None if gate_act == "none" else random_map(images, filters, oh, ow, dtype, g, 2.0)
        held = torch.float64 if dtype == torch.float64 else torch.float32
        self.dw = random_map(filters, channels // self.groups, kernel, kernel, held, g)
        self.dshift = random_map(filters, 1, 1, 1, held, g).reshape(-1)

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry.of(self.stride, self.padding, self.dilation, self.groups)

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        gate = None if self.gate is None else self.gate.to(dtype)
        return conv2d_wgrad_reference(
            self.dw.shape, self.x.to(dtype), self.dy.to(dtype), gate, self.gate_act, self.geometry
        )

    def run(self, splits: int | None = 3, config: Config | None = None, shift: bool = True) -> tuple[Tensor, Tensor]:
        """dw and dshift as the kernel leaves them."""
        guard = Guarded()
        dw, dshift = guard(self.dw), guard(self.dshift)
        gate = None if self.gate is None else guard(self.gate)
        with forced(config or Config(self.form, 32, 16, 32)):
            maps = guard(self.x), guard(self.dy), gate
            launch(splits, dw, dshift if shift else None, *maps, self.gate_act, self.geometry)
        guard.check()
        return dw, dshift

    def check(self, dw: Tensor, dshift: Tensor, tf32: bool = False) -> None:
        # Products of 16-bit numbers are exact in float32, and so is a slope of 0 or 1: the sum's rounding is left.
        exact = self.gate_act in ("none", "relu", "relu6")
        dtype = torch.float32 if exact and self.dtype.itemsize == 2 else self.dtype
        want_dw, want_dshift = self.reference()
        assert_close("dw", dw, want_dw + self.dw, dtype=dtype, tf32=tf32)
        assert_close("dshift", dshift, want_dshift + self.dshift, dtype=torch.float32 if dtype.itemsize < 8 else dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(name, d) for name, c in CASES.items() for d in DTYPES if d in (torch.float64, torch.bfloat16) or c[4] == 3],
    ids=str,
)
def test_matches_float64(case, dtype):
    problem = Problem(CASES[case], dtype)
    problem.check(*problem.run())


@pytest.mark.parametrize("case", ["3x3", "stem of 3"])
def test_tf32(case):
    torch.backends.cudnn.allow_tf32 = True
    problem = Problem(CASES[case], torch.float32)
    dw, dshift = problem.run()
    problem.check(dw, dshift, tf32=True)
    torch.backends.cudnn.allow_tf32 = False
    assert not torch.equal(problem.run()[0], dw), "products were not rounded to TF32"


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("case", ["3x3/2", "groups"])
def test_gates(case, act, dtype):
    problem = Problem(CASES[case], dtype, act)
    problem.check(*problem.run(splits=2))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_error_is_stock_pytorchs(act, dtype):
    problem = Problem(CASES["3x3"], dtype, act)
    problem.dw.zero_()
    dw, _ = problem.run()
    assert_close("dw", dw.to(dtype), problem.reference()[0], stock=problem.reference(dtype)[0])


@pytest.mark.parametrize("case", ["3x3", "stem of 1"])
def test_any_splits(case):
    problem = Problem(CASES[case], torch.float32)
    for splits in (None, 1, 5, 40):  # 40: more than there are blocks of pixels
        problem.check(*problem.run(splits))


@pytest.mark.parametrize("form", ["descriptor", "pointer"])
@pytest.mark.parametrize("blocks", [(16, 16, 16), (64, 32, 16), (16, 64, 64)])
def test_any_blocks(form, blocks):
    problem = Problem(CASES["3x3/2 odd left"], torch.bfloat16)
    problem.check(*problem.run(2, Config(form, *blocks)))


@pytest.mark.parametrize("case", ["3x3", "1x1", "stem of 3"])
def test_configuration_of_the_interpreter(case):
    problem = Problem(CASES[case], torch.float32)
    guard = Guarded()
    dw, dshift = guard(problem.dw), guard(problem.dshift)
    wgrad.launch(dw, dshift, problem.x, problem.dy, problem.gate, "relu", problem.geometry)
    guard.check()
    problem.check(dw, dshift)


@pytest.mark.parametrize("case", ["3x3", "depthwise"])
@pytest.mark.parametrize("splits", [1, 2])
def test_without_shift(case, splits):
    problem = Problem(CASES[case], torch.float32, "none")
    dw, dshift = problem.run(splits, shift=False)
    assert torch.equal(dshift, problem.dshift)
    problem.check(dw, problem.dshift + problem.reference()[1].float())


@pytest.mark.parametrize("case", ["3x3", "3x3/2", "1x1", "1x1/2", "3x3 by pointers"])
def test_windows_of_larger_buffers(case):
    problem = Problem(CASES[case], torch.bfloat16)

    def inside(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        buffer = torch.full((n, h + 3, w + 5, c + 8), float("nan"), dtype=x.dtype, device=x.device)
        window = buffer[:, 1 : h + 1, 2 : w + 2, :c].permute(0, 3, 1, 2)
        return window.copy_(x)

    problem.x, problem.dy, problem.gate = inside(problem.x), inside(problem.dy), inside(problem.gate)
    dw, dshift = problem.dw.clone(), problem.dshift.clone()
    with forced(Config(problem.form, 32, 16, 32)):
        launch(2, dw, dshift, problem.x, problem.dy, problem.gate, "relu", problem.geometry)
    problem.check(dw, dshift)


def test_tiles_add_up():
    """Strips of an image, each with the rows of x that its filters reach, sum to the gradient of the whole."""
    problem = Problem(CASES["3x3"], torch.float32)
    dw, dshift = problem.dw.clone(), problem.dshift.clone()
    with forced(Config("descriptor", 32, 16, 32)):
        for rows, x_rows, top, bottom in ((slice(0, 1), slice(0, 2), 1, 0), (slice(1, 3), slice(0, 3), 0, 1)):
            wgrad.launch(
                dw,
                dshift,
                problem.x[:, :, x_rows],
                problem.dy[:, :, rows],
                problem.gate[:, :, rows],
                "relu",
                ConvGeometry.of(padding=(top, bottom, 1, 1)),
            )
    problem.check(dw, dshift)


@pytest.mark.parametrize("case", ["3x3", "3x3/2", "groups"])
@pytest.mark.parametrize("splits", [1, 4])
def test_order_of_programs_does_not_matter(case, splits):
    problem = Problem(CASES[case], torch.float32)
    assert_order_free(lambda: problem.run(splits))


@pytest.mark.parametrize("images, h, oh", [(0, 4, 4), (1, 4, 0), (1, 0, 2)])
def test_empty_maps(images, h, oh):
    x = random_map(images, 16, h, 4, torch.float32, generator())
    dy = random_map(images, 16, oh, 4, torch.float32, generator())
    dw, dshift = random_map(16, 16, 3, 3, torch.float32, generator()), torch.ones(16, device=DEVICE)
    before = dw.clone()
    wgrad.launch(dw, dshift, x, dy, None, "none", ConvGeometry.of(padding=(2, 2, 1, 1)))
    assert torch.equal(dw, before)
    assert_close("dshift", dshift, 1 + dy.double().sum((0, 2, 3)))


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.sampled_from((1, 2, 3)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.sampled_from(("none", "relu", "silu")),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_random(dtype, n, groups, c, k, h, w, r, s, stride_h, stride_w, dilation, padding, act, splits, seed):
    oh = output_size(h, r, stride_h, dilation, padding[0], padding[1])
    ow = output_size(w, s, stride_w, dilation, padding[2], padding[3])
    if oh < 1 or ow < 1:
        return
    if groups == 1:
        c, k = 8 * c, 8 * k  # what descriptors address
    g = generator(seed)
    x = random_map(n, c * groups, h, w, dtype, g)
    dy, gate = (random_map(n, k * groups, oh, ow, dtype, g) for _ in range(2))
    held = torch.float64 if dtype == torch.float64 else torch.float32
    guard = Guarded()
    dw = guard(torch.zeros(k * groups, r, s, c, dtype=held, device=DEVICE).permute(0, 3, 1, 2))
    dshift = guard(torch.zeros(k * groups, dtype=held, device=DEVICE))
    geometry = ConvGeometry.of((stride_h, stride_w), padding, (dilation, dilation), groups)
    gate = None if act == "none" else gate
    launch(splits, dw, dshift, guard(x), guard(dy), None if gate is None else guard(gate), act, geometry)
    guard.check()
    want = conv2d_wgrad_reference(
        dw.shape, x.double(), dy.double(), None if gate is None else gate.double(), act, geometry
    )
    # Sums of a few products may cancel, so the error is measured against the sum of their sizes.
    dz = dy.double() if gate is None else dy.double() * slope_reference(gate.double(), act)
    terms = conv2d_wgrad_reference(dw.shape, x.double().abs(), dz.abs(), None, "none", geometry)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for name, got, right, size in zip(("dw", "dshift"), (dw, dshift), want, terms, strict=True):
        assert torch.isfinite(got).all(), name
        assert ((got.double() - right).abs() <= 1.1 * bound * size + 1e-30).all(), name


PLANTED = {
    "border": lambda p: setattr(p, "padding", (p.padding[0] - 1, p.padding[1] + 1, *p.padding[2:])),
    "column": lambda p: setattr(p, "padding", (*p.padding[:2], p.padding[2] - 1, p.padding[3] + 1)),
    "slope": lambda p: setattr(p, "gate_act", "relu6"),
    "gate": lambda p: setattr(p, "gate", None),
    "pixel": lambda p: p.dy[1, :, -1, -1].zero_(),
    "input pixel": lambda p: p.x[0, :, 0, 0].zero_(),
    "not added": lambda p: p.dw.zero_(),
}


@pytest.mark.parametrize("error", PLANTED)
@pytest.mark.parametrize("case", ["3x3", "3x3/2"])
def test_planted_errors_are_caught(case, error):
    right, wrong = (Problem(CASES[case], torch.bfloat16) for _ in range(2))
    # A slope of relu6 differs from one of relu where the gate is above 6.
    for problem in (right, wrong):
        problem.gate *= 3
    PLANTED[error](wrong)
    with pytest.raises(AssertionError):
        right.check(*wrong.run())


def test_planted_lost_split_is_caught(monkeypatch):
    problem = Problem(CASES["3x3"], torch.bfloat16)
    add = wgrad.add_splits_kernel

    class Losing:
        def __getitem__(self, grid):
            return lambda part, dw, dshift, weights, length, splits, **options: add[grid](
                part, dw, dshift, weights, length, splits - 1, **options
            )

    problem.check(*problem.run(3))
    monkeypatch.setattr(wgrad, "add_splits_kernel", Losing())
    with pytest.raises(AssertionError):
        problem.check(*problem.run(3))


def test_errors():
    problem = Problem(CASES["3x3"], torch.float32)
    arguments = (problem.x, problem.dy, problem.gate, "relu", problem.geometry)
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        wgrad.launch(problem.dw.double(), None, *arguments)
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        wgrad.launch(problem.dw, problem.dshift.half(), *arguments)
    with pytest.raises(ValueError, match="must be dense"):
        wgrad.launch(problem.dw.contiguous(), None, *arguments)
    x = torch.empty(1, 2**16, 2**15, 1, device="meta").permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="too many for the pointer form"):
        wgrad.launch(torch.empty(1, 1, 1, 1, device="meta"), None, x, x, None, "none", ConvGeometry())


class _Conv(torch.autograd.Function):
    """act(conv(x, w) + shift) of which only the gradients of w and shift are wanted, by the public op."""

    @staticmethod
    def forward(ctx, x, w, shift, act, case):
        _, _, _, _, _, stride, padding, dilation, groups, _ = case
        top, bottom, left, right = padding
        z = F.conv2d(F.pad(x, [left, right, top, bottom]), w, shift, stride, 0, dilation, groups)
        ctx.save_for_backward(x, w, z)
        ctx.act, ctx.case = act, case
        return activate_reference(z, act)

    @staticmethod
    def backward(ctx, dy):
        x, w, z = ctx.saved_tensors
        _, _, _, _, _, stride, padding, dilation, groups, _ = ctx.case
        geometry = ConvGeometry.of([stride] * 2, padding, [dilation] * 2, groups)
        dw = torch.zeros_like(w, memory_format=torch.channels_last)
        dshift = w.new_zeros(w.shape[0])
        torch.ops.gigamorph.conv2d_wgrad_(dw, dshift, x, dy, z, ctx.act, geometry)
        return None, dw, dshift, None, None


@pytest.mark.parametrize(
    "case, act",
    [
        ((3, 2, 4, 5, 3, 1, (1, 0, 1, 1), 1, 1, ""), "silu"),
        ((2, 3, 5, 4, 3, 2, (1, 1, 0, 1), 1, 1, ""), "gelu"),
        ((4, 4, 4, 4, 2, 1, (0, 1, 1, 0), 1, 2, ""), "relu"),
    ],
)
def test_gradcheck(case, act):
    channels, filters, h, w, kernel, *_, groups, _ = case
    g = generator(3)
    x = random_map(1, channels, h, w, torch.float64, g)
    weight = random_map(filters, channels // groups, kernel, kernel, torch.float64, g).requires_grad_()
    shift = torch.randn(filters, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, b: _Conv.apply(x, w, b, act, case), (weight, shift), nondet_tol=0.0, check_batched_grad=False
    )


@pytest.mark.parametrize("shift, gated", [(True, True), (False, False)])
def test_opcheck(shift, gated):
    problem = Problem((4, 4, 4, 4, 3, 1, (1, 1, 1, 1), 1, 1, ""), torch.float32)
    torch.library.opcheck(
        torch.ops.gigamorph.conv2d_wgrad_.default,
        (
            problem.dw,
            problem.dshift if shift else None,
            problem.x,
            problem.dy,
            problem.gate if gated else None,
            "relu" if gated else "none",
            ConvGeometry.of(padding=(1, 1, 1, 1)),
        ),
    )


def test_public_op_takes_any_memory_format():
    problem = Problem(CASES["3x3"], torch.float32)
    dw, dshift = problem.dw.clone(), problem.dshift.clone()
    x, dy, gate = (t.contiguous() for t in (problem.x, problem.dy, problem.gate))
    conv2d_wgrad_(dw, dshift, x, dy, gate, "relu", problem.geometry)
    problem.check(dw, dshift)


@given(st.integers(1, 2000), st.integers(1, 200_000), st.sampled_from((16, 32, 64)), st.integers(1, 2**24))
@settings(max_examples=50, deadline=None)
def test_splits_share_the_pixels(tiles, segments, segment, split_bytes):
    splits = tuning.split_count(tiles, segments, segment, 40_960, split_bytes, 132)
    share = triton.cdiv(segments, splits)
    assert 1 <= splits <= segments
    assert (splits - 1) * share < segments, "a split has no pixels"
    assert share * segment < tuning.SPLIT_PIXELS + segment


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype, tf32", [*((dtype, False) for dtype in DTYPES), (torch.float32, True)], ids=str)
def test_configurations_fit_the_chip(arch, dtype, tf32, monkeypatch):
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "shared_limit", lambda device: SHARED_LIMIT[arch])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    sizes = itertools.product((1, 24, 64, 96, 2048), (1, 16, 64, 147, 2048), (1, 2, 3, 5, 7, 11, 12), ACTIVATIONS)
    for filters, depth, taps, act in sizes:
        for described in (False, True) if arch >= 90 else (False,):
            held = taps if described else 1
            config = tuning.wgrad_config(DEVICE, dtype, 4096, filters, depth, held, described, act)
            stage = (
                (config.block_m * (1 if act == "none" else 2) + config.block_n * held) * config.block_k * dtype.itemsize
            )
            assert config.num_stages * stage <= SHARED_LIMIT[arch]
            assert held * config.block_m * config.block_n <= 96 * 32 * config.num_warps
