"""Heads that take a map whole, as a classifier behind a flatten does, without being refused; and norms of rows."""

from __future__ import annotations

import copy

import pytest
import torch
from around import Around, image
from exactness import LIMIT, assert_exact, step, step_errors
from lockstep import Listed
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate, plan

POOLINGS = {
    "median": lambda x: x.flatten(2).median(2).values,
    "nanmedian": lambda x: x.flatten(2).nanmedian(2).values,
    "median of all": lambda x: x.median().expand(1, 4),
    "quantile": lambda x: torch.quantile(x.flatten(2), 0.7, dim=2),
    "quantiles": lambda x: x.flatten(2).quantile(torch.tensor([0.1, 0.5], dtype=x.dtype), 2).sum(0),
    "kthvalue": lambda x: x.flatten(2).kthvalue(17, 2).values,
    "topk": lambda x: x.flatten(2).topk(17, 2)[0].mean(2),
    "mode": lambda x: x.flatten(2).mode(2).values,
    "median of a row": lambda x: x.median(3).values.mean(2),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_order_statistics(name):
    assert_exact(Around(lambda x: x * POOLINGS[name](x)[..., None, None]).double(), image(), tile=(5, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.median(1, keepdim=True)[0],
        lambda x: x * x.quantile(0.4, 1).unsqueeze(1),
        lambda x: x * x.quantile(torch.tensor([0.2, 0.5], dtype=x.dtype), 1).sum(0).unsqueeze(1),
        lambda x: x * x.kthvalue(2, 1).values.unsqueeze(1) + x.kthvalue(3, 1, keepdim=True).values,
        lambda x: x + x.round().mode(1, keepdim=True).values,
    ],
    ids=["median", "quantile", "quantiles", "kthvalue", "mode"],
)
def test_of_channels(function):
    assert_exact(Around(function).double(), image(), tile=(5, 4))


class AttentionPool(nn.Module):
    """CLIP's (Radford et al., 2021): the mean as a token more, which asks all of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.places = nn.Parameter(torch.randn(19 * 14 + 1, 4) / 2)
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], 0) + self.places[:, None, :]
        x, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=4,
            num_heads=2,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            need_weights=False,
        )
        return x.squeeze(0)


HEADS = {
    "attention pooling": AttentionPool,
    "flatten and linear": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 17 * 12, 3)),
    "linear over positions": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(17 * 12, 3)),
    "grid and linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten(), nn.Linear(2 * 49, 3)),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    torch.manual_seed(0)
    assert_exact(HEADS[name]().double(), image(), tile=(5, 4))


def test_the_plan_names_the_memory():
    """Four channels at 17 x 12 in float32, and their gradient."""
    made = plan(HEADS["flatten and linear"](), (2, 19, 14), tile=5)
    assert made.stored_bytes >= 2 * 4 * 17 * 12 * 4
    assert "whole maps" in str(made)


class Rows(nn.Module):
    """BatchNorm1d on all pixels as rows, (N*H*W, C), or as sequences, (N, C, H*W)."""

    def __init__(self, way: int):
        super().__init__()
        self.norm, self.way = nn.BatchNorm1d(4), way

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        if self.way == 0:
            return self.norm(x.permute(0, 2, 3, 1).reshape(-1, c)).view(n, height, width, c).permute(0, 3, 1, 2)
        if self.way == 1:
            return (
                self.norm(x.flatten(2).transpose(1, 2).flatten(0, 1))
                .view(n, height * width, c)
                .transpose(1, 2)
                .reshape(x.shape)
            )
        return self.norm(x.flatten(2)).view_as(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", range(3))
def test_norms_of_rows(way, training):
    torch.manual_seed(0)  # the gradient of a bias before a live norm is zero but for rounding
    assert_exact(Around(Rows(way)).double().train(training), image(), tile=(5, 4))


SHARED = {
    "of the mean, then of the map": lambda norm, x: norm(F.adaptive_avg_pool2d(x, 1)).sigmoid() * norm(x),
    "of the map, then of a grid": lambda norm, x: norm(x) * norm(F.adaptive_avg_pool2d(x, 3)).mean((2, 3), True),
    "of rows, then of the map": lambda norm, x: norm(x.mean(3, keepdim=True)).sigmoid() * norm(x),
    "of a whole map": lambda norm, x: norm(x) * norm(x.cumsum(2)).mean((2, 3), keepdim=True),
}


class Shared(nn.Module):
    def __init__(self, function, momentum: float | None):
        super().__init__()
        self.norm, self.function = nn.BatchNorm2d(4, momentum=momentum), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.norm, x)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("name", SHARED)
def test_a_live_norm_of_maps_and_of_smalls(name, momentum):
    torch.manual_seed(0)
    assert_exact(Around(Shared(SHARED[name], momentum)).double(), image(3, 2, 19, 14), tile=(5, 4))


class Pooled(nn.Module):
    """A live norm of pooled features and one of rows, alone or besides norms of maps."""

    def __init__(self, live: bool):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4) if live else nn.Identity()
        self.rows, self.pooled, self.last = nn.BatchNorm2d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.last(self.pooled((x * self.rows(x.mean(3, keepdim=True))).mean((2, 3))))


@pytest.mark.parametrize("live", [True, False])
def test_images_of_several_sizes(live):
    """The statistics of pooled features are those of all images, as those of maps are."""
    torch.manual_seed(0)
    model, shapes = Pooled(live).double(), [(2, 2, 19, 14), (3, 2, 9, 23)]
    flat = torch.cat([image(*shape).flatten() for shape in shapes])
    stock = step(Listed(copy.deepcopy(model), shapes, True), flat)
    found = step_errors(stock, step(Listed(accelerate(model, tile=5), shapes, False), flat))
    assert max(found.values()) < LIMIT, found
