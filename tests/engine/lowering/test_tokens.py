"""Tokens joined to the positions of an image: class tokens, registers, what goes on apart and what is put together."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exactness import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.lowering.ops.base import Local, Whole
from gigamorph.engine.lowering.stages import ProgramStage, lower

H, W, WIDTH, HEADS = 12, 20, 8, 2
POSITIONS = (H // 2) * (W // 2)


class Block(nn.Module):
    """Attention of all tokens, then a perceptron; `form` is how attention is written."""

    def __init__(self, tokens: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(HEADS, tokens, tokens)) if form == "biased" else None
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, count, _ = x.shape
        qkv = self.qkv(self.first(x)).reshape(n, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.form == "matmul":
            y = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        elif self.form == "einsum":
            y = torch.einsum("bhid,...hjd->bhij", q, k).softmax(dim=-1)
            y = torch.einsum("bhij, bhjd -> bhid", [y, v])
        elif self.form == "other names":
            q, k, v = (t.swapdims(1, 2).flatten(2) for t in (q, k, v))
            q, k, v = (t.unflatten(2, (HEADS, -1)).movedim(2, 1) for t in (q, k, v))
            y = (q @ k.mT).softmax(dim=-1) @ v
        elif self.form == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.mT).softmax(dim=-1), v).unflatten(0, (n, HEADS))
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        y = self.out(y.transpose(1, 2).reshape(n, count, -1))
        x = x + y * self.gamma
        return x + self.perceptron(self.second(x))


class ViT(nn.Module):
    """Patches, tokens in front of them, an embedding of both, blocks; `pool` is what becomes of the tokens."""

    def __init__(self, form: str = "sdpa", tokens: int = 1, pool: str = "token", depth: int = 2) -> None:
        super().__init__()
        self.pool, self.count = pool, tokens
        self.patches = nn.Conv2d(2, WIDTH, 2, 2)
        self.tokens = nn.ParameterList(nn.Parameter(torch.randn(1, 1, WIDTH)) for _ in range(tokens))
        self.embedding = nn.Parameter(torch.randn(1, tokens + POSITIONS, WIDTH))
        self.blocks = nn.Sequential(*(Block(tokens + POSITIONS, form) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in self.tokens), x], dim=1)
        x = self.norm(self.blocks(x + self.embedding))
        if self.pool == "all":
            return x
        if self.pool == "map":
            return x[:, self.count :].transpose(1, 2).reshape(len(x), WIDTH, H // 2, W // 2)
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        match self.pool:
            case "token":
                return x[:, 0]
            case "mean":
                return x[:, self.count :].mean(1)
            case "both":
                return x[:, : self.count].mean(1) + x[:, self.count :].amax(1)
            case "everything":
                return x.mean(1)
            case "third":
                return x[:, self.count + 1 :: 3].mean(1) + x[:, -1]
        raise AssertionError(self.pool)


def network(*args, **options) -> nn.Module:
    torch.manual_seed(0)
    return ViT(*args, **options).double()


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 2, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


FORMS = ["sdpa", "matmul", "biased", "einsum", "other names", "bmm"]


@pytest.mark.parametrize("form", FORMS)
def test_a_class_token_with_an_embedding_of_all(form):
    assert_exact(network(form, depth=2 if form == "sdpa" else 1), image(), tile=(6, 8))


@pytest.mark.parametrize("pool", ["mean", "both", "everything", "third", "all", "map"])
def test_what_becomes_of_the_tokens(pool):
    assert_exact(network(tokens=3, pool=pool, depth=1), image(), tile=(6, 8))


class Rotated(nn.Module):
    """Positions alone are changed between two attentions and joined again (rotary embeddings; CaiT's class blocks)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(2, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.first, self.scale = Block(1, "sdpa"), nn.Parameter(torch.randn(1, POSITIONS, WIDTH))
        self.query, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.first(torch.cat((self.token.expand(len(x), -1, -1), x), dim=1))
        x = torch.cat([x[:, :1], x[:, 1:] * self.scale], dim=1)
        token = F.scaled_dot_product_attention(self.query(x[:, 0:1]), x, x)
        x = torch.cat([token, x[:, 1:]], dim=1)
        return self.head(x[:, 0] + self.first(x)[:, 1:].mean(1))


def test_parts_are_changed_alone_and_joined_again():
    torch.manual_seed(0)
    assert_exact(Rotated().double(), image(), tile=(6, 8))


class Across(nn.Module):
    """What goes across tokens and positions together."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.patches, self.head = way, nn.Conv2d(2, WIDTH, 2, 2), nn.Linear(WIDTH, 3)
        self.token, self.mix = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Linear(POSITIONS + 1, POSITIONS + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1)
        match self.way:
            case "softmax":
                x = x * x.softmax(dim=1)
            case "flip":
                x = x + x.flip(1)
            case "linear":
                x = self.mix(x.transpose(1, 2)).transpose(1, 2)
            case "norm":
                x = F.layer_norm(x, x.shape[1:])
            case "fold":
                x = x.reshape(-1, WIDTH).cumsum(0).reshape(x.shape)
            case "one":
                x = x + F.scaled_dot_product_attention(x, x, x)
            case "causal":
                x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(x[:, 0] + x[:, 1:].mean(1))


@pytest.mark.parametrize("way", ["softmax", "flip", "linear", "norm", "fold", "one", "causal"])
def test_what_goes_across_both_is_put_together(way):
    torch.manual_seed(0)
    assert_exact(Across(way).double(), image(), tile=(6, 8))


@pytest.mark.parametrize("form", FORMS)
def test_only_keys_and_values_are_ever_whole(form):
    """A perceptron's hidden layer, queries and scores are maps; of each attention K and V are taken whole."""
    _, nodes = sort(capture(network(form), (1, 2, H, W), torch.float64, torch.device("cpu")))
    vectors = [node.op for node in nodes if isinstance(node, Whole)]
    assert len([op for op in vectors if op.name == "cat"]) == 4  # K and V of two blocks
    assert sum(isinstance(node, Local) for node in nodes) > 20


class Empty(nn.Module):
    """Nothing is joined to the positions, as timm's networks do where they have no class token."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.patches, self.head = way, nn.Conv2d(2, WIDTH, 2, 2), nn.Linear(WIDTH, 3)
        self.token, self.block = nn.Parameter(torch.randn(1, 1, WIDTH)), Block(POSITIONS, "sdpa")

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token.expand(len(x), -1, -1)
        match self.way:
            case "positions":
                x = torch.cat([x[:, :0], x, x[:, POSITIONS:]], 1)
            case "a token":  # its gradient is zero, not None
                x = torch.cat([token[:, :0], x], 1)
            case "both":
                x = torch.cat([x[:, :0], token, x], 1)
            case "a vector":
                x = torch.cat([x.new_zeros(0), x], 1)
            case "one":
                x = torch.cat([x], 1)
        return self.head(self.block(x).mean(1))


@pytest.mark.parametrize("way", ["positions", "a token", "both", "a vector", "one"])
def test_empty_parts_are_left_out(way):
    torch.manual_seed(0)
    net = Empty(way).double()
    assert_exact(net, image(), tile=(6, 8))
    accelerate(net, tile=(6, 8))(image()).sum().backward()
    assert (net.token.grad is None) == (way in ("positions", "a vector", "one"))
    _, nodes = sort(capture(net, (1, 2, H, W), torch.float64, torch.device("cpu")))
    joined = [node for node in nodes if isinstance(node, Whole) and node.op.name == "cat"]
    assert bool(joined) == (way in ("a token", "both"))  # keys and values; positions alone stay a map


class CutOff(nn.Module):
    """A parameter that the output does not depend on, though PyTorch's graph of the output comes to it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.patches, self.norm = way, nn.Conv2d(2, WIDTH, 2, 2), nn.BatchNorm2d(WIDTH)
        self.block, self.head = Block(POSITIONS, "sdpa"), nn.Linear(WIDTH, 3)
        self.token, self.late = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        with torch.no_grad() if self.way == "without gradients" else nullcontext():
            token = self.token.expand(len(x), -1, -1)
        joined = torch.cat([token.type_as(self.late) if self.way == "dtype" else token, x], 1)
        match self.way:
            case "at once" | "without gradients" | "dtype":  # `late` gives its dtype alone: None
                return self.head(self.block(joined[:, 1:]).mean(1))
            case "after a layer":
                return self.head(F.gelu(self.head(joined)[:, 1:] @ self.head.weight).mean(1))
            case "the positions":
                joined = self.block(joined)
                return self.head(torch.cat([joined[:, :1], joined[:, 1:] * self.late], 1)[:, 0])
            case "positions are the output":
                return joined[:, 1:] * 2
            case "a map is the output":
                return self.block(joined[:, 1:]).transpose(1, 2).unflatten(2, (H // 2, W // 2))
            case "one output of two":
                return self.head(x.mean(1)), self.head(joined[:, 1:].mean(1)).exp()


@pytest.mark.parametrize(
    "way",
    "at once/after a layer/the positions/positions are the output/a map is the output/one output of two/"
    "without gradients/dtype".split("/"),
)
def test_what_is_cut_off_before_anything_reads_it_has_a_gradient_of_zeros(way):
    """Not None, which an optimizer with weight decay or momentum leaves alone."""
    torch.manual_seed(0)
    net = CutOff(way).double()
    for training in (True, False):
        assert_exact(net.train(training), image(), tile=(6, 8), inference=not training)
    if way == "one output of two":
        accelerate(net, tile=(6, 8))(image())[0].sum().backward()
        assert net.token.grad is None


class Table(nn.Module):
    """Biases for each pair out of a table, as Swin and CoAtNet have them, in several blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, WIDTH, 2, 2), nn.Linear(WIDTH, 3)
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(POSITIONS, HEADS)) for _ in range(blocks))
        i = torch.arange(POSITIONS)
        self.register_buffer("index", (i[:, None] - i).abs())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(2).transpose(1, 2)
        for table in self.tables:
            heads = x.reshape(len(x), POSITIONS, HEADS, -1).transpose(1, 2)
            bias = table[self.index.view(-1)].view(POSITIONS, POSITIONS, -1).permute(2, 0, 1).contiguous()
            y = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias.unsqueeze(0))
            x = x + y.transpose(1, 2).reshape(x.shape)
        return self.head(x.mean(1))


def test_biases_are_made_when_they_are_read():
    """Not those of all blocks at the beginning."""
    torch.manual_seed(0)
    net = Table(3).double()
    assert_exact(net, image(), tile=(6, 8))
    staged = lower(capture(net, (1, 2, H, W), torch.float64, torch.device("cpu")))
    stages = [n for n, step in enumerate(staged.steps) if isinstance(step, ProgramStage)]
    made = [n for n, step in enumerate(staged.steps) if getattr(step, "name", "") == "unsqueeze"]
    assert len(made) == 3 and stages[0] < made[0] < stages[1] < made[1] < stages[2] < made[2] < stages[3]


def test_a_tile_is_chosen():
    """Heads (N, heads, h, w, d) are stored maps of five dimensions."""
    assert_exact(network(), image(1), memory_budget="64MiB", inference=False)


def test_forward_features_of_a_vision_transformer():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=(48, 64), depth=2, embed_dim=24, num_heads=2, num_classes=3, reg_tokens=2
    ).double()
    nn.init.normal_(vit.cls_token)
    assert_exact(vit, torch.randn(2, 3, 48, 64, dtype=torch.float64), tile=32)
