"""The depthwise kernels against a float64 oracle on the inputs as they were rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, random_map
from kernel_references import conv2d_dgrad_reference, conv2d_forward_reference, conv2d_wgrad_reference
from torch import Tensor

from gigamorph.kernels import depthwise, tiles
from gigamorph.kernels.conv2d import conv2d
from gigamorph.kernels.tiles import depthwise_tile
from gigamorph.kernels.windows import ConvGeometry, output_size

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One depthwise convolution; `act` is its own activation, `mask_act` that of the layer below."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    size: tuple[int, int, int, int] = (1, 3, 6, 9)
    act: str = "relu"
    mask_act: str = "relu"

    def __str__(self) -> str:
        parts = (self.kernel, self.stride, self.padding, self.dilation)
        return "-".join(n + "".join(map(str, p)) for n, p in zip("kspd", parts, strict=True)) + f"-{self.act}"

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry.of(self.stride, self.padding, self.dilation, self.size[1])

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, c, h, w = self.size
        (top, bottom, left, right), k, s, d = self.padding, self.kernel, self.stride, self.dilation
        return (
            n,
            c,
            output_size(h, k[0], s[0], d[0], top, bottom),
            output_size(w, k[1], s[1], d[1], left, right),
        )


# Those that every dtype runs.
MAIN = [
    Case((3, 3), padding=(1, 1, 1, 1), size=(2, 20, 5, 7), act="silu"),
    Case((3, 3), (2, 2), (0, 1, 1, 0), act="hardswish", mask_act="silu", size=(1, 5, 8, 9)),
    Case((5, 5), padding=(2, 1, 2, 2), act="relu6", mask_act="gelu"),
    Case((7, 7), padding=(3, 3, 3, 3), act="none", mask_act="none"),
]
CASES = [
    *MAIN,
    Case((3, 3), (2, 2), (1, 1, 1, 1), act="gelu", mask_act="hardswish", size=(2, 3, 7, 9)),
    Case((3, 3), (2, 2), (1, 0, 0, 1), size=(2, 1, 6, 8)),
    Case((3, 3), (2, 1), (1, 0, 2, 1)),
    Case((3, 3), (1, 2), (0, 0, 0, 0)),
    Case((3, 3), (3, 3), (1, 0, 2, 1), size=(1, 3, 8, 10)),
    Case((5, 5), (2, 2), (2, 2, 2, 2), act="silu"),
    Case((7, 7), (2, 2), (3, 3, 3, 3), size=(1, 2, 7, 9)),
    Case((3, 3), dilation=(2, 3), padding=(2, 2, 3, 3)),
    Case((3, 3), (2, 2), dilation=(2, 2), padding=(2, 1, 0, 2)),  # taps meet even rows and columns only
    Case((2, 2), (4, 4), act="none", size=(1, 3, 8, 9)),  # patches with gaps
    Case((2, 2), padding=(3, 2, 3, 4), act="silu"),  # outputs that see padding alone
    Case((1, 1), (2, 2), act="gelu"),
    Case((9, 3), padding=(4, 4, 1, 1), size=(1, 2, 9, 5)),  # more filter rows than are held at once
    Case((9, 2), (2, 2), padding=(4, 4, 1, 0), size=(1, 2, 9, 5)),
    Case((9, 3), padding=(4, 4, 1, 1), size=(1, 1, 9, 5)),  # its filter is read between guard bands, not from a copy
    Case((1, 9), padding=(0, 0, 4, 4)),
    Case((3, 3), padding=(1, 1, 1, 1), size=(1, 1, 1, 1)),
    Case((3, 3), padding=(1, 1, 1, 1), size=(1, 130, 2, 3)),  # more channels than a program takes
    Case((3, 3), padding=(1, 1, 1, 1), size=(1, 2, 2, 300)),  # more pixels than a program takes
]


@dataclass
class Operands:
    x: Tensor
    weight: Tensor
    shift: Tensor
    residual: Tensor
    dy: Tensor
    gate: Tensor
    addend: Tensor
    mask: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        return Operands(*(function(getattr(self, name)) for name in self.__dataclass_fields__))


def operands(case: Case, dtype: torch.dtype, seed: int = 0) -> Operands:
    g = torch.Generator().manual_seed(seed)
    c = case.size[1]
    return Operands(
        x=random_map(*case.size, dtype, g),
        weight=random_map(c, 1, *case.kernel, dtype, g, 0.5),
        shift=random_map(1, c, 1, 1, dtype, g).flatten(),
        residual=random_map(*case.output, dtype, g),
        dy=random_map(*case.output, dtype, g),
        gate=random_map(*case.output, dtype, g, 2.0),
        addend=random_map(*case.size, dtype, g),
        mask=random_map(*case.size, dtype, g, 2.0),
    )


def forward_oracle(case: Case, o: Operands) -> tuple[Tensor, Tensor]:
    return conv2d_forward_reference(o.x, o.weight, o.shift, o.residual, case.geometry, case.act)


def backward_oracle(case: Case, o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    slopes = {"gate": o.gate, "gate_act": case.act, "mask": o.mask, "mask_act": case.mask_act}
    dx = conv2d_dgrad_reference(o.dy, o.weight, o.x.shape[2:], case.geometry, addend=o.addend, **slopes)
    return dx, *conv2d_wgrad_reference(o.weight.shape, o.x, o.dy, o.gate, case.act, case.geometry)


def run_forward(case: Case, o: Operands, y: Tensor, z: Tensor | None = None) -> None:
    epilogue = {"shift": o.shift, "residual": o.residual, "z": z}
    depthwise.forward(o.x, o.weight, y, case.geometry, case.act, **epilogue)


def run_dgrad(case: Case, o: Operands, dx: Tensor) -> None:
    depthwise.dgrad(
        o.dy,
        o.weight,
        dx,
        case.geometry,
        gate=o.gate,
        gate_act=case.act,
        addend=o.addend,
        mask=o.mask,
        mask_act=case.mask_act,
    )


def run_wgrad(case: Case, o: Operands, dw: Tensor, dshift: Tensor) -> None:
    depthwise.wgrad(o.x, o.dy, dw, dshift, case.geometry, gate=o.gate, gate_act=case.act)


def sums(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Buffers of zeros for the weight gradient."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    c = case.size[1]
    return torch.zeros(c, 1, *case.kernel, dtype=dtype, device=DEVICE), torch.zeros(c, dtype=dtype, device=DEVICE)


def check_all(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    """Forward, data gradient and weight gradient between guard bands."""
    o = operands(case, dtype, seed)
    oracle = o.map(Tensor.double)
    guarded = Guarded()
    inside = o.map(guarded)

    y, z = (guarded.empty(*case.output, dtype=dtype) for _ in range(2))
    run_forward(case, inside, y, z)
    for name, result, expected, stock in zip(
        "yz", (y, z), forward_oracle(case, oracle), forward_oracle(case, o), strict=True
    ):
        assert_close(name, result, expected, stock=stock)

    dx = guarded.empty(*case.size, dtype=dtype)
    run_dgrad(case, inside, dx)
    dw, dshift = map(guarded, sums(case, dtype))
    run_wgrad(case, inside, dw, dshift)
    expected_dx, expected_dw, expected_dshift = backward_oracle(case, oracle)
    assert_close("dx", dx, expected_dx, stock=backward_oracle(case, o)[0])
    assert_close("dw", dw, expected_dw)
    assert_close("dshift", dshift, expected_dshift)
    guarded.check()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    check_all(case, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_values_of_other_dtypes(case, dtype):
    check_all(case, dtype)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_random_sizes(data):
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    kernel, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 2)
    padding = (*pair(0, 3), *pair(0, 3))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1]) for i in (0, 1)]
    h, w = (n + data.draw(st.integers(0, 6)) for n in least)
    size = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5)), h, w)
    check_all(Case(kernel, stride, padding, dilation, size), torch.float64, data.draw(st.integers(0, 99)))


def test_plain():
    """Nothing but the convolution."""
    case = CASES[4]
    o = operands(case, torch.float64)
    y = torch.empty_like(o.dy)
    depthwise.forward(o.x, o.weight, y, case.geometry)
    oracle = (o.x, o.weight, None, None, case.geometry, "none")
    assert_close("y", y, conv2d_forward_reference(*oracle)[0])
    dx = torch.empty_like(o.x)
    depthwise.dgrad(o.dy, o.weight, dx, case.geometry)
    dw, dshift = sums(case, torch.float64)
    depthwise.wgrad(o.x, o.dy, dw, dshift, case.geometry)
    expected = (
        conv2d_dgrad_reference(o.dy, o.weight, o.x.shape[2:], case.geometry),
        *conv2d_wgrad_reference(o.weight.shape, o.x, o.dy, None, "none", case.geometry),
    )
    for name, result, oracle in zip(("dx", "dw", "dshift"), (dx, dw, dshift), expected, strict=True):
        assert_close(name, result, oracle)


def window(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """`tensor` inside a larger map of NaN with a margin, and that map."""
    n, c, h, w = tensor.shape
    buffer = torch.full((n, h + 5, w + 4, c), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inner = buffer.permute(0, 3, 1, 2)[:, :, 3:-2, 1:-3]
    inner.copy_(tensor)
    return inner, buffer


@pytest.mark.parametrize("case", [MAIN[0], CASES[4]], ids=str)
def test_windows(case):
    """Inputs and outputs may be parts of larger maps; what lies around them is neither read nor written."""
    o = operands(case, torch.float64)
    inside = replace(o, **{k: window(getattr(o, k))[0] for k in ("x", "residual", "dy", "gate", "addend", "mask")})
    outputs = {k: window(torch.zeros_like(m)) for k, m in {"y": o.dy, "z": o.dy, "dx": o.x}.items()}
    run_forward(case, inside, outputs["y"][0], outputs["z"][0])
    run_dgrad(case, inside, outputs["dx"][0])
    dw, dshift = sums(case, torch.float64)
    run_wgrad(case, inside, dw, dshift)
    y, z = forward_oracle(case, o)
    dx, expected_dw, expected_dshift = backward_oracle(case, o)
    for name, expected in {"y": y, "z": z, "dx": dx}.items():
        inner, buffer = outputs[name]
        assert_close(name, inner, expected)
        assert buffer.isnan().sum() == buffer.numel() - inner.numel(), f"{name}: its surroundings were written"
    assert_close("dw", dw, expected_dw)
    assert_close("dshift", dshift, expected_dshift)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weight_gradient_adds_up(layout):
    """Over two halves of an image, as over tiles, into a buffer of either layout."""
    case = Case((3, 3), padding=(1, 1, 1, 1), size=(1, 3, 8, 9), act="silu")
    o = operands(case, torch.float64)
    dw, dshift = sums(case, torch.float64)
    dw = dw.contiguous(memory_format=layout).fill_(2)
    dshift.fill_(3)
    for rows, read, padding in ((slice(0, 4), slice(0, 5), (1, 0, 1, 1)), (slice(4, 8), slice(3, 8), (0, 1, 1, 1))):
        half = replace(o, x=o.x[:, :, read], dy=o.dy[:, :, rows], gate=o.gate[:, :, rows])
        run_wgrad(replace(case, padding=padding), half, dw, dshift)
    _, expected_dw, expected_dshift = backward_oracle(case, o)
    assert_close("dw", dw, expected_dw + 2)
    assert_close("dshift", dshift, expected_dshift + 3)


def test_order_of_programs():
    case = Case((3, 3), (2, 2), (1, 1, 1, 1), size=(2, 130, 5, 7), act="silu")
    o = operands(case, torch.float32)

    def run() -> tuple[Tensor, ...]:
        y, z, dx = torch.empty_like(o.dy), torch.empty_like(o.dy), torch.empty_like(o.x)
        dw, dshift = sums(case, torch.float32)
        run_forward(case, o, y, z)
        run_dgrad(case, o, dx)
        run_wgrad(case, o, dw, dshift)
        return y, z, dx, dw, dshift

    assert_order_free(run)


# What is done wrong -> the case and operands that the kernels are given instead.
MISTAKES = {
    "padding on the other side": lambda case, o: (replace(case, padding=(0, 1, 0, 1)), o),
    "another dilation": lambda case, o: (replace(case, dilation=(1, 2), padding=(1, 0, 2, 1)), o),
    "another activation": lambda case, o: (replace(case, act="hardswish"), o),
    "turned weights": lambda case, o: (case, replace(o, weight=o.weight.flip(2, 3))),
    "one tap of one channel": lambda case, o: (case, replace(o, weight=_changed(o.weight))),
    "one input pixel": lambda case, o: (case, replace(o, x=_changed(o.x), dy=_changed(o.dy))),
}


def _changed(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 0] += 0.5
    return x


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake):
    case = Case((3, 3), padding=(1, 0, 1, 0), act="silu", size=(1, 3, 6, 7))
    o = operands(case, torch.bfloat16)
    wrong_case, wrong = MISTAKES[mistake](case, o)
    oracle = o.map(Tensor.double)
    y, dx = torch.empty_like(o.dy), torch.empty_like(o.x)
    dw, dshift = sums(case, torch.bfloat16)
    run_forward(wrong_case, wrong, y)
    run_dgrad(wrong_case, wrong, dx)
    run_wgrad(wrong_case, wrong, dw, dshift)
    expected_dx, expected_dw, _ = backward_oracle(case, oracle)
    results = {"y": (y, forward_oracle(case, oracle)[0]), "dx": (dx, expected_dx), "dw": (dw, expected_dw)}
    if "weights" in mistake or "tap" in mistake:  # of which the weight gradient knows nothing
        del results["dw"]
    for name, (result, expected) in results.items():
        with pytest.raises(AssertionError, match=f"{name}: relative L2"):
            assert_close(name, result, expected)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 3), padding=(1, 1, 1, 1), size=(1, 2, 3, 4), act="silu"),
        Case((2, 3), (2, 2), (1, 0, 1, 1), size=(1, 2, 3, 4), act="gelu"),
    ],
    ids=str,
)
def test_gradcheck(case):
    o = operands(case, torch.float64)
    inputs = [t.requires_grad_() for t in (o.x, o.weight, o.shift)]
    place = {"stride": case.stride, "padding": case.padding, "groups": case.size[1], "act": case.act}
    # fast_mode: one random direction for each input and output
    assert torch.autograd.gradcheck(lambda x, w, b: conv2d(x, w, shift=b, **place), inputs, fast_mode=True)


def test_empty_map():
    case = Case((3, 3), padding=(1, 1, 1, 1), size=(0, 3, 4, 5))
    o = operands(case, torch.float32)
    dw, dshift = sums(case, torch.float32)
    run_forward(case, o, torch.empty_like(o.dy))
    run_dgrad(case, o, torch.empty_like(o.x))
    run_wgrad(case, o, dw, dshift)
    assert not dw.any() and not dshift.any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="its maps are files with holes")
def test_offsets_beyond_32_bits(tmp_path):
    """Rows 2^30 elements apart: the fourth begins beyond 2^31."""
    case = Case((3, 3), padding=(1, 1, 1, 1), size=(1, 2, 4, 3), act="silu")
    o = operands(case, torch.float16)

    def far(tensor: Tensor) -> Tensor:
        _, c, h, w = tensor.shape
        length = (h - 1) * 2**30 + w * c
        flat = np.memmap(tmp_path / str(len(list(tmp_path.iterdir()))), np.float16, "w+", shape=(length,))
        return torch.from_numpy(flat).as_strided((1, c, h, w), (length, 1, 2**30, c)).copy_(tensor)

    inside = replace(o, **{k: far(getattr(o, k)) for k in ("x", "residual", "dy", "gate", "addend", "mask")})
    y, z, dx = far(o.dy), far(o.dy), far(o.x)
    run_forward(case, inside, y, z)
    run_dgrad(case, inside, dx)
    dw, dshift = sums(case, torch.float16)
    run_wgrad(case, inside, dw, dshift)
    oracle = o.map(Tensor.double)
    expected_y, expected_z = forward_oracle(case, oracle)
    expected_dx, expected_dw, _ = backward_oracle(case, oracle)
    for name, result, expected in zip(
        ("y", "z", "dx", "dw"), (y, z, dx, dw), (expected_y, expected_z, expected_dx, expected_dw), strict=True
    ):
        assert_close(name, result, expected)


@pytest.mark.parametrize("channels", [1, 3, 16, 24, 72, 96, 144, 768])
@pytest.mark.parametrize("pixels", [1, 7, 100, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_a_gpu(monkeypatch, dtype, channels, pixels):
    """A thread has 16 bytes of channels, fewer where the sums of the weight gradient would not fit in registers."""
    monkeypatch.setattr(tiles, "interpreting", lambda: False)
    tile = depthwise_tile(dtype, channels, 100, pixels)
    assert tile.pixels * tile.channels * dtype.itemsize == 16 * 32 * tile.num_warps
    assert tile.num_warps <= 4 and tile.rows == 4 and tile.channels * dtype.itemsize <= 128
    for taps in (1, 9, 25, 28):
        tile = depthwise_tile(dtype, channels, 100, pixels, taps)
        vector = tile.pixels * tile.channels // (32 * tile.num_warps)
        assert 1 <= vector <= 16 // dtype.itemsize and vector * taps <= 56


def test_refusals():
    x = random_map(1, 4, 3, 3, torch.float32, torch.Generator())
    weight, geometry = torch.zeros(2, 1, 3, 3, device=DEVICE), ConvGeometry.of(padding=(1, 1, 1, 1), groups=4)
    with pytest.raises(ValueError, match=r"depthwise_forward: weights \(2, 1, 3, 3\) for 4 channels"):
        depthwise.forward(x, weight, torch.empty_like(x), geometry)
    with pytest.raises(ValueError, match="depthwise_dgrad"):
        depthwise.dgrad(x, weight, torch.empty_like(x), geometry)
    with pytest.raises(ValueError, match="depthwise_wgrad"):
        depthwise.wgrad(x, x, weight, weight[:, 0, 0, 0], geometry)
