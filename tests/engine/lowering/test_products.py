"""Matrix products over the positions of the image: sums over tiles, with other maps, constants and vectors."""

from __future__ import annotations

import pytest
import torch
from around import Around, image
from exactness import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.stages import lower


def ramp(n: int, x: Tensor, *shape: int) -> Tensor:
    return torch.linspace(-1, 1, n, dtype=x.dtype).view(shape or (n,))


def positions(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def attention_mil(x: Tensor) -> Tensor:
    """Gated attention over all positions (Ilse et al., 2018)."""
    h = x.flatten(2).transpose(1, 2)
    a = (torch.tanh(h) * torch.sigmoid(h)).sum(2, keepdim=True).transpose(1, 2).softmax(-1)
    return torch.bmm(a, h).transpose(1, 2)[..., None]


def covariance(x: Tensor) -> Tensor:
    f = x.flatten(2) - x.flatten(2).mean(2, keepdim=True)
    return (f.bmm(f.transpose(1, 2)) / (f.shape[2] - 1)).sum(1)[..., None, None]


def centred_covariance(x: Tensor) -> Tensor:
    """By a matrix that takes the mean away (iSQRT-COV, Li et al., 2018)."""
    m = positions(x)
    centre = (torch.eye(m, dtype=x.dtype) - 1 / m) / m
    f = x.reshape(*x.shape[:2], m)
    return f.bmm(centre.expand(x.shape[0], m, m)).bmm(f.transpose(1, 2)).sum(1)[..., None, None]


def soft_argmax(x: Tensor) -> Tensor:
    """Where the mass of each channel lies, by a matrix of coordinates."""
    rows, cols = torch.meshgrid(ramp(x.shape[2], x), ramp(x.shape[3], x), indexing="ij")
    return (x.flatten(2).softmax(-1) @ torch.stack([rows.flatten(), cols.flatten()], 1)).sum(-1)[..., None, None]


def context(x: Tensor) -> Tensor:
    """GCNet (Cao et al., 2019)."""
    mask = x[:, :1].flatten(2).softmax(2).unsqueeze(-1)
    return (x.flatten(2).unsqueeze(1) @ mask).squeeze(1).unsqueeze(-1)


def double_attention(x: Tensor) -> Tensor:
    """Gathered over all positions, and given to each (Chen et al., 2018)."""
    a, b, v = x.flatten(2), x.flatten(2).softmax(-1), x[:, :3].flatten(2).softmax(1)
    return torch.matmul(torch.bmm(a, b[:, :3].permute(0, 2, 1)), v).view_as(x)


FUNCTIONS = {
    "attention pooling": attention_mil,
    "Gram matrix": lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2) / positions(x)).sum(1)[..., None, None],
    "covariance": covariance,
    "centred covariance": centred_covariance,
    "soft-argmax": soft_argmax,
    "context": context,
    "double attention": double_attention,
    "weights of positions": lambda x: (x.flatten(2) @ ramp(positions(x), x))[..., None, None],
    "weights first": lambda x: (ramp(positions(x), x) @ x.flatten(2).transpose(1, 2))[..., None, None],
    "weights first, as a row": lambda x: (ramp(positions(x), x)[None] @ x.flatten(2).transpose(1, 2)).transpose(1, 2)[
        ..., None
    ],
    "weights of columns": lambda x: (x @ ramp(x.shape[3], x)).unsqueeze(-1),
    "weights of rows": lambda x: torch.matmul(ramp(x.shape[2], x), x).unsqueeze(2),
    "class activation": lambda x: (ramp(8, x, 2, 4) @ x.flatten(2)).view(x.shape[0], 2, *x.shape[2:]).sum(1, True),
    "a vector of channels": lambda x: (ramp(4, x) @ x.flatten(2)).view(x.shape[0], 1, *x.shape[2:]),
    "a matrix per pixel": lambda x: (x.permute(0, 2, 3, 1) @ ramp(16, x, 4, 4)).permute(0, 3, 1, 2),
    "baddbmm": lambda x: torch.baddbmm(
        ramp(16, x, 1, 4, 4), x.flatten(2), x.flatten(2).transpose(1, 2), beta=0.5, alpha=0.1
    ).sum(2)[..., None, None],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    assert_exact(Around(lambda x: x * FUNCTIONS[name](x)).double(), image(), tile=(5, 4))


