"""Attention over all positions: keys and values are kept, queries go tile by tile."""

from __future__ import annotations

import pytest
import torch
from attention_modules import Global, Parted
from exactness import assert_each_exact, assert_exact
from torch import nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.stages import lower

H, W = 15, 22
PLAIN = {"dim_feedforward": 8, "dropout": 0.0}  # of PyTorch's own transformer layers


def network(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *middle, nn.Conv2d(4, 4, 3), *ends).double()


def image(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 2, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["sdpa", "matmul", "bmm", "einsum"])
def test_each_way_of_writing_it(form):
    model = network(Global(4, form), nn.GELU(), Global(4, form))
    assert_each_exact(model, [(image(), tile) for tile in ((6, 7), 100)])


@pytest.mark.parametrize("form", ["sdpa", "matmul", "einsum"])
def test_pooled_keys(form):
    assert_exact(network(Global(4, form, pool=3)), image(), tile=(6, 7))


@pytest.mark.parametrize("form", ["sdpa", "matmul"])
def test_bias_for_each_pair(form):
    assert_exact(network(Global(4, form, bias=H * W)), image(), tile=(6, 7))


class Looked(Global):
    """A bias for each pair, looked up in a table with the heads last and then copied into order, as timm's is."""

    def __init__(self, form: str) -> None:
        super().__init__(4, form)
        self.table = nn.Parameter(torch.randn(50, self.heads))
        index = torch.randint(50, (H * W * H * W,), generator=torch.Generator().manual_seed(2))
        self.register_buffer("index", index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.__dict__["bias"] = self.table[self.index].view(H * W, H * W, -1).permute(2, 0, 1).unsqueeze(0).contiguous()
        try:
            return super().forward(x)
        finally:
            del self.__dict__["bias"]


@pytest.mark.parametrize("form", ["sdpa", "matmul"])
def test_bias_that_is_looked_up(form):
    net = network(Looked(form), nn.GELU(), Looked(form))
    assert_exact(net, image(), tile=(6, 7))
    staged = lower(capture(net, (1, 2, H, W), torch.float64, "cpu"))
    copied = [step.outputs[0] for step in staged.steps if getattr(step, "name", "") == "contiguous"]
    shapes = {tuple(staged.program.values[v].shape) for v in copied}
    assert shapes and (1, 2, H * W, H * W) not in shapes  # keys are copied into order; the bias would be there twice


def test_one_image_of_one_row():
    """Positions that are cut into heads are no images and rows (CSATv2's last stage)."""
    net = nn.Sequential(nn.Conv2d(2, 4, 15, (15, 2)), TokenHeads(4), nn.Conv2d(4, 4, 1)).double()
    assert_exact(net, image(1), tile=(15, 8))


def test_positions_in_another_order():
    assert_exact(network(nn.ConstantPad2d((0, 0, 1, 0), 0.0), Parted(4)), image(), tile=(6, 7))


class TokenHeads(nn.Module):
    """Queries, keys and values of each token are cut into heads at once, as timm's Attention does."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).reshape(n, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(n, h * w, c).transpose(1, 2).reshape(n, c, h, w)


class Fixed(nn.Module):
    """Attention to keys that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Parameter(torch.randn(1, 9, 4)), nn.Parameter(torch.randn(1, 9, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.scaled_dot_product_attention(x.flatten(2).transpose(1, 2), self.k, self.v)
        return y.transpose(1, 2).reshape(x.shape)


def test_keys_that_are_parameters():
    assert_exact(network(Fixed()), image(1), tile=(6, 7))


class Plain(nn.Module):
    """One tensor is queries, keys and values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(y, key=y, value=y).transpose(1, 2).reshape(x.shape)


def test_one_tensor_as_queries_keys_and_values():
    assert_exact(network(Plain()), image(), tile=(6, 7))


class Causal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, is_causal=True).transpose(1, 2).reshape(x.shape)


class Axial(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.permute(0, 2, 3, 1)
        return F.scaled_dot_product_attention(y, y, y).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("layer", "reason"), [(Causal(), "with a causal mask"), (Axial(), "cannot attend along one axis of the image")]
)
def test_an_order_among_positions_and_rows_of_their_own_are_refused(layer, reason):
    with pytest.raises(UnsupportedError, match=reason):
        accelerate(network(layer))(image())


def test_scores_go_by_tile():
    """They are maps, with a row of H * W for each position, and no stage stores one."""
    staged = lower(capture(network(Global(4, "matmul")), (1, 2, H, W), torch.float64, torch.device("cpu")))
    scores = {v for v in staged.maps.axes if H * W in staged.maps.shape(v)}
    assert scores
    assert all(staged.maps.size(v) == (H, W) for v in scores)
    assert not any(scores & {*stage.stored, *stage.sources} for stage in staged.stages)


class Transformed(nn.Module):
    """A convolution's map as tokens of PyTorch's own transformer modules, as DETR and its kin do.

    Args:
        kind: "attention", "encoder", "decoder", "both" or "classes".
        first: the batch comes first.
    """

    def __init__(self, kind: str, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.conv = kind, first, nn.Conv2d(2, 8, 3, 2)
        self.queries = nn.Parameter(torch.randn(3, 1, 8))
        if kind == "attention":
            self.made = nn.MultiheadAttention(8, 2, batch_first=first)
        elif kind == "decoder":
            self.made = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, **PLAIN, batch_first=first), 2)
        elif kind == "both":
            self.made = nn.Transformer(8, 2, 1, 1, **PLAIN, batch_first=first)
        else:
            layer = nn.TransformerEncoderLayer(8, 2, **PLAIN, batch_first=first, norm_first=kind == "classes")
            self.made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> object:
        order = (lambda t: t.transpose(0, 1)) if self.first else (lambda t: t)
        tokens = self.conv(x).flatten(2).permute(2, 0, 1)
        queries = self.queries.expand(-1, len(x), -1)
        if self.kind == "encoder":
            return order(self.made(order(tokens))).mean(0)
        if self.kind == "classes":
            return order(self.made(order(torch.cat([queries, tokens]))))[:3]
        if self.kind == "attention":
            found, weights = self.made(order(queries), order(tokens), order(tokens))
            return order(found), weights
        given = (queries, tokens) if self.kind == "decoder" else (tokens, queries)
        return order(self.made(*map(order, given)))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["attention", "encoder", "decoder", "both", "classes"])
def test_transformers_of_pytorch(kind, first):
    assert_exact(Transformed(kind, first).double(), image(), tile=(6, 7))


class Quantised(nn.Module):
    """The nearest of a codebook's rows at each position, gradients straight through (VQ-VAE)."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.conv, self.codes = nn.Conv2d(2, 4, 3), nn.Embedding(rows, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.conv(x)
        distances = torch.cdist(z.flatten(2).transpose(1, 2), self.codes.weight[None])
        found = self.codes(distances.argmin(-1)).transpose(1, 2).view(z.shape)
        return z + (found - z).detach(), (found - z.detach()).square().mean() + distances.mean()


@pytest.mark.parametrize("rows", [5, 40])
def test_a_codebook(rows):
    torch.manual_seed(0)
    assert_exact(Quantised(rows).double(), image(), tile=(6, 7))
