"""Whole-image statistics in the middle of a network: reductions, live norms, attention over vectors and tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from around import Around, image, tied
from exactness import Step, assert_exact, buffers, errors, randomize, step, step_errors, take_state
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture.program import Op


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -- reductions over the image, broadcast back ------------------------------------------------------------------------


def grn(x: Tensor) -> Tensor:
    """ConvNeXt-V2's global response norm."""
    g = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x + x * (g / (g.mean(dim=1, keepdim=True) + 1e-6))


def grn_last(x: Tensor) -> Tensor:
    g = x.norm(p=2, dim=(1, 2), keepdim=True)
    return x + x * (g / (g.mean(dim=-1, keepdim=True) + 1e-6))


def masked_mean(x: Tensor) -> Tensor:
    mask = (x[:, :1] > 0).to(x.dtype)
    return x - (x * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)


def counted_mask(x: Tensor) -> Tensor:
    mask = x > 0.1
    return x * (mask.sum((2, 3), keepdim=True) / mask[0, 0].numel())


def softmax_by_hand(x: Tensor) -> Tensor:
    e = (x - x.amax((2, 3), keepdim=True)).exp()
    return x * (e / e.sum((2, 3), keepdim=True))


def attention_pool(x: Tensor) -> Tensor:
    """A global context block's pooling as its authors write it: tokens, softmax, a product over all positions."""
    n, c, h, w = x.shape
    values = x.reshape(n, c, h * w).unsqueeze(1)
    weights = x[:, :1].reshape(n, 1, h * w).softmax(-1).unsqueeze(3)
    return x + torch.matmul(values, weights).reshape(n, c, 1, 1)


