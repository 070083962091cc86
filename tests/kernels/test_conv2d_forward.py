"""The fused convolution's two kernels against a float64 oracle on the inputs as they were rounded."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, errors, forced, random_map
from kernel_references import conv2d_forward_reference
from torch import Tensor

from gigamorph.kernels import conv2d_kernels, precision, windows
from gigamorph.kernels.activations import activate_reference
from gigamorph.kernels.conv2d_forward import launch
from gigamorph.kernels.moments import moments_reference
from gigamorph.kernels.tuning import Config
from gigamorph.kernels.windows import ConvGeometry, output_size

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One convolution; `form` is the kernel that must run it."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    form: str = "descriptor"
    channels: tuple[int, int] = (24, 24)
    size: tuple[int, int] = (5, 35)

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry.of((self.stride,) * 2, self.padding, (self.dilation,) * 2, self.groups)

    def __str__(self) -> str:
        return (
            f"{self.form}-k{self.kernel}s{self.stride}d{self.dilation}g{self.groups}"
            f"-{self.channels[0]}to{self.channels[1]}-pad{''.join(map(str, self.padding))}"
        )


CASES = [
    Case(1),
    Case(1, stride=2),
    Case(3, padding=(1, 1, 1, 1)),
    Case(3, padding=(1, 0, 0, 1)),
    Case(3, stride=2, padding=(1, 1, 1, 1)),
    Case(3, stride=2, padding=(0, 1, 0, 0)),
    Case(3, stride=2, padding=(1, 0, 1, 0), size=(8, 20)),
    Case(3, dilation=2, padding=(2, 2, 2, 2)),
    Case(5, padding=(2, 1, 2, 0), channels=(40, 8)),
    Case(7, stride=2, padding=(3, 3, 3, 3), channels=(8, 16), size=(5, 19)),
    Case(1, form="pointer"),
    Case(4, stride=4, form="pointer"),
    Case(3, stride=3, padding=(1, 0, 1, 1), form="pointer"),
    Case(3, stride=2, dilation=2, padding=(2, 2, 2, 2), form="pointer"),
    Case(3, groups=2, stride=2, padding=(1, 0, 1, 1), channels=(34, 24), form="pointer"),
    Case(5, groups=2, dilation=2, padding=(1, 0, 1, 1), channels=(32, 6), form="pointer", size=(13, 17)),
    Case(3, padding=(1, 1, 1, 1), form="pointer", size=(1, 1)),
    Case(3, groups=4, stride=2, padding=(1, 0, 1, 1), form="columns"),
    Case(5, groups=2, dilation=2, padding=(1, 0, 1, 1), form="columns", size=(13, 17)),
    Case(7, stride=2, padding=(3, 3, 3, 3), channels=(1, 10), form="columns"),
    Case(3, padding=(1, 1, 1, 1), channels=(3, 5), form="columns"),
]


@dataclass
class Operands:
    x: Tensor
    weight: Tensor
    shift: Tensor
    residual: Tensor
    mask: Tensor

    @property
    def double(self) -> Operands:
        return Operands(*(getattr(self, name).double() for name in self.__dataclass_fields__))


def operands(case: Case, dtype: torch.dtype, seed: int = 0) -> Operands:
    g = torch.Generator().manual_seed(seed)
    c, k = case.channels
    h, w = case.size
    top, bottom, left, right = case.padding
    oh = output_size(h, case.kernel, case.stride, case.dilation, top, bottom)
    ow = output_size(w, case.kernel, case.stride, case.dilation, left, right)
    return Operands(
        random_map(2, c, h, w, dtype, g),
        random_map(k, c // case.groups, case.kernel, case.kernel, dtype, g, 0.2),
        torch.randn(k, generator=g).to(dtype).to(DEVICE),
        random_map(2, k, oh, ow, dtype, g),
        random_map(2, k, oh, ow, dtype, g),
    )


def run(case: Case, o: Operands, act: str, guard: Guarded, mask_act: str = "none") -> tuple[Tensor, Tensor]:
    """y and z by the case's kernel, every operand between bands of NaN."""
    dtype = o.x.dtype
    y, z = guard.empty(*o.residual.shape, dtype=dtype), guard.empty(*o.residual.shape, dtype=dtype)
    with forced(Config(case.form, 32, 32, 16)):
        launch(
            guard(o.x),
            guard(o.weight),
            y,
            case.geometry,
            act,
            shift=guard(o.shift),
            residual=guard(o.residual),
            z=z,
            mask=None if mask_act == "none" else guard(o.mask),
            mask_act=mask_act,
        )
    guard.check()
    return y, z


