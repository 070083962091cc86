"""Random ConvNets for hypothesis: a list of steps that prints as a program, and a module that runs it.

A step takes maps by number, computes, and appends its results to the maps. Shapes are found by running each candidate
step on the meta device; a step that PyTorch itself rejects there is left out of the program.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Options = dict[str, Any]


def examples(usual: int) -> int:
    """How many random networks a test draws: GIGAMORPH_PROGRAMS=10000 for more than in a usual run."""
    return max(usual, int(os.environ.get("GIGAMORPH_PROGRAMS", "0")))


@dataclass(frozen=True)
class Step:
    """One step: its kind, the maps it takes, its options, and an earlier step whose module it shares."""

    kind: str
    inputs: tuple[int, ...]
    options: Options = field(default_factory=dict)
    shared: int | None = None

    def __str__(self) -> str:
        maps = ", ".join(f"m{i}" for i in self.inputs)
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        shared = "" if self.shared is None else f", module of step {self.shared}"
        return f"{self.kind}({maps}{options}{shared})"


@dataclass(frozen=True)
class Head:
    """One output: what is made of which map."""

    kind: str
    map: int


@dataclass
class Program:
    """A random network, an image size and a tiling; prints readably when a test fails."""

    shape: tuple[int, int, int, int]
    tile: tuple[int, int]
    halos: str
    steps: list[Step]
    heads: list[Head]
    sizes: list[tuple[int, ...]]

    def __repr__(self) -> str:
        lines = [f"image m0 {self.shape}, tile {self.tile}, halos {self.halos}"]
        number = 1
        for i, step in enumerate(self.steps):
            outputs = kind_of(step.kind).outputs
            names = ", ".join(f"m{number + k} {self.sizes[number + k]}" for k in range(outputs))
            lines.append(f"  step {i}: {names} = {step}")
            number += outputs
        lines += [f"  output: {head.kind}(m{head.map})" for head in self.heads]
        return "\n" + "\n".join(lines)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    def build(self) -> RandomNet:
        torch.manual_seed(0)
        return RandomNet(self).double().eval()


@dataclass(frozen=True)
class Kind:
    """How a kind of step is drawn, which module it has, and how it runs."""

    draw: Callable[[Any, tuple[int, ...]], Options]
    run: Callable[[nn.Module | None, Sequence[Tensor], Options], Any]
    module: Callable[[tuple[int, ...], Options], nn.Module] | None = None
    inputs: str = "one"  # "one" map, or "same": two of one shape, or "sized": two of one height and width
    outputs: int = 1


STEPS: dict[str, Kind] = {}
HEADS: dict[str, Callable[[Tensor], Any]] = {}


def _pair(draw: Any, values: Sequence[int]) -> Any:
    """One number, or two for height and width."""
    one = st.sampled_from(values)
    return draw(st.one_of(one, st.tuples(one, one)))


def _two(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


# -- convolutions -------------------------------------------------------------------------------------------------


def _draw_conv(draw: Any, shape: tuple[int, ...]) -> Options:
    channels = shape[1]
    form = draw(st.sampled_from(["plain", "plain", "grouped", "depthwise", "multiplier"]))
    groups = {"plain": 1, "grouped": 2 if channels % 2 == 0 else 1}.get(form, channels)
    out = {"depthwise": channels, "multiplier": 2 * channels}.get(form, draw(st.sampled_from([2, 4, 6])))
    kernel = _pair(draw, [1, 2, 3, 5])
    stride, dilation = _pair(draw, [1, 1, 2, 3]), _pair(draw, [1, 1, 2])
    padding: Any = draw(st.sampled_from(["half", "valid", "number", "same"]))
    if padding == "same" and _two(stride) != (1, 1):
        padding = "half"
    if padding == "half":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(_two(kernel), _two(dilation), strict=True))
    if padding == "number":
        reach = [d * (k - 1) for k, d in zip(_two(kernel), _two(dilation), strict=True)]
        padding = tuple(min(p, r) for p, r in zip(_two(_pair(draw, [0, 1, 2, 4])), reach, strict=True))
    return {
        "out": min(out, 12),
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "act": draw(st.sampled_from(ACTIVATIONS)),
    }


ACTIVATIONS = ["none", "module", "functional", "method", "inplace", "inplace module", "inplace method"]


def _activate(x: Tensor, how: str) -> Tensor:
    match how:
        case "module":
            return nn.GELU()(x)
        case "functional":
            return F.silu(x)
        case "method":
            return x.relu()
        case "inplace":
            return F.leaky_relu(x, 0.1, inplace=True)
        case "inplace module":
            return nn.Hardswish(inplace=True)(x)
        case "inplace method":
            return x.relu_()
    return x


def _conv_module(shape: tuple[int, ...], o: Options) -> nn.Module:
    return nn.Conv2d(
        shape[1], o["out"], o["kernel"], o["stride"], o["padding"], o["dilation"], o["groups"], bias=o["bias"]
    )


STEPS["conv"] = Kind(_draw_conv, lambda m, x, o: _activate(m(x[0]), o["act"]), _conv_module)  # pyright: ignore


def _draw_transposed(draw: Any, shape: tuple[int, ...]) -> Options:
    stride = _pair(draw, [1, 2, 3])
    return {
        "kernel": _pair(draw, [1, 2, 3, 4]),
        "stride": stride,
        "padding": _pair(draw, [0, 1]),
        "output_padding": draw(st.integers(0, min(_two(stride)) - 1)),
        "dilation": _pair(draw, [1, 1, 2]),
        "groups": 2 if shape[1] % 2 == 0 and draw(st.booleans()) else 1,
    }


def _transposed_module(shape: tuple[int, ...], o: Options) -> nn.Module:
    return nn.ConvTranspose2d(
        shape[1], 4, o["kernel"], o["stride"], o["padding"], o["output_padding"], o["groups"], dilation=o["dilation"]
    )


STEPS["conv_transpose"] = Kind(_draw_transposed, lambda m, x, o: m(x[0]), _transposed_module)  # pyright: ignore


# -- pooling, upsampling, padding ---------------------------------------------------------------------------------


def _draw_pool(draw: Any, average: bool) -> Options:
    kernel = _pair(draw, [1, 2, 3, 4])
    o: Options = {
        "kernel_size": kernel,
        "stride": draw(st.one_of(st.none(), st.sampled_from([1, 2, 3, (1, 2), (3, 1)]))),
        "padding": draw(st.integers(0, min(_two(kernel)) // 2)),
        "ceil_mode": draw(st.booleans()),
    }
    if average:
        o["count_include_pad"] = draw(st.booleans())
        o["divisor_override"] = draw(st.sampled_from([None, None, 3]))
    else:
        o["dilation"] = _pair(draw, [1, 1, 2])
    return o


STEPS["max_pool"] = Kind(lambda d, s: _draw_pool(d, False), lambda m, x, o: F.max_pool2d(x[0], **o))
STEPS["MaxPool2d"] = Kind(
    lambda d, s: _draw_pool(d, False),
    lambda m, x, o: m(x[0].relu()),
    lambda s, o: nn.MaxPool2d(**o),  # pyright: ignore
)
STEPS["avg_pool"] = Kind(lambda d, s: _draw_pool(d, True), lambda m, x, o: F.avg_pool2d(x[0], **o))


def _draw_interpolate(draw: Any, shape: tuple[int, ...]) -> Options:
    mode: Options = {"mode": draw(st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic", "area"]))}
    narrowest = 1
    if mode["mode"] in ("bilinear", "bicubic"):
        mode["align_corners"] = draw(st.booleans())
        mode["antialias"] = shape[3] > 1 and draw(st.booleans())
        narrowest += mode["antialias"]  # PyTorch 2.13 gets one column wrong
    if draw(st.booleans()):
        factor = draw(st.sampled_from([2, 2.0, 1.5, (2, 3), (1.0, 2.0), 3, 0.6]))
        if shape[3] * _two(factor)[1] >= narrowest:
            return {**mode, "scale_factor": factor, "recompute_scale_factor": draw(st.sampled_from([None, True]))}
    height, width = shape[2:]
    return {**mode, "size": (draw(st.integers(1, 2 * height + 1)), draw(st.integers(narrowest, 2 * width + 1)))}


STEPS["interpolate"] = Kind(_draw_interpolate, lambda m, x, o: F.interpolate(x[0], **o))


def _draw_pad(draw: Any, shape: tuple[int, ...]) -> Options:
    pad = []
    for size in (shape[3], shape[2]):  # at least one pixel of the map stays
        before = draw(st.integers(-min(2, size - 1), 3))
        pad += [before, draw(st.integers(-min(2, size - 1 + min(before, 0)), 3))]
    return {"pad": tuple(pad), "value": draw(st.sampled_from([0.0, 1.5, None]))}


STEPS["pad"] = Kind(_draw_pad, lambda m, x, o: F.pad(x[0], **o))
STEPS["pad -inf, pool"] = Kind(
    lambda d, s: {"pad": tuple(d(st.integers(0, 1)) for _ in range(4)), "kernel": d(st.sampled_from([2, 3]))},
    lambda m, x, o: F.max_pool2d(F.pad(x[0], o["pad"], value=-math.inf), o["kernel"], 2),
)
STEPS["ZeroPad2d"] = Kind(
    lambda d, s: {"pad": tuple(d(st.integers(0, 2)) for _ in range(4))},
    lambda m, x, o: m(x[0]),  # pyright: ignore
    lambda s, o: nn.ZeroPad2d(o["pad"]),
)


STEPS["repeating pad"] = Kind(
    lambda d, s: {
        "pad": tuple(d(st.integers(0, 3)) for _ in range(4)),
        "mode": d(st.sampled_from(["reflect", "replicate", "circular"])),
    },
    lambda m, x, o: F.pad(x[0], o["pad"], mode=o["mode"]),
)
STEPS["repeating conv"] = Kind(
    lambda d, s: {"stride": d(st.integers(1, 2)), "mode": d(st.sampled_from(["reflect", "replicate", "circular"]))},
    lambda m, x, o: m(x[0]),  # pyright: ignore
    lambda s, o: nn.Conv2d(s[1], 2, 3, o["stride"], 1, padding_mode=o["mode"]),
)


def _draw_slice(draw: Any, shape: tuple[int, ...]) -> Options:
    spans = []
    for size in shape[2:]:
        start = draw(st.one_of(st.none(), st.integers(-2, size - 1)))
        stop = draw(st.one_of(st.none(), st.integers(-2, size)))
        spans.append((start, stop, draw(st.sampled_from([None, None, 1, 2, 3]))))
    return {"rows": spans[0], "cols": spans[1], "ellipsis": draw(st.booleans())}


def _run_slice(_m: nn.Module | None, x: Sequence[Tensor], o: Options) -> Tensor:
    rows, cols = slice(*o["rows"]), slice(*o["cols"])
    return x[0][..., rows, cols] if o["ellipsis"] else x[0][:, :, rows, cols]


STEPS["slice"] = Kind(_draw_slice, _run_slice)
STEPS["narrow"] = Kind(
    lambda d, s: {"dim": (dim := d(st.sampled_from([1, 2, -1]))), "start": d(st.integers(0, s[dim] - 1)), "length": 1},
    lambda m, x, o: x[0].narrow(o["dim"], o["start"], max(1, x[0].shape[o["dim"]] - o["start"] - 1)),
)
STEPS["pixel_unshuffle"] = Kind(
    lambda d, s: {"downscale_factor": d(st.sampled_from([2, 3]))},
    lambda m, x, o: F.pixel_unshuffle(
        x[0][..., : x[0].shape[2] // (r := o["downscale_factor"]) * r, : x[0].shape[3] // r * r], r
    ),
)
STEPS["pixel_shuffle"] = Kind(
    lambda d, s: {}, lambda m, x, o: F.pixel_shuffle(torch.cat([x[0], x[0] * 0.8, x[0].tanh(), -x[0]], 1), 2)
)


def _matrix(x: Tensor, columns: int) -> Tensor:
    """Uneven on purpose: the sum over channels of a softmax, say, is a constant without a gradient."""
    values = torch.linspace(-3, 5, x.shape[1] * columns, dtype=x.dtype, device=x.device).sin()
    return values.reshape(x.shape[1], columns)


# -- per pixel ----------------------------------------------------------------------------------------------------


class _FrozenNorm(nn.BatchNorm2d):
    """A BatchNorm with random statistics."""

    def __init__(self, channels: int):
        super().__init__(channels)
        nn.init.uniform_(self.running_mean, -0.2, 0.2)
        nn.init.uniform_(self.running_var, 0.5, 1.5)
        nn.init.uniform_(self.weight, 0.5, 1.5)


class _RandomLayerNorm(nn.LayerNorm):
    """With a bias, or the mean over channels would be rounding; with a large eps, or two channels would saturate."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=0.1)
        nn.init.uniform_(self.weight, 0.5, 1.5)
        nn.init.uniform_(self.bias, 0.2, 0.8)


