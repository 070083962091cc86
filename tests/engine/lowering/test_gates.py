"""Factors for the channels of a map, as of squeeze-and-excite, become part of the weights of what reads the product."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_exact, assert_near_under_autocast, randomize
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import kernels
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import lower


@pytest.fixture(params=["CPU", "GPU"])
def either_graph(request: pytest.FixtureRequest) -> None:
    """The graph of the CPU, and that of a GPU, its ops computed by PyTorch."""
    if request.param == "GPU":
        request.getfixturevalue("fused_with_stock_ops")


class Gate(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.SiLU(), nn.Conv2d(3, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3), keepdim=True))


class Net(nn.Module):
    """Gates before a convolution of a pixel with a folded norm, before a strided one in groups, before two readers,
    and a scale of the network's own.
    """

    def __init__(self, n: int = 2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3 * n, 3, 2, 1, bias=False), nn.BatchNorm2d(3 * n), nn.SiLU())
        self.gates = nn.ModuleList([Gate(3 * n), Gate(4 * n), Gate(3 * n)])
        self.project = nn.Sequential(nn.Conv2d(3 * n, 4 * n, 1, bias=False), nn.BatchNorm2d(4 * n))
        self.grouped = nn.Conv2d(4 * n, 3 * n, 3, 2, 1, groups=2)
        self.twice = nn.ModuleList([nn.Conv2d(3 * n, 2 * n, 1), nn.Conv2d(3 * n, 2 * n, 3, padding=1)])
        self.scale, self.last = nn.Parameter(torch.rand(2 * n, 1, 1) + 0.5), nn.Conv2d(2 * n, 4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.project(x * self.gates[0](x)))
        x = F.silu(self.grouped(self.gates[1](x) * x))
        x = x * self.gates[2](x)
        x = self.twice[0](x) + self.twice[1](x)
        return self.head(self.last(x.relu() * self.scale).mean((2, 3)))


def build(training: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net()).double().train(training)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


@settings(deadline=None, max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    images=st.integers(1, 2),
    size=st.tuples(st.integers(12, 60), st.integers(12, 60)),
    tile=st.tuples(st.integers(6, 60), st.integers(6, 60)),
    live=st.booleans(),
    still=st.sampled_from(["", "project.0", "gates", "scale", "stem"]),
)
def test_equals_stock(
    either_graph: None, images: int, size: tuple[int, int], tile: tuple[int, int], live: bool, still: str
) -> None:
    """Outputs, gradients of parameters (all, or all but some) and of the image."""
    model = build(live)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not still or not name.startswith(still))
    assert_exact(model, image(images, 1, *size), tile=tile)


def products(images: int, on_gpu: bool) -> int:
    """How many products of a map and a vector are computed."""
    staged = lower(capture(build(), (images, 1, 64, 64), torch.float64, "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "enabled", lambda device: on_gpu)
        prepare(staged, training=True)
    return sum(local.op.name == "mul" for stage in staged.stages for local in stage.locals)


def test_products_that_are_not_there() -> None:
    """Of one image all but that with two readers; of two, who have gates of their own, the network's scale alone."""
    assert products(1, on_gpu=False) == 1
    assert products(2, on_gpu=False) == 3


def test_under_autocast(either_graph: None) -> None:
    """As near to float64 as stock PyTorch comes."""
    torch.manual_seed(0)
    assert_near_under_autocast(randomize(Net(16)).double().eval(), image(1, 1, 96, 80), tile=32)