def channel_attention(x: Tensor) -> Tensor:
    """Cross-covariance attention over (N, heads, c, H*W)."""
    n, c, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = torch.cat([tokens, tokens.sin(), tokens.cos()], -1).reshape(n, h * w, 3, 2, c // 2).permute(2, 0, 3, 4, 1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attended = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return attended.permute(0, 3, 1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2) + x


def linear_attention(x: Tensor) -> Tensor:
    """EfficientViT's: ReLU features, a column of ones for the denominator."""
    n, c, h, w = x.shape
    q, k, v = torch.cat([x, x.flip(1), x * x], 1).reshape(n, 2, 3 * c // 2, h * w).transpose(-1, -2).chunk(3, -1)
    q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
    out = q @ (k.transpose(-1, -2) @ v)
    out = out[..., :-1] / (out[..., -1:] + 1e-3)
    return out.transpose(-1, -2).reshape(n, c, h, w)


def patches(x: Tensor) -> Tensor:
    """MobileViT-V2's: positions in 1 x 2 patches, separable attention over them, and back."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h, 1, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c, 2, -1)
    context = (F.softmax(x[:, :1], dim=-1) * x).sum(-1, keepdim=True)
    x = F.group_norm(x.relu() * context, 1)
    return x.reshape(n, c, 1, 2, h, w // 2).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h, w)


FUNCTIONS = {
    "mean": lambda x: x * x.mean((2, 3), keepdim=True),
    "mean over batch and image": lambda x: x - x.mean((0, 2, 3), keepdim=True),
    "mean with dtype": lambda x: x * x.float().mean((-1, -2), keepdim=True, dtype=torch.float64),
    "sum of everything": lambda x: x * x.sum() / 1000,
    "count": counted_mask,
    "var": lambda x: x / (x.var((2, 3), keepdim=True) + 1e-3).sqrt(),
    "var, biased": lambda x: x * torch.var(x, (2, 3), unbiased=False)[:, :, None, None],
    "var of everything": lambda x: x * x.var(),
    "var, positional": lambda x: x * x.var((2, 3), False, True),
    "std, correction": lambda x: x / x.std(dim=(1, 2, 3), correction=2, keepdim=True),
    "std of a constant": lambda x: x + (x * 0).std((2, 3), keepdim=True),
    "var_mean": lambda x: (x - torch.var_mean(x, (2, 3), keepdim=True)[1]) * torch.var_mean(x, (2, 3), keepdim=True)[0],
    "std_mean over groups": lambda x: (
        torch.std_mean(x.reshape(x.shape[0], 2, 2, *x.shape[2:]), dim=(2, 3, 4), correction=0, keepdim=True)[0]
        * x.reshape(x.shape[0], 2, 2, *x.shape[2:])
    ).flatten(1, 2),
    "response norm": grn,
    "norm, permuted": lambda x: grn_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "norm of a constant": lambda x: x + (x * 0).norm(dim=(2, 3), keepdim=True),
    "norm, p = 1": lambda x: x / x.norm(p=1, dim=(2, 3), keepdim=True) * 100,
    "norm, p = inf": lambda x: x / x.norm(p=math.inf, dim=(2, 3), keepdim=True),
    "vector_norm": lambda x: x / torch.linalg.vector_norm(x, 2, (1, 2, 3), keepdim=True),
    "norm of everything": lambda x: x / torch.linalg.norm(x) * 20,
    "amin": lambda x: x - x.amin((2, 3), keepdim=True),
    "amax of rounded values": lambda x: x * tied(x.mul(2)).amax((2, 3), keepdim=True),
    "amax over channels and image": lambda x: x + x.amax((1, 2, 3))[:, None, None, None],
    "max of everything": lambda x: x / x.max() + x.abs().min(),
    "logsumexp": lambda x: x - torch.logsumexp(x, (2, 3), keepdim=True),
    "masked mean": masked_mean,
    "softmax by hand": softmax_by_hand,
    "GeM": lambda x: x * F.avg_pool2d(x.clamp(min=1e-3).pow(3.0), x.shape[-2:]).pow(1 / 3.0),
    "normalize over the image": lambda x: F.normalize(x, dim=(2, 3)) * 10,
    "softmax of tokens": lambda x: (x.flatten(2).softmax(-1) * 50).reshape(x.shape),
    "log_softmax of tokens": lambda x: x.flatten(2).log_softmax(2).view_as(x),
    "mean of tokens": lambda x: (x.flatten(2) - x.flatten(2).mean(-1, keepdim=True)).view(x.shape),
    "attention pooling": attention_pool,
    "channel attention": channel_attention,
    "linear attention": linear_attention,
    "patches": patches,
    "space to depth and back": lambda x: (
        F.relu(x.view(2, 4, 19, 7, 2).permute(0, 4, 1, 2, 3).reshape(2, 8, 19, 7).reshape(2, 2, 4, 19, 7) + 0.1)
        .permute(0, 2, 3, 4, 1)
        .reshape(2, 4, 19, 14)
    ),
    "layer norm of the image": lambda x: F.layer_norm(x, x.shape[1:]) + F.layer_norm(x, x.shape[2:]),
    "rms norm of the image": lambda x: F.rms_norm(x, x.shape[1:]) * 2,
    "pooled rows": lambda x: x * F.adaptive_avg_pool2d(x, (None, 1)).sigmoid(),
    "rows by mean": lambda x: x * x.mean(3, keepdim=True).sigmoid(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    assert_exact_by_tiles(Around(FUNCTIONS[name]).double(), image(), (5, 4))


def assert_exact_by_tiles(model: nn.Module, x: Tensor, tile: tuple[int, int]) -> None:
    """No op reads a stored map in one piece."""
    fast = accelerate(copy.deepcopy(model), tile=tile)
    assert_exact(model, x, fast=fast)
    for prepared in fast._runner.programs:
        stored = {v for stage in prepared.staged.stages for v in stage.stored}
        assert not [s.name for s in prepared.staged.steps if isinstance(s, Op) and stored & set(s.inputs)]


# -- modules --------------------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class CBAM(nn.Module):
    """Average and maximum through one perceptron, then a gate for each position."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4))
        self.spatial = nn.Conv2d(2, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.shared(x.mean((2, 3))) + self.shared(F.adaptive_max_pool2d(x, 1).flatten(1))
        x = x * gate.sigmoid()[:, :, None, None]
        return x * self.spatial(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()


class EfficientChannelAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return x * y.view(x.shape[0], -1, 1, 1).expand_as(x)


class SelectiveKernels(nn.Module):
    """Two branches mixed by attention over their pooled sum, with BatchNorm on the pooled values."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=d, dilation=d) for d in (1, 2))
        self.reduce = nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.select = nn.Conv2d(3, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([branch(x) for branch in self.branches], 1)
        weights = self.select(self.reduce(x.sum(1).mean((2, 3), keepdim=True)))
        return (x * weights.view(-1, 2, 4, 1, 1).softmax(1)).sum(1)


class ImagePooling(nn.Module):
    """The pooled branch of DeepLab's pyramid, spread over the image again."""

    def __init__(self, mode: str):
        super().__init__()
        self.branch, self.mode = nn.Conv2d(4, 4, 1), mode
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.branch(F.adaptive_avg_pool2d(x, 1)), size=x.shape[-2:], mode=self.mode)
        return self.project(torch.cat([x, y], 1)) + self.branch(x.mean((2, 3), keepdim=True)).expand(x.shape)


class DynamicConv(nn.Module):
    """A convolution whose weights are mixed for each image."""

    def __init__(self):
        super().__init__()
        self.route, self.experts = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4 * 4 * 9) / 6)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weights = (self.route(x.mean((2, 3))).sigmoid() @ self.experts).view(n * 4, c, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), weights, padding=1, groups=n).view(n, 4, h, w)