STEPS["batch_norm"] = Kind(
    lambda d, s: {"act": d(st.sampled_from(ACTIVATIONS))},
    lambda m, x, o: _activate(m(x[0]), o["act"]),  # pyright: ignore
    lambda s, o: _FrozenNorm(s[1]),
)
STEPS["layer_norm"] = Kind(
    lambda d, s: {"linear": d(st.booleans())},
    lambda m, x, o: (m[1] if o["linear"] else nn.Identity())(m[0](x[0].permute(0, 2, 3, 1))).permute(0, 3, 1, 2),  # pyright: ignore
    lambda s, o: nn.Sequential(_RandomLayerNorm(s[1]), nn.Linear(s[1], 4)),
)
STEPS["prelu"] = Kind(lambda d, s: {}, lambda m, x, o: m(x[0]), lambda s, o: nn.PReLU(s[1]))  # pyright: ignore
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh method": lambda x: x.tanh(),
    "torch.sigmoid": torch.sigmoid,
    "F.elu inplace": lambda x: F.elu(x * 1.0, inplace=True),
    "F.hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "relu6": lambda x: nn.ReLU6(inplace=True)(x + 0.1),
    "clamp": lambda x: x.clamp(min=-0.3, max=0.6),
    "clamp_": lambda x: (x + 0.0).clamp_(-0.4, 0.5),
    "1 - x": lambda x: 1 - x,
    "x ** 2": lambda x: x**2,
    "-x / 2": lambda x: -x / 2,
    "2 * x + 1": lambda x: 2 * x + 1,
    "exp": lambda x: torch.exp(-x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1),
    "softplus": lambda x: F.softplus(x),
    "where": lambda x: torch.where(x > 0, x, 0.2 * x),
    "masked_fill": lambda x: x.masked_fill(x < -0.5, 0.25),
    "channel softmax": lambda x: x.softmax(1),
    "channel normalize": lambda x: F.normalize(x + 0.5, dim=1, eps=1e-3),
    "channel mean gate": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "channel max gate": lambda x: x * x.amax(dim=1, keepdim=True).sigmoid(),
    "channel std": lambda x: x - x.var(1, keepdim=True, unbiased=False),
    "add_": lambda x: (x * 2).add_(x, alpha=0.5),
    "mul_": lambda x: (x + 1).mul_(x.sigmoid()),
    "div_ sub_": lambda x: (x * 3).div_(2).sub_(0.5),
    "contiguous": lambda x: x.contiguous().to(torch.float64).clone(),
    "shuffle": lambda x: x.view(x.shape[0], -1, 1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "radix sum": lambda x: torch.stack([x, x * 0.5], dim=1).sum(dim=1),
    "unsqueeze": lambda x: (x.unsqueeze(1) * 0.5).squeeze(1),
    "channels last linear": lambda x: (x.permute(0, 2, 3, 1) @ _matrix(x, 3)).permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3).relu().transpose(-1, -2),
    "flip channels": lambda x: x.flip(1),
    "expand": lambda x: x + x.mean(1, keepdim=True).expand_as(x),
    "repeat": lambda x: x.mean(1, keepdim=True).repeat(1, 3, 1, 1),
}