class Vlad(nn.Module):
    """NetVLAD (Arandjelovic et al., 2016): residuals of all positions to each centre, expanded."""

    def __init__(self):
        super().__init__()
        self.conv, self.assign = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1)
        self.centres = nn.Parameter(torch.rand(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.conv(x), dim=1)
        a, x = self.assign(x).flatten(2).softmax(1), x.flatten(2)
        residual = x.expand(3, -1, -1, -1).permute(1, 0, 2, 3)
        residual = residual - self.centres.expand(x.shape[-1], -1, -1).permute(1, 2, 0).unsqueeze(0)
        return F.normalize((residual * a.unsqueeze(2)).sum(-1), dim=2).flatten(1)


class Learned(nn.Module):
    """Weights of positions, of rows and of columns that are learned."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.positions, self.rows = nn.Parameter(torch.rand(19 * 14, 3)), nn.Parameter(torch.rand(19))
        self.cols = nn.Parameter(torch.rand(14))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(x)
        return x.flatten(2) @ self.positions, self.rows @ x, x @ self.cols


@pytest.mark.parametrize("net", [Vlad, Learned])
def test_heads(net):
    torch.manual_seed(0)
    assert_exact(net().double(), image(), tile=(5, 4))


def all_with_all(x: Tensor) -> Tensor:
    weights = (x.flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(-1)
    return (x.flatten(2) @ weights).view_as(x)


def all_with_all_into(x: Tensor) -> Tensor:
    """As Diffusers writes it: with a factor, into a tensor that beta leaves out, which may hold anything."""
    tokens = x.flatten(2).transpose(1, 2)
    nothing = torch.full((len(x), positions(x), positions(x)), torch.nan, dtype=x.dtype)
    weights = torch.baddbmm(nothing, tokens, tokens.transpose(1, 2), beta=0, alpha=0.5).softmax(-1)
    return (weights @ tokens).transpose(1, 2).view_as(x)


def all_with_all_and_biases(x: Tensor) -> Tensor:
    tokens, m = x.flatten(2).transpose(1, 2), positions(x)
    weights = ramp(m * m, x, 1, m, m).baddbmm(tokens, tokens.transpose(1, 2), beta=0.5).softmax(-1)
    return torch.bmm(weights, tokens).transpose(1, 2).view_as(x)


@pytest.mark.parametrize("function", [all_with_all, all_with_all_into, all_with_all_and_biases])
def test_all_with_all(function):
    """A row of weights for each position, and what they give to all positions is a sum over the tiles."""
    assert_exact(Around(function).double(), image(), tile=(5, 4))


class Mixer(nn.Module):
    """Features mixed over all positions, with a weight for each pair (MLP-Mixer: Tolstikhin et al., 2021)."""

    def __init__(self, positions: int, hidden: int, bias: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.first, self.second = nn.Linear(positions, hidden, bias), nn.Linear(hidden, positions, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return x + self.second(F.gelu(self.first(y))).view_as(x)


@settings(max_examples=5)
@given(
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    hidden=st.integers(1, 7),
    n=st.integers(1, 2),
    bias=st.booleans(),
    tile=st.tuples(st.integers(2, 14), st.integers(2, 14)),
)
def test_linear_over_positions(height, width, hidden, n, bias, tile):
    torch.manual_seed(0)
    mixers = Mixer(height * width, hidden, bias), Mixer(height * width, height * width, bias)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *mixers, nn.Conv2d(4, 3, 2)).double()
    assert_exact(model, image(n, 2, height, width), tile=tile)


def test_linear_over_positions_keeps_no_map():
    """Its result is a sum over tiles; stored is the map that its result is added to."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Mixer(63, 5), nn.Conv2d(4, 3, 2)).double()
    staged = lower(capture(model, (1, 2, 7, 9), torch.float64, torch.device("cpu")))
    assert [len(stage.reductions) for stage in staged.stages] == [1, 0]
    assert len(staged.stages[0].stored) == 1


def test_linear_over_positions_and_channels_takes_the_map():
    """A classifier after a flatten, whose result meets the map again."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4 * 63, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x.flatten(1))[..., None, None]

    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Gate(), nn.Conv2d(4, 3, 2)).double()
    assert_exact(model, image(2, 2, 7, 9), tile=4)


def test_linear_over_one_image_axis_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Linear(9, 9), nn.Conv2d(4, 3, 2)).double()
    with pytest.raises(UnsupportedError, match="cannot contract an image axis"):
        accelerate(model, tile=4)(image(2, 2, 7, 9))


def test_mixer():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": (96, 160), "num_classes": 3}
    model = timm.create_model("mixer_s32_224", **sizes).double().eval()
    model.blocks = model.blocks[:2]
    nn.init.normal_(model.head.weight)
    assert_exact(model, image(1, 3, 96, 160), tile=64)