MODULES = {
    "SE": SqueezeExcite,
    "CBAM": CBAM,
    "ECA": EfficientChannelAttention,
    "SK": SelectiveKernels,
    "image pooling, bilinear": lambda: ImagePooling("bilinear"),
    "image pooling, nearest": lambda: ImagePooling("nearest"),
    "dynamic convolution": DynamicConv,
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm with a weight per position": lambda: nn.LayerNorm([4, 19, 14]),
    "LayerNorm of each channel": lambda: nn.LayerNorm([19, 14], bias=False),
    "RMSNorm with a weight per position": lambda: nn.RMSNorm([4, 19, 14]),
    "RMSNorm with its own epsilon": lambda: nn.RMSNorm([4, 19, 14], eps=0.3),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4),
    "InstanceNorm that tracks": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True, momentum=0.3),
    "BatchNorm": lambda: nn.BatchNorm2d(4, momentum=0.3),
    "BatchNorm, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "BatchNorm, no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "BatchNorm, no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "SyncBatchNorm in one process": lambda: nn.SyncBatchNorm(4),
    "two norms": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU(), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 3, 2, 1)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, training):
    net = randomize(Around(MODULES[name]()).double()).train(training)
    if "weight per position" in name:
        nn.init.normal_(net.function.weight)
    assert_exact_by_tiles(net, image(3, 2, 19, 14), (6, 5))


class Shared(nn.Module):
    """One norm at two places, averaging all batches it sees."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x)).relu())


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, momentum=0.2),
        nn.BatchNorm2d(4, momentum=None),
        nn.InstanceNorm2d(4, track_running_stats=True),
        Shared(),
    ],
    ids=["momentum", "cumulative", "instances", "shared"],
)
def test_running_statistics_over_three_steps(norm):
    """One update per step, by PyTorch's own rule; none in inference."""
    stock = Around(norm).double().train()
    stock.first.bias = None  # its gradient is zero but for rounding
    fast = accelerate(copy.deepcopy(stock), tile=7)
    for number in range(3):
        x = image() + number / 3
        found = step_errors(step(stock, x), step(fast, x))
        assert max(found.values()) < 1e-12, found
        with torch.no_grad():
            for net in (stock, fast):
                for parameter in net.parameters():
                    parameter.add_(0.01)
    uses = {nn.BatchNorm2d: 1, Shared: 2, nn.InstanceNorm2d: 0}[type(norm)]  # InstanceNorm never counts
    counters = [b for name, b in fast.named_buffers() if name.endswith("num_batches_tracked")]
    assert [int(c) for c in counters] == [3 * uses]
    before = buffers(fast.eval())
    with torch.no_grad():
        fast(image())
    assert max(errors(before, buffers(fast)).values()) == 0
    assert getattr(norm, "momentum", None) == getattr(fast.function, "momentum", None)