def _own(x: Tensor) -> Tensor:
    """The same, with a gradient in the map's own memory order: stock's batch norm of one image needs that (2.13)."""
    return F.avg_pool2d(x, 1)


def _written(x: Tensor, key: Any, value: Any) -> Tensor:
    y = x.clone()
    y[key] = value
    return y


def _collected(x: Tensor) -> Tensor:
    """Channels put into an empty tensor, one half after the other."""
    y, half = torch.empty_like(x), x.shape[1] // 2
    y[:, :half], y[:, half:] = x[:, :half].tanh(), x[:, half:] * 0.5
    return y


def _framed(x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:2], x.shape[2] + 3, x.shape[3] + 1)
    y[:, :, 1:-2, :-1] = x
    return y


ALL = slice(None)
POINTWISE |= {
    "asinh": torch.asinh,
    "sinc": lambda x: torch.sinc(x * 0.3),
    "copysign": lambda x: torch.copysign(x, 0.3 - x),
    "special": lambda x: torch.special.expit(x) + torch.special.ndtr(x.clamp(-2, 2)),
    "full_like": lambda x: x * torch.full_like(x, 0.5) + x.data,
    "einsum": lambda x: torch.einsum("nchw,cd->ndhw", _own(x), _matrix(x, 3)),
    "einsum of tokens": lambda x: torch.einsum("npc,cd->ndp", _own(x).flatten(2).mT, _matrix(x, 2)).unflatten(
        2, x.shape[2:]
    ),
    "tensordot": lambda x: torch.tensordot(_own(x), _matrix(x, 3), ([1], [0])).movedim(-1, 1),
    "conv1d": lambda x: F.conv1d(_own(x).flatten(2), _matrix(x, 2).T[..., None]).unflatten(2, x.shape[2:]),
    "listed channels": lambda x: x[:, [x.shape[1] - 1, 0, 0]],
    "repeat_interleave": lambda x: x[:, :2].repeat_interleave(2, 1),
    "write a channel": lambda x: _written(x, (ALL, 0), x.sum(1) * 0.1),
    "write a number": lambda x: _written(x, (ALL, slice(1, None)), 0.3) + x,
    "write by a mask": lambda x: _written(x, x < -0.3, -0.3),
    "write the border": lambda x: _written(_written(x, (ALL, ALL, -1), 0.2), (..., slice(0, 1)), 0.0),
    "collect": _collected,
    "index_add": lambda x: x.index_add(1, torch.tensor([0, 0]), torch.cat([x, x], 1)[:, :2], alpha=0.5),
    "sorted channels": lambda x: x.sort(1)[0] * 0.5 + x,
}
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "frame": _framed,
    "rows repeated": lambda x: x[:, :, ::2].repeat_interleave(2, 2),
    "diff": lambda x: x.diff(dim=2),
    "diff of columns": lambda x: x.diff(n=2, dim=-1),
    "last row first": lambda x: torch.cat([x[:, :, -1:], x], 2),
    "rolled": lambda x: torch.cat([x[..., 2:], x[..., :2]], -1),
}
STEPS["moved"] = Kind(lambda d, s: {"how": d(st.sampled_from(sorted(MOVED)))}, lambda m, x, o: MOVED[o["how"]](x[0]))
STEPS["pointwise"] = Kind(
    lambda d, s: {"how": d(st.sampled_from(sorted(POINTWISE)))}, lambda m, x, o: POINTWISE[o["how"]](x[0])
)


