"""Random programs for the morph engine: any list of (kind, a, b) is a valid network, and shrinks to a few lines.

Operands are picked by number modulo the live maps; an op that does not fit its operands is left out. Sizes stay tiny:
8x8 images, up to about 12 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Line = tuple[str, int, int]


@dataclass(frozen=True)
class Program:
    """A network as text."""

    lines: tuple[Line, ...]
    head: str  # "gap" or "flatten"
    seed: int

    def build(self, integers: bool = False) -> ProgramNet:
        """The network with random weights and statistics; `integers`: such that no operation rounds."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            net = ProgramNet(self).eval()
            _randomize(net, integers)
        return net


class ProgramNet(nn.Module):
    """Runs a program; its modules are made in a first run on zeros."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        self.parts = nn.ModuleDict()
        self.building = True
        self.eval()
        with torch.no_grad():
            self(torch.zeros(1, 3, 8, 8))
        self.building = False

    def part(self, name: str, make: Callable[[], nn.Module]) -> Any:
        if self.building and name not in self.parts:
            self.parts[name] = make().eval()
        return self.parts[name]

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.part("stem", lambda: nn.Conv2d(3, 4, 3, padding=1))(x)]
        for number, (kind, a, b) in enumerate(self.program.lines):
            first, second = maps[a % len(maps)], maps[b % len(maps)]
            out = KINDS[kind](self, f"{number}_{kind}", first, second, a + b)
            maps += [] if out is None else out
        x = maps[-1]
        x = x.mean((2, 3)) if self.program.head == "gap" else F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.part("head", lambda: nn.Linear(x.shape[1], 3))(x)


def programs(longest: int = 14) -> st.SearchStrategy[Program]:
    """Programs of 2 to `longest` lines."""
    line = st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 9), st.integers(0, 9))
    return st.builds(
        Program,
        st.lists(line, min_size=2, max_size=longest).map(tuple),
        st.sampled_from(["gap", "flatten"]),
        st.integers(0, 99),
    )


Maps = list[Tensor] | None


def _conv(k: int, **options: Any) -> Callable[..., Maps]:
    def run(net: ProgramNet, name: str, x: Tensor, _y: Tensor, n: int) -> Maps:
        c = x.shape[1]
        return [net.part(name, lambda: nn.Conv2d(c, 2 + n % 5, k, padding=k // 2, **options))(x)]

    return run


def _depthwise(multiplier: int) -> Callable[..., Maps]:
    def run(net: ProgramNet, name: str, x: Tensor, _y: Tensor, _n: int) -> Maps:
        c = x.shape[1]
        if c * multiplier > 12 if net.building else name not in net.parts:
            return None
        return [net.part(name, lambda: nn.Conv2d(c, c * multiplier, 3, padding=1, groups=c))(x)]

    return run


def _grouped(net: ProgramNet, name: str, x: Tensor, _y: Tensor, _n: int) -> Maps:
    c = x.shape[1]
    if net.building and c % 2:
        return None
    if not net.building and name not in net.parts:
        return None
    return [net.part(name, lambda: nn.Conv2d(c, 6, 3, padding=1, groups=2))(x)]


def _transposed(net: ProgramNet, name: str, x: Tensor, _y: Tensor, n: int) -> Maps:
    c = x.shape[1]
    groups = 2 if c % 2 == 0 and n % 2 else 1
    return [net.part(name, lambda: nn.ConvTranspose2d(c, 4, 3, padding=1, groups=groups))(x)]


def _shared(net: ProgramNet, _name: str, x: Tensor, y: Tensor, _n: int) -> Maps:
    if net.building and (x.shape[1] != y.shape[1] or "shared" in net.parts):
        return None
    if not net.building and ("shared_done" in net.__dict__ and net.__dict__["shared_done"] != _name):
        return None
    net.__dict__["shared_done"] = _name
    c = x.shape[1]
    conv = net.part("shared", lambda: nn.Conv2d(c, 3, 1))
    return [conv(x), conv(y)]


def _norm(make: Callable[[int], nn.Module]) -> Callable[..., Maps]:
    def run(net: ProgramNet, name: str, x: Tensor, _y: Tensor, _n: int) -> Maps:
        c = x.shape[1]
        return [net.part(name, lambda: make(c))(x)]

    return run


def _group_norm(net: ProgramNet, name: str, x: Tensor, _y: Tensor, _n: int) -> Maps:
    c = x.shape[1]
    return [net.part(name, lambda: nn.GroupNorm(2 if c % 2 == 0 else 1, c))(x)]


def _layer_norm(net: ProgramNet, name: str, x: Tensor, _y: Tensor, _n: int) -> Maps:
    c = x.shape[1]
    return [net.part(name, lambda: nn.LayerNorm(c))(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Maps]:
    def run(net: ProgramNet, name: str, x: Tensor, y: Tensor, _n: int) -> Maps:
        if net.building:
            net.part(name, nn.Identity if x.shape == y.shape else nn.Tanh)
        return [function(x, y)] if isinstance(net.parts[name], nn.Identity) else None

    return run


def _cat(net: ProgramNet, name: str, x: Tensor, y: Tensor, _n: int) -> Maps:
    if net.building:
        net.part(name, nn.Identity if x.shape[1] + y.shape[1] <= 12 else nn.Tanh)
    return [torch.cat([x, y], 1)] if isinstance(net.parts[name], nn.Identity) else None


def _one(function: Callable[[Tensor], Tensor]) -> Callable[..., Maps]:
    return lambda _net, _name, x, _y, _n: [function(x)]


def _even(function: Callable[[Tensor], list[Tensor]]) -> Callable[..., Maps]:
    def run(net: ProgramNet, name: str, x: Tensor, _y: Tensor, _n: int) -> Maps:
        if net.building:
            net.part(name, nn.Identity if x.shape[1] % 2 == 0 else nn.Tanh)
        return function(x) if isinstance(net.parts[name], nn.Identity) else None

    return run


class _Squeeze(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class _Scale(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.reshape(1, -1, 1, 1)


class _Blur(nn.Module):
    """Functional, its groups given by an attribute (BlurPool); another attribute has the same value."""

    def __init__(self, c: int):
        super().__init__()
        self.channels, self.before = c, c
        self.register_buffer("taps", torch.tensor([1.0, 2.0, 1.0]).reshape(1, 1, 1, 3).repeat(c, 1, 1, 1) / 4)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.before}"

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.get_buffer("taps"), padding=(0, 1), groups=self.channels)


class _ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt v2)."""

    def __init__(self, c: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        n = g / (g.mean(dim=1, keepdim=True) + 1e-6)
        return x + x * n * self.gamma.view(1, -1, 1, 1)


class _SpatialGate(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        del c
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.conv(maps).sigmoid()


def _shuffle(x: Tensor) -> list[Tensor]:
    n, c, h, w = x.shape
    return [x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)]


def _gate(x: Tensor) -> list[Tensor]:
    a, b = x.chunk(2, dim=1)
    return [a * b.sigmoid()]


def _in_place(x: Tensor) -> Tensor:
    y = x + 1.0
    y *= 0.5
    return F.relu(y, inplace=True)


KINDS: dict[str, Callable[..., Maps]] = {
    "conv1": _conv(1),
    "conv3": _conv(3, bias=False),
    "conv3_reflect": _conv(3, padding_mode="reflect"),
    "depthwise": _depthwise(1),
    "depthwise2": _depthwise(2),
    "grouped": _grouped,
    "transposed": _transposed,
    "shared": _shared,
    "batch_norm": _norm(nn.BatchNorm2d),
    "instance_norm": _norm(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": _norm(nn.PReLU),
    "scale": _norm(_Scale),
    "squeeze_excite": _norm(_Squeeze),
    "response_norm": _norm(_ResponseNorm),
    "blur": _norm(_Blur),
    "spatial_gate": _norm(_SpatialGate),
    "relu": _one(F.relu),
    "gelu": _one(F.gelu),
    "in_place": _one(_in_place),
    "add": _pair(lambda x, y: x + y),
    "sub": _pair(lambda x, y: 0.5 * x - y),
    "mul": _pair(lambda x, y: torch.tanh(x) * y),
    "cat": _cat,
    "max_pool": _one(lambda x: F.max_pool2d(x, 3, 1, 1)),
    "resize": _one(lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")),
    "flip": _one(lambda x: x.flip(1)),
    "pad": _one(lambda x: F.pad(x, (1, 0, 0, 1))[:, :, : x.shape[2], 1:]),
    "chunk": _even(lambda x: list(x.chunk(2, 1))),
    "gate": _even(_gate),
    "shuffle": _even(_shuffle),
    "slice": _one(lambda x: x[:, 1:] if x.shape[1] > 2 else x),
    "softmax": _one(lambda x: x * x.softmax(1)),
    "sum_gate": _one(lambda x: x * x.sum(1, keepdim=True).sigmoid()),
    "std_gate": _one(lambda x: x / (1 + x.std((1, 2, 3), keepdim=True))),
}

# Kinds that keep copies whatever their number, or (norms) whatever their number as long as it is uniform.
BENIGN = tuple(
    """conv1 conv3 depthwise grouped batch_norm layer_norm relu gelu add cat max_pool squeeze_excite scale prelu
    resize blur""".split()
)
# Without rounding on small integers.
LATTICE = tuple("conv1 conv3 depthwise depthwise2 grouped batch_norm relu add cat max_pool flip pad chunk".split())


def _randomize(net: nn.Module, integers: bool) -> None:
    with torch.no_grad():
        for p in net.parameters():
            if integers:
                p.copy_(torch.randint(-1, 2, p.shape).to(p.dtype))
            elif p.ndim == 1:
                p.copy_(torch.rand(p.shape) + 0.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                if integers:  # var + eps is exactly 1
                    module.running_mean.copy_(torch.randint(-1, 2, module.running_mean.shape).float())
                    module.running_var.fill_(1 - 2.0**-10)
                    module.eps = 2.0**-10
                else:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 1.5)