@pytest.mark.parametrize(
    "name", ["BatchNorm", "GroupNorm", "InstanceNorm", "SE", "LayerNorm with a weight per position"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_low_precision(name, dtype):
    """Over five networks no further from float64 than stock PyTorch."""
    squares = {"stock": torch.zeros(2), "tiled": torch.zeros(2)}
    tiled = accelerate(Around(MODULES[name]()), tile=8)
    tiled.first.bias = None
    for seed in range(5):
        torch.manual_seed(seed)
        net = randomize(Around(MODULES[name]()).double(), seed)
        net.first.bias = None  # before a norm its gradient is zero but for rounding
        x = torch.randn(2, 2, 19, 14, dtype=torch.float64)
        truth = step(copy.deepcopy(net), x)
        take_state(tiled, net)
        for what, network in (("stock", net.float()), ("tiled", tiled)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                got = step(network, x.float())
            for place, (mine, wanted) in enumerate(((got.outputs, truth.outputs), (_grads(got), _grads(truth)))):
                distance = sum((a.double() - b).square().sum() for a, b in zip(mine, wanted, strict=True))
                squares[what][place] += distance / sum(b.square().sum() for b in wanted)
    assert (squares["tiled"] <= 1.5**2 * squares["stock"]).all(), squares


def _grads(one: Step) -> list[Tensor]:
    return [t for t in (*one.gradients.values(), one.image) if t is not None]


def test_dtypes_under_autocast():
    """Every norm's result and gradients have the dtypes that stock PyTorch gives them."""
    for name in ("BatchNorm", "GroupNorm", "InstanceNorm"):
        net = Around(MODULES[name]())
        x = image().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want = step(copy.deepcopy(net), x)
            got = step(accelerate(net, tile=8), x)
        assert [t.dtype for t in got.outputs] == [t.dtype for t in want.outputs], name
        assert {n: g.dtype for n, g in got.gradients.items()} == {n: g.dtype for n, g in want.gradients.items()}


# -- vectors with a value for each position --------------------------------------------------------------------------


class Positions(nn.Module):
    """Position embeddings: added, as a gate of one channel, along the rows alone, and to tokens."""

    def __init__(self):
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, 4, 19, 14))
        self.gate = nn.Parameter(torch.randn(19, 14))
        self.rows = nn.Parameter(torch.randn(19, 1))
        self.tokens = nn.Parameter(torch.randn(1, 19 * 14, 4))
        self.coarse = nn.Parameter(torch.randn(1, 2, 5, 4))
        self.register_buffer("extra", torch.randn(2, 1, 19, 14))

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.map) * self.gate.sigmoid() + self.rows * self.map.mean()
        tokens = x.flatten(2).transpose(1, 2) + self.tokens
        fine = F.interpolate(self.coarse, size=x.shape[-2:], mode="bilinear")
        x = tokens.transpose(1, 2).reshape(x.shape)
        return torch.cat([x, self.extra, fine.expand(2, -1, -1, -1)], 1).mul_(2)


def test_position_embeddings_stream():
    net = Around(Positions(), channels=7).double()
    assert_exact_by_tiles(net, image(), (5, 4))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape) + x


def test_attention_after_live_norms():
    net = Around(nn.Sequential(Attention(), nn.Conv2d(4, 4, 3, 2, 1), Attention())).double().train()
    assert_exact(net, image(), tile=5)


def merged_tokens(x: Tensor) -> Tensor:
    """A perceptron over the tokens of all images, (N*H*W, C), as in window attention, after an odd split of heads."""
    n, c, h, w = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(-1, c)
    tokens = tokens + F.layer_norm(tokens, (c,)) * tokens.amax(0, keepdim=True)
    return tokens.reshape(n, h * w, c).softmax(1).mul(9).transpose(1, 2).reshape(n, c, h, w)