class Scale(nn.Module):
    """A layer scale, in one of the spellings that networks use."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor, how: str) -> Tensor:
        if how == "view":
            return x * self.gamma.view(1, -1, 1, 1)
        if how == "index":
            return x.mul(self.gamma[None, :, None, None])
        return torch.addcmul(x, x, self.gamma.reshape(-1, 1, 1), value=0.5)


STEPS["scale"] = Kind(
    lambda d, s: {"how": d(st.sampled_from(["view", "index", "addcmul"]))},
    lambda m, x, o: m(x[0], o["how"]),  # pyright: ignore
    lambda s, o: Scale(s[1]),
)

# -- statistics of the whole image in the middle of the network -----------------------------------------------------
# Behind each norm something curved: the mean over the image of what was normalised is a constant without a gradient.


class _LiveNorm(nn.BatchNorm2d):
    """BatchNorm of its input's own statistics, whatever the mode; a large eps, since maps may have one pixel."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=0.1, track_running_stats=False)
        nn.init.uniform_(self.weight, 0.5, 1.5)
        nn.init.uniform_(self.bias, -0.5, 0.5)

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


class _GroupNorm(nn.GroupNorm):
    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=0.1)
        nn.init.uniform_(self.weight, 0.5, 1.5)
        nn.init.uniform_(self.bias, -0.5, 0.5)


