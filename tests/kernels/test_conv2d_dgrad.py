"""The data gradient against a float64 oracle: every stride by phases, masks, gates, addends, windows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, assert_close, assert_order_free, random_map
from kernel_references import conv2d_dgrad_reference
from torch import Tensor

from gigamorph.kernels import conv2d_dgrad as module
from gigamorph.kernels import conv2d_forward as forward
from gigamorph.kernels.conv2d_dgrad import dgrad, phases
from gigamorph.kernels.windows import ConvGeometry, output_size


@dataclass(frozen=True)
class Case:
    kernel: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __str__(self) -> str:
        return f"k{self.kernel}s{self.stride}d{self.dilation}g{self.groups}-pad{''.join(map(str, self.padding))}"


CASES = [
    Case(1),
    Case(1, stride=2),
    Case(3, padding=(1, 1, 1, 1)),
    Case(3, padding=(0, 1, 1, 0)),
    Case(3, stride=2, padding=(1, 1, 1, 1)),
    Case(3, stride=2, padding=(0, 1, 0, 0)),
    Case(7, stride=2, padding=(3, 3, 3, 3)),
    Case(3, dilation=2, padding=(2, 2, 2, 2)),
    Case(3, stride=2, dilation=2, padding=(2, 2, 2, 1)),
    Case(3, stride=4, dilation=2, padding=(2, 2, 2, 1)),
    Case(3, stride=3, padding=(1, 0, 1, 1)),
    Case(2, stride=2),
    Case(4, stride=4),
    Case(3, stride=2, groups=4, padding=(1, 0, 1, 1)),
    Case(5, dilation=2, groups=2, padding=(1, 0, 1, 1)),
]


@dataclass
class Operands:
    dy: Tensor
    weight: Tensor
    gate: Tensor
    addend: Tensor
    mask: Tensor

    @property
    def double(self) -> Operands:
        return Operands(*(getattr(self, name).double() for name in self.__dataclass_fields__))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZE = (13, 17)


def operands(case: Case, dtype: torch.dtype) -> Operands:
    g = torch.Generator().manual_seed(0)
    top, bottom, left, right = case.padding
    oh = output_size(SIZE[0], case.kernel, case.stride, case.dilation, top, bottom)
    ow = output_size(SIZE[1], case.kernel, case.stride, case.dilation, left, right)
    return Operands(
        random_map(2, 24, oh, ow, dtype, g),
        random_map(24, 16 // case.groups, case.kernel, case.kernel, dtype, g, 0.2),
        random_map(2, 24, oh, ow, dtype, g),
        random_map(2, 16, *SIZE, dtype, g),
        random_map(2, 16, *SIZE, dtype, g),
    )


def place(case: Case) -> ConvGeometry:
    return ConvGeometry.of((case.stride,) * 2, case.padding, (case.dilation,) * 2, case.groups)


def run(case: Case, o: Operands, gate_act: str = "relu6", guard: Guarded | None = None) -> Tensor:
    guard = guard or Guarded()
    dx = guard.empty(2, 16, *SIZE, dtype=o.dy.dtype)
    dgrad(
        guard(o.dy),
        guard(o.weight),
        dx,
        place(case),
        gate=guard(o.gate),
        gate_act=gate_act,
        addend=guard(o.addend),
        mask=guard(o.mask),
        mask_act="relu",
    )
    guard.check()
    return dx


def reference(case: Case, o: Operands, gate_act: str = "relu6") -> Tensor:
    return conv2d_dgrad_reference(
        o.dy,
        o.weight,
        SIZE,
        place(case),
        gate=o.gate,
        gate_act=gate_act,
        addend=o.addend,
        mask=o.mask,
        mask_act="relu",
    )


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in DTYPES if d in (torch.float64, torch.bfloat16) or c.kernel == 3],
    ids=str,
)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    o = operands(case, dtype)
    stock = reference(case, o) if dtype in (torch.float16, torch.bfloat16) and case.groups == 1 else None
    assert_close("dx", run(case, o), reference(case, o.double), tf32=dtype == torch.float32, stock=stock)


@pytest.mark.parametrize("act", ["silu", "gelu", "hardswish"])
def test_gates_that_are_read_from_z(act: str) -> None:
    case = Case(3, stride=2, padding=(1, 1, 1, 1))
    o = operands(case, torch.float64)
    assert_close("dx", run(case, o, act), reference(case, o, act))


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(
    case=st.sampled_from(CASES),
    rows=st.tuples(st.integers(0, 12), st.integers(1, 13)),
    cols=st.tuples(st.integers(0, 16), st.integers(1, 17)),
    act=st.sampled_from(["none", "relu"]),
)
def test_addend_of_a_part(case: Case, rows: tuple[int, int], cols: tuple[int, int], act: str) -> None:
    """It begins anywhere in x and ends anywhere; around it nothing is added."""
    o, at = operands(case, torch.float64), (rows[0], cols[0])
    part = o.addend[:, :, rows[0] : rows[0] + rows[1], cols[0] : cols[0] + cols[1]].contiguous(
        memory_format=torch.channels_last
    )
    guard = Guarded()
    dx = guard.empty(2, 16, *SIZE, dtype=torch.float64)
    inputs = {"mask": None if act == "none" else o.mask, "mask_act": act}
    dgrad(guard(o.dy), guard(o.weight), dx, place(case), addend=guard(part), addend_at=at, **inputs)
    guard.check()
    whole = torch.zeros_like(o.addend)
    whole[:, :, rows[0] : rows[0] + rows[1], cols[0] : cols[0] + cols[1]] = part
    oracle = conv2d_dgrad_reference(o.dy, o.weight, SIZE, place(case), addend=whole, **inputs)
    assert_close("dx", dx, oracle)
    again = conv2d_dgrad_reference(o.dy, o.weight, SIZE, place(case), addend=part, addend_at=at, **inputs)
    assert torch.equal(again, oracle)


def test_bare() -> None:
    """Neither gate, addend nor mask; inputs that no tap reaches get zeros."""
    case = Case(1, stride=2)
    o = operands(case, torch.float64)
    dx = Guarded().empty(2, 16, *SIZE, dtype=torch.float64)
    dgrad(o.dy, o.weight, dx, place(case))
    assert_close("dx", dx, conv2d_dgrad_reference(o.dy, o.weight, SIZE, place(case)))
    assert (dx[:, :, 1::2] == 0).all() and (dx[:, :, :, 1::2] == 0).all()


def test_into_a_window_of_a_larger_buffer() -> None:
    case = Case(3, stride=2, padding=(1, 1, 1, 1))
    o = operands(case, torch.float64)
    whole = torch.full((2, 16, 20, 24), 7.0, dtype=torch.float64, device=o.dy.device)
    whole = whole.contiguous(memory_format=torch.channels_last)
    dx = whole[:, :, 4 : 4 + SIZE[0], 3 : 3 + SIZE[1]]
    dgrad(o.dy, o.weight, dx, place(case))
    assert_close("dx", dx, conv2d_dgrad_reference(o.dy, o.weight, SIZE, place(case)))
    dx.fill_(7.0)
    assert (whole == 7.0).all()


def test_order_of_programs_does_not_matter() -> None:
    case = Case(3, stride=2, padding=(1, 1, 1, 1))
    o = operands(case, torch.bfloat16)
    assert_order_free(lambda: run(case, o))


@given(
    kernel=st.integers(1, 7),
    stride=st.integers(1, 5),
    before=st.integers(0, 6),
    dilation=st.integers(1, 4),
    size=st.integers(1, 40),
    after=st.integers(0, 6),
)
def test_phases_hold_every_pair_of_tap_and_output_once(kernel, stride, before, dilation, size, after) -> None:
    """The phases' convolutions of dz visit exactly the (input, tap, output) triples of the forward."""
    outputs = output_size(size, kernel, stride, dilation, before, after)
    if outputs < 1:
        return
    forward = {
        (o * stride - before + r * dilation, r, o)
        for o in range(outputs)
        for r in range(kernel)
        if 0 <= o * stride - before + r * dilation < size
    }
    turned = set()
    for phase in phases(kernel, stride, before, dilation):
        for u, h in enumerate(range(phase.start, size, stride)):
            for position, tap in enumerate(phase.taps):
                o = u - phase.padding + position * phase.dilation
                if 0 <= o < outputs:
                    assert (h, tap, o) not in turned
                    turned.add((h, tap, o))
    assert turned == forward