def windows(x: Tensor) -> Tensor:
    """HaloNet's windows: blocks with their neighbourhood, attention inside of each."""
    n, c, _, w = x.shape
    blocks = x[..., :18, :].reshape(n * 2, c // 2, 6, 3, 7, 2).permute(0, 1, 3, 5, 2, 4)
    q = blocks.reshape(n * 2, c // 2, 6, 42).transpose(1, 3)
    k = F.pad(x[..., :18, :], (1, 1, 1, 1)).unfold(2, 5, 3).unfold(3, 4, 2)
    k = k.reshape(n * 2, c // 2, 42, 20).permute(0, 2, 3, 1)
    attention = (q @ k.transpose(-1, -2)).softmax(-1)
    scaled = (attention.reshape(-1, 6, 20) * 2).reshape(n * 2, 42, 6, 20)
    out = (scaled @ k).transpose(1, 3).reshape(-1, 3, 2, 6, 7).permute(0, 3, 1, 4, 2)
    return out.contiguous().view(n, c, 18, w)


def of_all_images(x: Tensor) -> Tensor:
    """Mean and deviation of each channel, (C, N*H*W), as layers that are initialized by data take them."""
    flat = x.transpose(0, 1).reshape(x.shape[1], -1)
    mean, std, var = flat.mean(1), flat.std(1), flat.var(1, keepdim=True, unbiased=False)
    return (x - mean[:, None, None]) / (std[:, None, None] + var[..., None])


def codebook(x: Tensor) -> Tensor:
    """Sums of the tokens that chose each entry, and how they vary together."""
    tokens = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    chosen = F.one_hot(tokens.argmax(1), 5).to(x.dtype)
    sums = (tokens.t() @ chosen).sum(1) + (tokens.t() @ tokens).mean(1)
    return x + sums[:, None, None] / len(tokens)


def test_tokens_of_all_images_in_one_dimension():
    for function in (merged_tokens, windows, of_all_images, codebook):
        net = Around(function).double()
        for x in (image(), image(1, 2, 19, 14)):
            assert_exact_by_tiles(net, x, (5, 4))


def test_columns_of_windows():
    def columns(x: Tensor) -> Tensor:
        y = F.unfold(x, 3, padding=1, stride=2)
        return y.relu().reshape(x.shape[0], 4, 9, 10, 7).mean(2)

    net = Around(columns).double()
    assert_exact_by_tiles(net, image(), (5, 4))


def test_three_dimensional_kernels_one_deep():
    class Lambda(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 3, (3, 5, 1), padding=(1, 2, 0))

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            y = self.conv(x.flatten(2).transpose(1, 2).reshape(n, 1, h, w, c))
            return y.mean(1).permute(0, 3, 1, 2)

    net = Around(Lambda()).double()
    assert_exact_by_tiles(net, image(), (5, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(3) + x,
        lambda x: x.cumsum(2) + x,
        lambda x: x.sort(dim=2)[0] * x,
        lambda x: torch.cat([x.flatten(2), x[:, :, 0]], 2)[:, :, 14:].unflatten(2, x.shape[2:]) * x,
        lambda x: x @ x.transpose(2, 3) @ x,
        lambda x: x[:, :, [3] * x.shape[2]] * x,
        lambda x: x[:, :, 3:4] * x,
        lambda x: x.tril() - x,
    ],
)
def test_whole_maps_for_ops_without_a_rule(function):
    net = Around(function).double()
    with pytest.raises(UnsupportedError):
        accelerate(copy.deepcopy(net), tile=5)(image())
    assert_exact(net, image(), tile=5, fallback="untiled")


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_live_norms_with_one_of_weight_and_bias(missing, pooled):
    """BNNeck's norm has no bias; some norms of embeddings have no weight."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 5, 3), (nn.BatchNorm1d if pooled else nn.BatchNorm2d)(5)
            for name in ("weight", "bias") if missing == "both" else (missing,):
                self.norm.register_parameter(name, None)

        def forward(self, x):
            y = self.conv(x).relu()
            return self.norm(y.mean((2, 3)) if pooled else y)

    assert_exact(randomize(Net().double()).train(), image(4, 2, 30, 27), tile=12)


@pytest.mark.parametrize("affine", [False, True])
def test_constant_channels_of_instance_norm_without_eps(affine):
    """PyTorch scales them by zero; those of group_norm are NaN there, too."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate")
            self.norm = nn.InstanceNorm2d(2, eps=0.0, affine=affine)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + x

    stock = Network()
    with torch.no_grad():
        stock.conv.weight[1] = 0
        stock.conv.bias.copy_(torch.tensor([0.5, 2.0]))
        for parameter in stock.norm.parameters():
            parameter.add_(torch.rand(2))
    other = copy.deepcopy(stock)
    x = torch.randn(2, 1, 24, 20)
    target = torch.randn(2, 2, 24, 20)
    for net in (stock, accelerate(other, tile=8)):
        (net(x) * target).mean().backward()
    torch.testing.assert_close(accelerate(other, tile=8)(x), stock(x))
    for (name, wanted), got in zip(stock.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=lambda told, name=name: f"{name}: {told}")