STATISTICS: dict[str, Kind] = {
    "live batch norm": Kind(
        lambda d, s: {"act": d(st.sampled_from(ACTIVATIONS))},
        lambda m, x, o: torch.tanh(_activate(m(x[0]), o["act"]) + 0.3),  # pyright: ignore
        lambda s, o: _LiveNorm(s[1]),
    ),
    "group norm": Kind(
        lambda d, s: {"groups": d(st.sampled_from([g for g in (1, 2, 3) if s[1] % g == 0]))},
        lambda m, x, o: torch.tanh(m(x[0]) + 0.3),  # pyright: ignore
        lambda s, o: _GroupNorm(o["groups"], s[1]),
    ),
    "instance norm": Kind(
        lambda d, s: {"affine": d(st.booleans())},
        lambda m, x, o: torch.tanh(m(x[0]) + 0.3),  # pyright: ignore
        lambda s, o: nn.InstanceNorm2d(s[1], eps=0.1, affine=o["affine"]),
    ),
    "gate": Kind(
        lambda d, s: {"by": d(st.sampled_from(["mean", "max", "pool", "both"]))},
        lambda m, x, o: m(x[0], o["by"]),  # pyright: ignore
        lambda s, o: Gate(s[1]),
    ),
}
STRIPS: dict[str, Kind] = {
    "strips": Kind(
        lambda d, s: {"by": d(st.sampled_from(["rows", "columns", "sum", "product", "max", "var", "grid"]))},
        lambda m, x, o: m(x[0], o["by"]),  # pyright: ignore
        lambda s, o: Strips(s[1]),
    ),
}


