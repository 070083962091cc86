"""Statistics of awkward images: NaN and infinities lie where stock PyTorch has them, and finite values are the same.

The measure is 1e-12 in float64. Where stock's own rounding is larger, it is a few times that, which is measured: by
another order in memory, by a last bit of the image and of the parameters, and by norms that are written out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exactness import FLOOR, Step, named, step
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.lowering.ops import Reduction
from gigamorph.engine.tiling.spatial import Maximum

SIZE = (11, 9)
TILE = (6, 5)
KEPT = {"dim": (2, 3), "keepdim": True}


class Scaled(nn.Module):
    """A function between two factors per channel."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.before = nn.Parameter(torch.tensor([1.0, -1.5, 0.5, 2.0]).reshape(4, 1, 1))
        self.behind = nn.Parameter(torch.tensor([0.5, 1.0, -1.0, 1.5]).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.before) * self.behind


class Alone(nn.Module):
    """A function of an image of no gradient."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class WrittenOut(nn.Module):
    """BatchNorm or InstanceNorm as a formula, whose sums stock PyTorch makes in another order."""

    def __init__(self, norm: nn.BatchNorm2d | nn.InstanceNorm2d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.dims = (0, 2, 3) if isinstance(norm, nn.BatchNorm2d) else (2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(self.dims, keepdim=True)
        x = x / (x.square().mean(self.dims, keepdim=True) + self.eps).sqrt()
        return x if self.weight is None else x * self.weight[:, None, None] + self.bias[:, None, None]


def attended(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return (tokens @ (tokens.transpose(1, 2) @ tokens)).transpose(1, 2).reshape(x.shape)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(**KEPT),
    "average pooling": lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid(),
    "max-pooling": lambda x: x - F.adaptive_max_pool2d(x, 1),
    "amax": lambda x: x.amax(**KEPT) + x.sigmoid(),
    "amin": lambda x: x.amin(**KEPT) + x.sigmoid(),
    "amax over channels": lambda x: x.amax((1, 2, 3), keepdim=True) + x.sigmoid(),
    "max": lambda x: x.max() + x.sigmoid(),
    "min": lambda x: x.min() + x.sigmoid(),
    "var": lambda x: x.var(**KEPT) + x,
    "var over channels": lambda x: x.var((1, 2, 3), correction=0, keepdim=True) + x,
    "std": lambda x: x.std(**KEPT) + x,
    "std over the batch": lambda x: x.std((0, 2, 3), keepdim=True) + x,
    "var_mean": lambda x: sum(torch.var_mean(x, **KEPT), x),
    "norm": lambda x: x.norm(**KEPT) + x,
    "norm, p = 1": lambda x: x.norm(p=1, **KEPT) + x,
    "norm, p = inf": lambda x: x.norm(p=math.inf, **KEPT) + x,
    "response norm": lambda x: x * (x.norm(**KEPT) / (x.norm(**KEPT).mean(1, keepdim=True) + 1e-6)),
    "normalize": lambda x: F.normalize(x, dim=(2, 3)),
    "logsumexp": lambda x: x.logsumexp((2, 3), keepdim=True) + x,
    "softmax": lambda x: x.flatten(2).softmax(-1).reshape(x.shape),
    "log_softmax": lambda x: x.flatten(2).log_softmax(-1).reshape(x.shape),
    "masked mean": lambda x: x - (x * (x > 0)).sum(**KEPT) / (x > 0).sum(**KEPT),
    "attention": attended,
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear, corners": lambda x: F.interpolate(x, size=(21, 19), mode="bilinear", align_corners=True),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "BatchNorm, frozen": lambda: nn.BatchNorm2d(4).eval(),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "GroupNorm, no affine": lambda: nn.GroupNorm(1, 4, affine=False),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm that tracks": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "LayerNorm": lambda: nn.LayerNorm([4, *SIZE]),
    "LayerNorm of each channel": lambda: nn.LayerNorm(SIZE, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm([4, *SIZE]),
}
# Norms of values whose squares overflow: by layout and chunks, stock gives NaN, zero or what is right.
OVERFLOWS = ("all large", "one large")
# What does not depend on the precision is tested in float64 alone.
NO_MATTER_OF_PRECISION = ("an infinity", "all infinite", "two NaN", "one denormal")
# Attention and gradients of parameters add what overflows up in some order, to infinities or NaN.
UNORDERED = {"attention": ("one large", "all large"), "response norm": ("all large",)}


def awkward(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Images, 2 x 4 x SIZE."""
    x = torch.randn(2, 4, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    limits = torch.finfo(dtype)
    large = 1e36 if dtype == torch.float32 else 1e300

    def put(*values: float, into: Tensor = x) -> Tensor:
        changed = into.clone()
        for number, value in enumerate(values):
            changed[0, 1, 3 + 4 * number, 3 + 4 * number] = value
        return changed

    yield "zeros", torch.zeros_like(x)
    yield "constant", torch.full_like(x, 0.1)
    yield "an infinity", put(math.inf)
    yield "both infinities", put(math.inf, -math.inf)
    yield "all infinite", torch.full_like(x, math.inf)
    yield "two NaN", put(math.nan, math.nan)
    yield "one large", put(large)
    yield "all large", x * (large / 1e3)
    yield "denormal", x * (limits.smallest_normal / 4)
    yield "one denormal", put(limits.smallest_normal / 8, into=0 * x)
    yield "offset", 1e6 + 0.01 * x if dtype == torch.float64 else 1e3 + x


def tensors(found: Step) -> dict[str, Tensor | None]:
    kept = {f"buffer {name}": buffer for name, buffer in found.buffers.items()}
    return {**named(found.outputs), **found.gradients, **kept, "image": found.image}


def distances(want: dict[str, Tensor | None], have: dict[str, Tensor | None]) -> dict[str, float]:
    """Relative distances of the finite values, infinite where NaN or infinities are not at the same places."""
    largest = max((t.nan_to_num(0, 0, 0).double().norm().item() for t in want.values() if t is not None), default=0.0)
    result = {}
    for name, a in want.items():
        b = have[name]
        assert (a is None) == (b is None), f"{name}: {b} instead of {a}"
        if a is None or b is None:
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        a, b = a.double(), b.double()
        finite = a.isfinite()
        places = torch.equal(a.isnan(), b.isnan()) and torch.equal(finite, b.isfinite())
        signs = places and torch.equal(a[a.isinf()].sign(), b[b.isinf()].sign())
        distance = (a[finite] - b[finite]).norm().item() if places else math.inf
        scale = max(a[finite].norm().item(), FLOOR * largest)
        result[name] = (distance / scale if distance else 0.0) if signs else math.inf
    return result


def noise(network: nn.Module, x: Tensor) -> dict[str, float]:
    """How far stock PyTorch is from itself: in another order, with other last bits, with its norms written out."""
    eps, dice = torch.finfo(x.dtype).eps, torch.Generator().manual_seed(2)

    def shaken(t: Tensor) -> Tensor:
        return t * (1 + eps * (torch.randint(0, 2, t.shape, generator=dice).to(t.dtype) * 2 - 1))

    want, result = tensors(step(copy.deepcopy(network), x)), {}
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(shaken(parameter))
    runs = [(network, x.to(memory_format=torch.channels_last)), (network, shaken(x)), (other, x)]
    if isinstance(network.function, nn.BatchNorm2d | nn.InstanceNorm2d) and network.function.training:
        other = copy.deepcopy(network)
        other.function = WrittenOut(other.function)
        runs.append((other, x))
    for net, image in runs:
        have = tensors(step(copy.deepcopy(net), image))
        for name, distance in distances(want, {**want, **have}).items():
            result[name] = max(result.get(name, 0.0), distance)
    return result


def check(function: Callable[[Tensor], Tensor], dtype: torch.dtype, skipped: tuple[str, ...]) -> None:
    network = Scaled(function).to(dtype)
    fast = accelerate(copy.deepcopy(network), tile=TILE)
    fresh = copy.deepcopy(network.state_dict())
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    for name, x in awkward(dtype):
        if name in skipped or (dtype == torch.float32 and name in NO_MATTER_OF_PRECISION):
            continue
        fast.load_state_dict(fresh)
        found = distances(tensors(step(copy.deepcopy(network), x)), tensors(step(fast, x)))
        wrong = {what: error for what, error in found.items() if error > limit}
        own = noise(network, x) if wrong else {}
        wrong = {what: (error, own[what]) for what, error in wrong.items() if error > 8 * own[what]}
        assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name, dtype):
    check(STATISTICS[name], dtype, UNORDERED.get(name, ()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, dtype):
    norm = NORMS[name]()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(3))
    check(norm, dtype, OVERFLOWS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, lambda channels: nn.GroupNorm(channels, channels)])
