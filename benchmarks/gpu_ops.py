"""Single ops for `gpu.py`: ours against cuDNN in channels-last memory, eager PyTorch and torch.compile.

The layers are the convolutions of ResNet-50 and ConvNeXt-T on a tile of 2048 x 2048 pixels, batch 1, bfloat16. Bytes
are the minimal traffic: each input is read once, each output written once. Before each sample a buffer larger than the
L2 cache is written, and the GPU is kept busy while the host launches.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gigamorph.kernels import choice

DTYPE = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


TILE = 2048


@dataclass(frozen=True)
class Layer:
    """A convolution: `side` is that of its square input; `act` follows it, after an affine map."""

    cin: int
    cout: int
    kernel: int
    stride: int
    side: int
    groups: int = 1
    act: str = "relu"

    def __str__(self) -> str:
        kind = " depthwise" if self.groups > 1 else ""
        step = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{step}{kind} {self.cin}>{self.cout} @{self.side}"

    @property
    def out(self) -> int:
        return self.side // self.stride

    @property
    def pad(self) -> int:
        return self.kernel // 2 if self.kernel % 2 else 0

    @property
    def flops(self) -> int:
        return 2 * self.out**2 * self.cout * self.cin // self.groups * self.kernel**2

    @property
    def bytes(self) -> int:
        """Input and output in bfloat16; of the input, only the part that a filter smaller than its stride reads."""
        read = min(1.0, self.kernel / self.stride) ** 2
        return int(2 * (self.side**2 * self.cin * read + self.out**2 * self.cout))


def resnet50(tile: int = TILE) -> list[Layer]:
    """Return every distinct convolution after the stem."""
    layers, inside = [], 64
    for stage, width in enumerate((64, 128, 256, 512)):
        side = tile // 4 // 2 ** max(0, stage - 1)
        stride = 2 if stage else 1
        layers += [
            Layer(inside, width, 1, 1, side),
            Layer(width, width, 3, stride, side),
            Layer(width, 4 * width, 1, 1, side // stride),
            Layer(inside, 4 * width, 1, stride, side, act="none"),
            Layer(4 * width, width, 1, 1, side // stride),
            Layer(width, width, 3, 1, side // stride),
        ]
        inside = 4 * width
    return list(dict.fromkeys(layers))


def convnext_tiny(tile: int = TILE) -> list[Layer]:
    """Return depthwise filters, the two products of a block, and downsampling."""
    layers = []
    for stage, width in enumerate((96, 192, 384, 768)):
        side = tile // 4 // 2**stage
        layers += [
            Layer(width, width, 7, 1, side, groups=width, act="none"),
            Layer(width, 4 * width, 1, 1, side, act="gelu"),
            Layer(4 * width, width, 1, 1, side, act="none"),
        ]
        if stage:
            layers.append(Layer(width // 2, width, 2, 2, 2 * side, act="none"))
    return layers


class Case(NamedTuple):
    """Candidates for one computation; the first is ours and the second the reference."""

    candidates: dict[str, Callable[[], Any]]
    flops: float
    bytes: float


class Timer:
    """Times candidates alternately. With `prepare`, only call each once, so that compiled code is on disk."""

    def __init__(self, prepare: bool = False, seconds: float = 0.12, least: int = 5, most: int = 25):
        self.prepare, self.seconds, self.least, self.most = prepare, seconds, least, most
        self._flush: Tensor | None = None

    def sample(self, run: Callable[[], Any]) -> float:
        """Return the milliseconds of one call."""
        if DEVICE.type == "cpu":
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        if self._flush is None:
            self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
        self._flush.zero_()
        return choice.elapsed(run)

    def row(self, case: Case) -> dict[str, Any]:
        """Return median and raw times of each candidate, the host's time per call, and failures."""
        row: dict[str, Any] = {"flops": case.flops, "bytes": case.bytes, "ms": {}, "samples": {}, "host_us": {}}
        working = {}
        for name, run in case.candidates.items():
            try:
                run()
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                row.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            working[name] = run
        if self.prepare or not working:
            return row
        for name, run in working.items():
            started = time.perf_counter()
            for _ in range(self.least):
                run()
            row["host_us"][name] = 1e6 * (time.perf_counter() - started) / self.least
        first = {name: self.sample(run) for name, run in working.items()}
        rounds = max(self.least, min(self.most, int(1e3 * self.seconds / max(first.values()))))
        row["samples"] = {name: [] for name in working}
        for _ in range(rounds):
            for name, run in working.items():
                row["samples"][name].append(self.sample(run))
        row["ms"] = {name: statistics.median(samples) for name, samples in row["samples"].items()}
        return row