class Strips(nn.Module):
    """Positions weighted by what is reduced to rows, to columns, or to a grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.rows, self.cols = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor, by: str) -> Tensor:
        if by == "grid":
            found = torch.tanh(self.rows(F.adaptive_avg_pool2d(x, (3, 2))))
            return x * F.interpolate(found, x.shape[2:], mode="bilinear").sigmoid()
        if by == "max":
            return x * self.rows(x.amax(3, keepdim=True)).sigmoid() + F.adaptive_max_pool2d(x, (1, None))
        if by == "var":
            return x * self.rows(x.var(3, keepdim=True, correction=0) + x.mean(3, keepdim=True)).sigmoid()
        rows, cols = self.rows(x.mean(3, keepdim=True)), self.cols(F.adaptive_avg_pool2d(x, (1, None)))
        weights = {"rows": rows, "columns": cols, "sum": rows + cols, "product": rows.tanh() @ cols.tanh()}[by]
        return x * weights.sigmoid()


class Gate(nn.Module):
    """Squeeze-and-excite: channels weighted by what is pooled over the image."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor, by: str) -> Tensor:
        pooled = x.amax((2, 3), keepdim=True) if by == "max" else x.mean((2, 3), keepdim=True)
        if by == "pool":
            pooled = F.adaptive_avg_pool2d(x, 1)
        gate = self.excite(torch.tanh(self.squeeze(pooled)))
        if by == "both":
            gate = gate + self.excite(torch.tanh(self.squeeze(F.adaptive_max_pool2d(x, 1))))
        return x * torch.sigmoid(gate)