def reference(case: Case, o: Operands, act: str, mask_act: str = "none") -> tuple[Tensor, Tensor]:
    return conv2d_forward_reference(
        o.x,
        o.weight,
        o.shift,
        o.residual,
        case.geometry,
        act,
        None if mask_act == "none" else o.mask,
        mask_act,
    )


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms of the kernels that run."""
    seen: list[str] = []
    plain = conv2d_kernels.product_options

    def spy(kernel, config, dtype):
        seen.append(config.form)
        return plain(kernel, config, dtype)

    monkeypatch.setattr("gigamorph.kernels.conv2d_forward.product_options", spy)
    return seen


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in DTYPES if d in (torch.float64, torch.bfloat16) or c.kernel == 3],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_against_float64(case: Case, dtype: torch.dtype, forms: list[str]) -> None:
    o = operands(case, dtype)
    y, z = run(case, o, "silu", Guarded())
    assert forms == [case.form], "what descriptors cannot do falls back to pointers"
    oracle_y, oracle_z = reference(case, o.double, "silu")
    tf32 = dtype == torch.float32
    assert_close("z", z, oracle_z, tf32=tf32)
    assert_close("y", y, oracle_y, tf32=tf32)


@pytest.mark.parametrize("form", ["descriptor", "pointer"])
def test_ieee_float32_where_tf32_is_off(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = Case(3, padding=(1, 1, 1, 1), form=form)
    o = operands(case, torch.float32)
    y, _ = run(case, o, "relu", Guarded())
    assert_close("y", y, reference(case, o.double, "relu")[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["descriptor", "pointer"])
def test_no_worse_than_stock_in_16_bits(form: str, dtype: torch.dtype) -> None:
    case = Case(3, padding=(1, 1, 1, 1), form=form, channels=(64, 32), size=(7, 29))
    o = operands(case, dtype)
    y, _ = run(case, o, "relu", Guarded())
    oracle = reference(case, o.double, "relu")[0]
    assert_close("y", y, oracle, stock=reference(case, o, "relu")[0])


@pytest.mark.parametrize("mask_act", ["relu6", "gradient"])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("form", ["descriptor", "pointer"])
def test_activations_and_masks(form: str, act: str, mask_act: str) -> None:
    case = Case(3, stride=2, padding=(1, 1, 1, 1), form=form, size=(6, 18))
    o = operands(case, torch.float64)
    y, z = run(case, o, act, Guarded(), mask_act)
    oracle_y, oracle_z = reference(case, o.double, act, mask_act)
    if mask_act == "gradient":
        oracle_z.requires_grad_()
        (of_autograd,) = torch.autograd.grad(activate_reference(oracle_z, act), oracle_z, o.mask)
        assert_close("reference", oracle_y, of_autograd)
    assert_close("y", y, oracle_y)
    assert_close("z", z, oracle_z)


@pytest.mark.parametrize("form", ["descriptor", "pointer"])
def test_windows_of_larger_buffers(form: str) -> None:
    """Parts of larger buffers are read and written in place, and nothing around them."""
    g = torch.Generator().manual_seed(1)
    whole = random_map(2, 16, 20, 40, torch.float64, g)
    target = torch.full_like(whole, 7.0)
    weight = random_map(16, 16, 3, 3, torch.float64, g, 0.2)
    x, y = whole[:, :, 3:12, 5:26], target[:, :, 2:11, 6:27]
    with forced(Config(form, 32, 16, 16)):
        launch(x, weight, y, ConvGeometry.of(padding=(1, 1, 1, 1)), "none")
    oracle = torch.nn.functional.conv2d(x, weight, padding=1)
    assert_close("y", y, oracle)
    y.fill_(7.0)
    assert (target == 7.0).all()


@pytest.mark.parametrize("form", ["descriptor", "pointer"])
def test_order_of_programs_does_not_matter(form: str) -> None:
    case = Case(3, stride=2, padding=(1, 1, 1, 1), form=form)
    o = operands(case, torch.bfloat16)
    assert_order_free(lambda: run(case, o, "relu", Guarded()))


def test_empty_maps() -> None:
    x = torch.zeros(1, 8, 4, 0, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 8, 1, 1, device=DEVICE)
    launch(x, weight, torch.zeros(1, 8, 4, 0, device=DEVICE), ConvGeometry(), "none")


@settings(max_examples=15, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    groups=st.integers(1, 2),
    eights=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random(kernel, stride, dilation, size, padding, channels, groups, eights, seed) -> None:
    """Whatever kernel the launcher takes for it."""
    unit = 8 * groups if eights else groups
    c, k = unit * channels[0], unit * channels[1]
    oh = output_size(size[0], kernel[0], stride[0], dilation[0], padding[0], padding[1])
    ow = output_size(size[1], kernel[1], stride[1], dilation[1], padding[2], padding[3])
    if oh < 1 or ow < 1:
        return
    g = torch.Generator().manual_seed(seed)
    x = random_map(2, c, *size, torch.float64, g)
    weight = random_map(k, c // groups, *kernel, torch.float64, g)
    guard = Guarded()
    y = guard.empty(2, k, oh, ow, dtype=torch.float64)
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    launch(guard(x), guard(weight), y, geometry, "relu")
    guard.check()
    oracle = conv2d_forward_reference(x, weight, None, None, geometry, "relu")[0]
    assert_close("y", y, oracle)


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(
    rows=st.sampled_from([1, 2, 4, 8, 32]),
    block_n=st.sampled_from([16, 128]),
    parts=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    channels=st.tuples(st.integers(1, 3), st.sampled_from([1, 9, 17])),
    seed=st.integers(0, 99),
)
def test_boxes(rows, block_n, parts, kernel, stride, dilation, size, padding, channels, seed) -> None:
    """Tiles of several rows: every operand of the epilogue, and the moments of what is written."""
    c, k = (8 * n for n in channels)
    oh, ow = (output_size(size[d], kernel[d], stride, dilation, *padding[2 * d : 2 * d + 2]) for d in range(2))
    if oh < 1 or ow < 1:
        return
    g = torch.Generator().manual_seed(seed)
    x, weight = random_map(2, c, *size, torch.float64, g), random_map(k, c, *kernel, torch.float64, g)
    residual, mask = random_map(2, k, oh, ow, torch.float64, g), random_map(2, k, oh, ow, torch.float64, g)
    shift = torch.rand(k, generator=g, dtype=torch.float64).to(DEVICE)
    guard = Guarded()
    y, z = (guard.empty(2, k, oh, ow, dtype=torch.float64) for _ in range(2))
    geometry = ConvGeometry.of((stride, stride), padding, (dilation, dilation))
    inputs = {"shift": guard(shift), "residual": guard(residual), "mask": guard(mask), "z": z}
    with forced(Config("descriptor", 32, block_n, 16, rows=rows, parts=parts)):
        found = launch(guard(x), guard(weight), y, geometry, "silu", **inputs, mask_act="relu6", moments=True)
    guard.check()
    oracle = conv2d_forward_reference(x, weight, shift, residual, geometry, "silu", mask, "relu6")
    for name, ours, wanted in (("y", y, oracle[0]), ("z", z, oracle[1])):
        assert_close(name, ours, wanted)
    assert found is not None
    for name, ours, wanted in zip(("mean", "m2"), found, moments_reference(oracle[0]), strict=True):
        assert_close(name, ours, wanted)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    channels=st.integers(1, 4),
    filters=st.sampled_from([1, 5, 16, 20]),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 7), st.integers(2, 7)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 11), st.integers(1, 17)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    block_k=st.sampled_from([16, 64]),
    branches=st.booleans(),
    seed=st.integers(0, 99),
)
def test_few_channels(
    channels, filters, groups, kernel, stride, dilation, size, padding, block_k, branches, seed
) -> None:
    """Columns of the flattened filter, in one step or in several: the epilogue, and the moments of what is written."""
    c, k = channels * groups, filters * groups
    oh, ow = (output_size(size[d], kernel[d], stride[d], dilation[d], *padding[2 * d : 2 * d + 2]) for d in range(2))
    if oh < 1 or ow < 1:
        return
    g = torch.Generator().manual_seed(seed)
    x, weight = random_map(2, c, *size, torch.float64, g), random_map(k, channels, *kernel, torch.float64, g)
    maps = [random_map(2, k, oh, ow, torch.float64, g) if branches else None for _ in range(2)]
    shift = torch.rand(k, generator=g, dtype=torch.float64).to(DEVICE)
    guard = Guarded()
    y, z = (guard.empty(2, k, oh, ow, dtype=torch.float64) for _ in range(2))
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    residual, mask = (None if t is None else guard(t) for t in maps)
    inputs = {"shift": guard(shift), "residual": residual, "mask": mask, "z": z}
    with forced(Config("columns", 32, 16, block_k)):
        found = launch(guard(x), guard(weight), y, geometry, "silu", **inputs, mask_act="relu6", moments=True)
    guard.check()
    oracle = conv2d_forward_reference(x, weight, shift, maps[0], geometry, "silu", maps[1], "relu6")
    for name, ours, wanted in (("y", y, oracle[0]), ("z", z, oracle[1])):
        assert_close(name, ours, wanted)
    assert found is not None
    for name, ours, wanted in zip(("mean", "m2"), found, moments_reference(oracle[0]), strict=True):
        assert_close(name, ours, wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_not_finite_stays_in_its_windows(channels: int) -> None:
    """Columns beyond the filter's last are zeros times nothing, not times whatever lies below the window."""
    x = torch.full((1, channels, 9, 9), float("inf"), device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[:, :, :3] = 1.0
    weight = torch.ones(16, channels, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = torch.empty(1, 16, 7, 7, device=DEVICE).contiguous(memory_format=torch.channels_last)
    launch(x, weight, y, ConvGeometry(), "none")
    assert (y[:, :, 0] == 9 * channels).all() and (y[:, :, 1:] == float("inf")).all()


def test_planted_errors_are_caught() -> None:
    """One wrong pixel, one missing column, one rounding too many: each fails a check."""
    case = Case(3, padding=(1, 1, 1, 1), channels=(64, 32), size=(11, 45))
    o = operands(case, torch.bfloat16)
    y, _ = run(case, o, "none", Guarded())
    oracle = reference(case, o.double, "none")[0]
    stock = reference(case, o, "none")[0]
    assert_close("y", y, oracle)

    wrong_pixel = y.clone()
    wrong_pixel[0, 3, 7, 5] += 0.02 * y.abs().max()
    missing = y.clone()
    missing[..., -1] = float("nan")
    twice_rounded = (y.float() * 1.0039).to(torch.bfloat16)
    for planted in (wrong_pixel, missing, twice_rounded):
        with pytest.raises(AssertionError):
            assert_close("y", planted, oracle, stock=stock)
    assert errors(wrong_pixel, oracle)[0] < 3e-3  # the norm alone would have let it pass


def test_overlapping_tiles_are_caught_by_the_order_of_programs() -> None:
    """Programs that write the same place differently disagree between the two orders."""
    if DEVICE.type == "cuda":
        pytest.skip("programs of a GPU run in no order")
    import triton
    import triton.language as tl

    @triton.jit
    def write_number(y_ptr, BLOCK: tl.constexpr):
        pid = tl.program_id(0)
        tl.store(y_ptr + pid * (BLOCK - 1) + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32) + pid)

    def run_it() -> Tensor:
        y = torch.zeros(32)
        write_number[(2,)](y, BLOCK=8)
        return y

    with pytest.raises(AssertionError):
        assert_order_free(run_it)


def test_a_read_and_a_write_outside_are_caught() -> None:
    guard = Guarded(band=16)
    inner = guard(torch.ones(8, device=DEVICE))
    outside = torch.as_strided(inner, (1,), (1,), inner.storage_offset() + 8)
    assert outside.isnan().all()
    outside.fill_(0.0)
    with pytest.raises(AssertionError):
        guard.check()


@pytest.mark.parametrize(
    ("dtype", "setting", "rounded"),
    [
        (torch.float32, "tf32", True),
        (torch.float32, "ieee", False),
        (torch.bfloat16, "tf32", False),
    ],
)
def test_operands_in_tf32_are_rounded_not_cut(dtype, setting, rounded, monkeypatch) -> None:
    """Cut off, they would all be too small: a bias of some 7e-4."""
    monkeypatch.setattr(windows, "interpreting", lambda: False)
    monkeypatch.setattr(precision, "tf32_settings", lambda: (setting, "ieee"))
    x = torch.zeros(1, 16, 4, 4, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    if not windows.ROUNDS_TO_TF32:
        pytest.skip("Triton before 3.7 cannot")
    assert windows.describe(x, [1, 1, 4, 16], operand=True).round_f32_to_tf32 == rounded
    assert not windows.describe(x, [1, 1, 4, 16]).round_f32_to_tf32, "what is added is added as it is"