def test_constant_maps_are_all_mean(norm, dtype):
    """A norm of a constant map gives its bias but for one rounding, the same at every tile, as the kink of ReLU shows.

    Stock PyTorch rounds it to either side, by the number of pixels and the order in memory.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).to(dtype)
    network[0].bias.requires_grad_(False)  # its gradient is zero but for rounding
    x = torch.zeros(2, 2, 21, 17, dtype=dtype)
    found = [tensors(step(accelerate(copy.deepcopy(network), tile=tile), x)) for tile in (5, 8, 40)]
    rounding = torch.finfo(dtype).eps * 1e-5**-0.5
    output = network[3].bias.detach()[:, None, None]
    assert (found[0]["output 0"] - output).abs().max() < rounding
    for other in found[1:]:
        assert max(distances(found[0], other).values()) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kernel", [1, 2])
def test_transposed_convolutions_before_live_norms(kernel):
    """Nearer to the truth than stock PyTorch, whose BatchNorm adds up one pixel after the other.

    Between the strides of the convolution all pixels are the same; so is their rounding, and it adds up.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.ConvTranspose2d(2, 4, kernel, 3), nn.BatchNorm2d(4), nn.SiLU()).double()
    x = torch.randn(2, 2, 60, 70, dtype=torch.float64)
    with torch.no_grad():
        y = network[0](x).numpy().astype(np.longdouble)
    y = (y - y.mean((0, 2, 3), keepdims=True)) / np.sqrt(y.var((0, 2, 3), keepdims=True) + np.longdouble(1e-5))
    truth = y / (1 + np.exp(-y))
    stock, fast = step(copy.deepcopy(network), x), step(accelerate(copy.deepcopy(network), tile=32), x)
    ours, theirs = (float(np.abs(found.outputs[0].numpy() - truth).max()) for found in (fast, stock))
    assert ours < 5e-15 < 1e-13 < theirs
    network[0].bias.requires_grad_(False)  # its gradient is zero but for rounding
    network[1] = WrittenOut(network[1])
    want = tensors(step(network, x))
    have = {name.replace("buffer ", ""): t for name, t in tensors(fast).items()}
    assert max(distances(want, {**want, **{k: have[k] for k in want if want[k] is not None}}).values()) < 1e-12


COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "count_nonzero": lambda x: torch.count_nonzero(x.relu(), (2, 3)),
    "count_nonzero of everything": lambda x: x.relu().count_nonzero(),
    "sum of truth values": lambda x: (x > 0).sum((2, 3)),
    "sum of integers": lambda x: (10 * x).long().sum((1, 2, 3)),
    "mean of truth values": lambda x: (x > 0).float().mean((2, 3)),
    "share": lambda x: (x > 0).sum((2, 3)) / 99,
    "sum of bytes": lambda x: (x > 0).to(torch.uint8).sum(dtype=torch.float32),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    """Counts are exact, in the dtype that stock PyTorch has."""
    x = torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want, have = COUNTS[name](x), accelerate(Alone(COUNTS[name]), tile=TILE)(x)
    assert want.dtype == have.dtype
    assert torch.equal(want, have)


def test_float32_inside_of_float64():
    """A variance in float32 is rounded once, as stock PyTorch rounds it: its own sums are in float64.

    So are EvoNorm's of timm. The gradient stays in float32, and differs as between two orders in memory.
    """

    def instance_std(x: Tensor) -> Tensor:
        return x / x.float().var(dim=(2, 3), unbiased=False, keepdim=True).add(1e-5).sqrt().to(x.dtype)

    network = Scaled(instance_std).double()
    x = torch.randn(2, 4, 33, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 3
    found = distances(*(tensors(step(net, x)) for net in (network, accelerate(copy.deepcopy(network), tile=8))))
    own = noise(network, x)
    assert found["output 0"] < 1e-15 and found["behind"] < 1e-15
    assert all(error <= 8 * own[name] for name, error in found.items() if error > 1e-15), (found, own)


@pytest.mark.parametrize(("first_only", "wanted"), [(True, [0.0, 0.0, 1.0]), (False, [0.25, 0.0, 0.75])])
def test_maxima_of_processes_with_nan(first_only, wanted):
    """Of several bands' NaN pooling takes the last one, and a maximum all of them."""
    values = torch.tensor([[math.nan], [2.0], [math.nan]])
    numbers = torch.tensor([[1.0], [1.0], [1.0 if first_only else 3.0]])
    reduction = Reduction(None, 0, "max", 1, (0,), True, first_only, outputs=(1,), nan_counts=True)
    for rank in range(3):
        gathered = iter((values, numbers))
        shard = SimpleNamespace(rank=rank, gather=lambda _, gathered=gathered: next(gathered))
        x = values[rank].clone().requires_grad_()
        Maximum.apply(x, numbers[rank], reduction, shard).sum().backward()
        assert x.grad.tolist() == [wanted[rank]]