# -- several inputs or outputs ------------------------------------------------------------------------------------

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a + b": lambda a, b: a + b,
    "a - b / 2": lambda a, b: torch.sub(a, b, alpha=0.5),
    "a * b": lambda a, b: a * b.tanh(),
    "copy += b": lambda a, b: a.clone().add_(b),
    "max": lambda a, b: torch.maximum(a, b),
    "a / (1 + b^2)": lambda a, b: a / (1 + b * b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
}
STEPS["join"] = Kind(
    lambda d, s: {"how": d(st.sampled_from(sorted(JOINS)))}, lambda m, x, o: JOINS[o["how"]](*x), inputs="same"
)
STEPS["cat"] = Kind(
    lambda d, s: {"dim": d(st.sampled_from([1, 1, -3, -3, 2, -1]))},
    lambda m, x, o: torch.cat(x, o["dim"]),
    inputs="sized",
)
STEPS["chunk"] = Kind(lambda d, s: {}, lambda m, x, o: x[0].chunk(2, 1), outputs=2)
STEPS["split"] = Kind(
    lambda d, s: {"first": 1},
    lambda m, x, o: torch.split(x[0], [o["first"], x[0].shape[1] - o["first"]], dim=1),
    outputs=2,
)
STEPS["slices"] = Kind(lambda d, s: {}, lambda m, x, o: (x[0][:, :1], x[0][:, 1:]), outputs=2)

# -- outputs ------------------------------------------------------------------------------------------------------

HEADS |= {
    "mean": lambda x: x.mean((2, 3)),
    "mean keepdim": lambda x: x.mean(dim=[-1, -2], keepdim=True).flatten(1),
    "mean of all": lambda x: x.mean(),
    "torch.sum": lambda x: torch.sum(x, dim=(2, 3)),
    "sum over N, H, W": lambda x: x.sum((0, 2, 3)),
    "amax": lambda x: x.amax((2, 3)),
    "amax of relu": lambda x: x.relu().amax(dim=(-2, -1)),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "AdaptiveMaxPool2d": lambda x: nn.AdaptiveMaxPool2d((1, 1))(x).squeeze(-1).squeeze(-1),
    "adaptive max of ties": lambda x: F.adaptive_max_pool2d(x.round(), 1),
    "grid": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "max grid": lambda x: F.adaptive_max_pool2d(x, (2, 1)),
    "full avg_pool2d": lambda x: F.avg_pool2d(x, x.shape[2:]),
    "full max_pool2d": lambda x: F.max_pool2d(x.relu(), x.shape[2:]),
    "tokens": lambda x: x.flatten(2).mean(-1),
    "channels last mean": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    "rows": lambda x: x.mean(3),
    "the map": lambda x: x,
    "map and mean": lambda x: {"map": x, "mean": x.mean((2, 3))},
    "Gram": lambda x: torch.einsum("nchw,ndhw->ncd", *[_own(x)] * 2) / x[0, 0].numel(),
    "class activation": lambda x: (
        torch.einsum("nchw,nhw,cd->nd", y := _own(x), y.mean(1), _matrix(x, 2)) / x[0, 0].numel()
    ),
    "mirrored": lambda x: x.flip(3).mT,
    "softmax of mean": lambda x: F.log_softmax(x.mean((2, 3)) @ _matrix(x, 2), 1),
}


def kind_of(name: str) -> Kind:
    return {**STEPS, **STATISTICS, **STRIPS}[name]