def randn(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> Tensor:
    """Return random numbers, channels-last if they have four dimensions."""
    x = torch.randn(shape, device=DEVICE, dtype=dtype).mul_(scale)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


forced_ours = choice.override("triton")  # as a decorator


def compiled(run: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    """Compile a function with torch.compile for exactly these shapes."""
    torch._dynamo.reset()  # it stops after eight compilations of a source line
    if DEVICE.type == "cpu":
        fast = torch.compile(run, dynamic=False, backend="eager")  # the C++ compiler takes minutes
    else:
        fast = torch.compile(run, dynamic=False)
    return lambda: fast(*inputs)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "none": lambda t: t}


def _tensors(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, weight, scale, shift."""
    depth = layer.cin // layer.groups
    weight = randn(layer.cout, depth, layer.kernel, layer.kernel, scale=(depth * layer.kernel**2) ** -0.5)
    scale, shift = (torch.rand(layer.cout, device=DEVICE).add(0.5).to(DTYPE) for _ in range(2))
    return randn(1, layer.cin, layer.side, layer.side), weight, scale, shift


def forward(layer: Layer) -> Case:
    """ours, cudnn: the bare convolution; the others with affine map and activation, as in a network."""
    from gigamorph.kernels.conv2d import conv2d

    x, weight, scale, shift = _tensors(layer)
    place = {"stride": layer.stride, "padding": layer.pad, "groups": layer.groups}

    def stock(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        z = F.conv2d(x, weight, **place)
        mean, var = torch.zeros_like(shift), torch.ones_like(shift)
        return ACTS[layer.act](F.batch_norm(z, mean, var, scale, shift))

    def ours(**epilogue: Any) -> Callable[[], Any]:
        return forced_ours(lambda: conv2d(x, weight, **place, **epilogue))

    return Case(
        {
            "ours": ours(),
            "cudnn": lambda: F.conv2d(x, weight, **place),
            "ours_fused": ours(act=layer.act, scale=scale, shift=shift),
            "eager_fused": lambda: stock(x, weight, scale, shift),
            "compile_fused": compiled(stock, x, weight, scale, shift),
        },
        layer.flops,
        layer.bytes,
    )


def backward(layer: Layer, which: str) -> Case:
    """dgrad or wgrad; fused: times the slope of the activation that followed."""
    from gigamorph.kernels.conv2d import conv2d_dgrad, conv2d_wgrad_
    from gigamorph.kernels.windows import ConvGeometry

    x, weight, _, _ = _tensors(layer)
    dy, y = (randn(1, layer.cout, layer.out, layer.out) for _ in range(2))
    stride, groups = [layer.stride] * 2, layer.groups
    place = ConvGeometry.of(stride, [layer.pad] * 4, groups=groups)
    dw = torch.zeros(weight.shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    mask = [which == "dgrad", which == "wgrad", False]

    def cudnn(dy: Tensor, w: Tensor) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, [layer.pad] * 2, [1, 1], False, [0, 0], groups, mask
        )

    def ours(gate: Tensor | None) -> Callable[[], Any]:
        act = "none" if gate is None else "relu"
        if which == "dgrad":
            size = [layer.side] * 2
            return forced_ours(lambda: conv2d_dgrad(dy, weight, gate, act, None, (0, 0), None, "none", size, place))
        return forced_ours(lambda: conv2d_wgrad_(dw, None, x, dy, gate, act, place))

    def fused() -> Any:
        dz = torch.ops.aten.threshold_backward(dy, y, 0)
        return cudnn(dz, weight)

    candidates = {"ours": ours(None), "cudnn": lambda: cudnn(dy, weight)}
    if layer.act == "relu":
        candidates |= {"ours_fused": ours(y), "eager_fused": fused}
    return Case(candidates, layer.flops, layer.bytes)


def stream(op: str, channels: int, side: int) -> Case:
    """Ops that only move memory: their floor is bytes over bandwidth."""
    from gigamorph.kernels.batch_norm import normalize_act
    from gigamorph.kernels.layer_norm import layer_norm, layer_norm_backward
    from gigamorph.kernels.moments import moments
    from gigamorph.kernels.pointwise import act_grad
    from gigamorph.kernels.pool import max_pool2d, max_pool2d_backward
    from gigamorph.kernels.windows import ConvGeometry

    x, other = (randn(1, channels, side, side) for _ in range(2))
    scale, shift = (torch.rand(channels, device=DEVICE).add(0.5) for _ in range(2))
    low = scale.to(DTYPE), shift.to(DTYPE)
    place = [3, 3], ConvGeometry.of((2, 2), (1, 1, 1, 1))
    aten = torch.ops.aten
    _, *statistics_of_rows = aten.native_layer_norm(x.permute(0, 2, 3, 1), [channels], *low, 1e-6)
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    dy = torch.randn_like(y)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (channels,), *low, 1e-6).permute(0, 3, 1, 2)

    def norm_backward(x: Tensor) -> Any:
        rows = other.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        return aten.native_layer_norm_backward(*rows, [channels], *statistics_of_rows, *low, [True, True, True])

    def bn(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, *low, True))

    def our_bn() -> Tensor:
        mean, m2 = moments(x)
        return normalize_act(x, mean, (m2 / side**2 + 1e-5).rsqrt(), scale, shift, None, "relu")

    def pool_backward(x: Tensor) -> Tensor:
        return aten.max_pool2d_with_indices_backward(dy, x, [3, 3], [2, 2], [1, 1], [1, 1], False, indices)

    # Ours, the same of PyTorch, and the traffic in maps of the size of x.
    ops: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Any], float]] = {
        "layer_norm": (lambda: layer_norm(x, *low, 1e-6), norm, 2),
        "layer_norm backward": (lambda: layer_norm_backward(other, x, low[0], 1e-6), norm_backward, 3),
        "relu backward": (lambda: act_grad(other, x, "relu"), lambda t: aten.threshold_backward(other, t, 0), 3),
        "batch norm relu, training": (our_bn, bn, 3),
        "max pool": (lambda: max_pool2d(x, *place), lambda t: F.max_pool2d(t, 3, 2, 1), 5 / 4),
        "max pool backward": (lambda: max_pool2d_backward(dy, x, *place), pool_backward, 9 / 4),
    }
    ours, stock, maps = ops[op]
    case = {"ours": forced_ours(ours), "eager": lambda: stock(x)}
    if not op.endswith("backward"):
        case["compile"] = compiled(stock, x)
    return Case(case, 0, int(maps * x.nbytes))


STREAMS = (
    "layer_norm",
    "layer_norm backward",
    "relu backward",
    "batch norm relu, training",
    "max pool",
    "max pool backward",
)


def stem(side: int, which: str) -> Case:
    """From pixels to the map after the pooling, against the same in separate stock ops."""
    from gigamorph.kernels.stem import stem as fused
    from gigamorph.kernels.stem import stem_gradients
    from gigamorph.kernels.windows import ConvGeometry

    pixels, weight = randn(1, 1, side, side), randn(64, 1, 7, 7, scale=1 / 7)
    shift = torch.rand(64, device=DEVICE).add(0.5).to(DTYPE)
    inputs = pixels, weight, shift, ConvGeometry.of((2, 2), (3, 3, 3, 3)), [1, 1, 1, 1], "relu"

    def stock(weight: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(pixels, weight, shift, 2, 3)), 3, 2, 1)

    bytes_ = pixels.nbytes + 2 * 64 * (side // 4) ** 2
    flops = 2 * (side // 2) ** 2 * 64 * 49
    if which == "forward":
        case = {"ours": forced_ours(lambda: fused(*inputs, False)), "eager": lambda: stock(weight)}
        return Case({**case, "compile": compiled(stock, weight)}, flops, bytes_)
    dy = randn(1, 64, side // 4, side // 4)

    def step() -> Tensor:
        leaf = weight.detach().requires_grad_()
        return torch.autograd.grad(stock(leaf), leaf, dy)[0]

    _, spots = fused(*inputs, True)
    ours = forced_ours(lambda: stem_gradients(dy, spots, *inputs))
    case = {"ours": ours, "eager, forward and backward": step}
    return Case(case, 2 * flops, bytes_ + spots.nbytes)


# Tiles for comparison on a few shapes: form, pixels, channels, depth, warps, stages; rows and parts, if not one.
def ceilings(dry: bool) -> dict[str, Any]:
    """Measure copy bandwidth (bytes read plus written) and the rate of a bfloat16 product, on random data."""
    timer = Timer(seconds=1.0, least=10, most=40)
    n, side = (2**20, 128) if dry else (2**32, 8192)
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    copy = timer.row(Case({"copy": lambda: target.copy_(source)}, 0, 2 * n))
    product = timer.row(Case({"matmul": lambda: a @ b}, 2 * side**3, 6 * side**2))
    return {
        "gb_per_s": 2 * n / copy["ms"]["copy"] / 1e6,
        "tflop_per_s": 2 * side**3 / product["ms"]["matmul"] / 1e9,
        "copy_ms": copy["samples"]["copy"],
        "matmul_ms": product["samples"]["matmul"],
    }


def op_cases(dry: bool) -> dict[str, Callable[[], Case]]:
    """Return every op by name, the most informative first."""
    if dry:
        layers = [Layer(16, 16, 3, 1, 8), Layer(16, 32, 1, 2, 8), Layer(16, 16, 3, 1, 8, groups=16, act="none")]
        streams, side = [(op, 16, 8) for op in STREAMS], 16
    else:
        layers = [*resnet50(), *convnext_tiny()]
        streams = [
            (op, *size)
            for size in ((96, TILE // 4), (64, TILE // 2))
            for op in STREAMS
            if (size[0] == 96) == op.startswith("layer")
        ]
        side = TILE
    cases: dict[str, Callable[[], Case]] = {}
    for which in ("forward", "backward"):
        cases[f"stem {which} @{side}"] = partial(stem, side, which)
    for op, channels, size in streams:
        cases[f"{op} {channels} @{size}"] = partial(stream, op, channels, size)
    for layer, which in itertools.product(layers, ("forward", "dgrad", "wgrad")):
        cases[f"{layer} {which}"] = partial(forward, layer) if which == "forward" else partial(backward, layer, which)
    return cases