@settings(max_examples=12, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    groups=st.integers(1, 2),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_random(kernel, stride, dilation, size, padding, groups, dtype, seed) -> None:
    oh = output_size(size[0], kernel[0], stride[0], dilation[0], padding[0], padding[1])
    ow = output_size(size[1], kernel[1], stride[1], dilation[1], padding[2], padding[3])
    if oh < 1 or ow < 1:
        return
    g = torch.Generator().manual_seed(seed)
    dy = random_map(1, 8 * groups, oh, ow, dtype, g)
    weight = random_map(8 * groups, 8, *kernel, dtype, g)
    guard = Guarded()
    dx = guard.empty(1, 8 * groups, *size, dtype=dtype)
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    dgrad(guard(dy), guard(weight), dx, geometry)
    guard.check()
    assert_close("dx", dx, conv2d_dgrad_reference(dy.double(), weight.double(), size, geometry))


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("fault", ["filters not turned", "phase one pixel off", "addend", "mask", "gate"])
    def test_wrong_parts(self, monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype) -> None:
        case = Case(3, stride=2, padding=(1, 1, 1, 1))
        o = operands(case, dtype)
        oracle = reference(case, o.double)
        found = module.phases
        if fault == "filters not turned":
            turned, turn = (
                forward.flipped_filters,
                forward.FilterFlip.of,
            )  # a copy of the filters, and where they are read turned
            turned_back = lambda *given: turned(*given).flip(2, 3).contiguous(memory_format=torch.channels_last)  # noqa: E731
            monkeypatch.setattr(forward, "flipped_filters", turned_back)
            monkeypatch.setattr(
                forward.FilterFlip, "of", lambda rows, cols, weight: turn(rows[::-1], cols[::-1], weight)
            )
        elif fault == "phase one pixel off":
            shifted = lambda *given: [p._replace(padding=p.padding + 1) for p in found(*given)]  # noqa: E731
            monkeypatch.setattr(module, "phases", shifted)
        else:
            part = getattr(o, fault)
            part[1, 3].neg_()
        with pytest.raises(AssertionError, match="dx: relative"):
            assert_close("dx", run(case, o), oracle, tf32=dtype == torch.float32)