class RandomNet(nn.Module):
    """Runs a `Program`."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        self.layers = nn.ModuleDict()
        taken = 0
        starts = []
        for i, step in enumerate(program.steps):
            kind = kind_of(step.kind)
            starts.append(taken)
            taken += kind.outputs
            if kind.module is not None and step.shared is None:
                self.layers[str(i)] = kind.module(program.sizes[step.inputs[0]], step.options)

    def forward(self, x: Tensor) -> Any:
        maps = [x]
        for i, step in enumerate(self.program.steps):
            number = str(i if step.shared is None else step.shared)
            module = self.layers[number] if number in self.layers else None  # noqa: SIM401
            result = kind_of(step.kind).run(module, [maps[m] for m in step.inputs], step.options)
            maps.extend([result] if isinstance(result, Tensor) else result)
        outputs = [HEADS[head.kind](maps[head.map]) for head in self.program.heads]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _try(kind: Kind, step: Step, shapes: list[tuple[int, ...]], module_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the step's results, or none where PyTorch rejects it or nothing is left."""
    normalises = step.kind == "layer_norm" or str(step.options.get("how")).startswith("channel ")
    if normalises and module_shape[1] == 1:
        return []  # a constant, whose gradient is nothing but rounding
    if step.kind == "instance norm" and module_shape[0] == 1:
        return []  # stock's gradient of one image is wrong where it arrives in channels-last order (PyTorch 2.13)
    inputs = [torch.empty(shapes[i], device="meta", dtype=torch.float64) for i in step.inputs]
    try:
        with torch.device("meta"):
            module = kind.module(module_shape, step.options) if kind.module else None
        if module is not None:
            module = module.double().eval()
        with torch.no_grad():
            result = kind.run(module, inputs, step.options)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        return []
    results = [result] if isinstance(result, Tensor) else list(result)
    if len(results) != kind.outputs or any(0 in r.shape for r in results):
        return []
    if "pool" in step.kind.lower() and results[0].shape[2:] == (1, 1) != shapes[step.inputs[0]][2:]:
        return []  # a global pooling, behind which no map may follow
    limit = 24 * 40 * 40 * 3
    return [] if any(r.numel() > limit or r.shape[1] > 24 for r in results) else [tuple(r.shape) for r in results]


@st.composite
def programs(draw: Any, max_steps: int = 7, statistics: bool = False, strips: bool = False) -> Program:
    """Networks of up to `max_steps` steps and three outputs, with an image and a tile of any size.

    With `statistics` of the whole image in the middle of the network, too, or with those of rows, columns and grids.
    """
    side = st.sampled_from([7, 13, 16, 17, 1, 2, 5, 9, 11, 19, 23, 29, 31, 32, 33, 37])
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(side), draw(side))
    tile = tuple(
        max(draw(st.sampled_from([3, 4, 5, 7, 8, 1, 2, 11, 16, 21, 32, 64])), -(-size // 8)) for size in shape[2:]
    )
    shapes: list[tuple[int, ...]] = [shape]
    steps: list[Step] = []
    for _ in range(draw(st.integers(2, max_steps)) * 3 // 2):  # some are rejected
        names = sorted(STEPS) + ["conv"] * 6 + ["join"] * 3 + ["cat"] * 2 + sorted(STATISTICS) * (8 * statistics)
        names += sorted(STRIPS) * (16 * strips)
        name = draw(st.sampled_from(names))
        kind = kind_of(name)
        # Late maps first: most networks are deep; the others are branches.
        first = len(shapes) - 1 - min(draw(st.integers(0, 5)), len(shapes) - 1) // 2
        inputs: tuple[int, ...] = (first,)
        if kind.inputs != "one":
            mates = [
                i
                for i, s in enumerate(shapes)
                if s[2:] == shapes[first][2:] and (kind.inputs == "sized" or s == shapes[first])
            ]
            inputs = (first, draw(st.sampled_from(mates)))
        shared = None
        twins = [i for i, s in enumerate(steps) if s.kind == name and s.shared is None and kind.module is not None]
        twins = [i for i in twins if shapes[steps[i].inputs[0]][1] == shapes[first][1]]
        if twins and draw(st.booleans()):
            shared = draw(st.sampled_from(twins))
            step = Step(name, inputs, steps[shared].options, shared)
        else:
            step = Step(name, inputs, kind.draw(draw, shapes[first]))
        results = _try(kind, step, shapes, shapes[first])
        if results:
            steps.append(step)
            shapes.extend(results)
    heads = [Head(draw(st.sampled_from(sorted(HEADS))), len(shapes) - 1)]
    for _ in range(draw(st.integers(0, 2))):
        heads.append(Head(draw(st.sampled_from(sorted(HEADS))), draw(st.integers(0, len(shapes) - 1))))
    halos = draw(st.sampled_from(["device", "device", "disk"]))
    return Program(shape, (tile[0], tile[1]), halos, steps, heads, shapes)
