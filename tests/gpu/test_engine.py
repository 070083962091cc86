"""On a GPU: whole steps against stock PyTorch in float64, equal runs, and pixels that are just being made."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from exactness import assert_exact, distance, randomize, step
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.models import create_model
from gigamorph.kernels import choice

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def network(name: str = "resnet18", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(create_model(name, num_classes=4, in_channels=1), seed).cuda()


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad(set_to_none=True)
    output = net(x)
    output.float().square().sum().backward()
    return [output.detach().clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kernels", ["stock", "triton"])
@pytest.mark.parametrize("tile", [64, 264])
def test_float64(live: bool, kernels: str, tile: int) -> None:
    """In tiles, and in one, whose maps are taken as they lie and whose live norms have their gradient complete."""
    with choice.override(kernels):
        assert_exact(network().double().train(live), torch.rand(2, 1, 200, 264, device="cuda").double(), tile=tile)


@pytest.mark.parametrize("name", ["resnet50", "timm:densenet121", "timm:efficientnet_b0", "timm:convnext_atto"])
def test_float64_of_other_families(name: str) -> None:
    """Bottlenecks, whose ends are gathered; norms in front of activations; depthwise convolutions and scales."""
    with choice.override("triton"):
        assert_exact(network(name).double().eval(), torch.rand(1, 1, 200, 264, device="cuda").double(), tile=64)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kernels", ["stock", "triton", "auto"])
def test_float32_errs_no_more_than_stock(kernels: str, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, without TF32; the median over seeds, for the reason that test_networks.py gives."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ratios: list[tuple[float, float]] = []
    for seed in range(7):
        model, x = network(seed=seed).train(live), torch.rand(1, 1, 520, 392, device="cuda")
        truth = step(copy.deepcopy(model).double(), x.double())
        stock = distance(truth, step(copy.deepcopy(model), x))
        with choice.override(kernels):
            ours = distance(truth, step(accelerate(copy.deepcopy(model), tile=128), x))
        ratios.append((ours[0] / stock[0], ours[1] / stock[1]))
    outputs, found = (statistics.median(column) for column in zip(*ratios, strict=True))
    assert max(outputs, found) <= 1.5, f"{outputs:.2f} and {found:.2f} times stock's error: {ratios}"


def test_two_equal_steps_are_equal() -> None:
    net, x = accelerate(network().eval(), tile=128), torch.rand(1, 1, 700, 500, device="cuda")
    gradients(net, x)  # measures, compiles and captures
    first, second = gradients(net, x), gradients(net, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def on_another_stream(image: torch.Tensor) -> torch.Tensor:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        made = image * 2
    torch.cuda.current_stream().wait_stream(stream)
    made.record_stream(torch.cuda.current_stream())
    return made


def after_a_sleep(image: torch.Tensor) -> torch.Tensor:
    torch.cuda._sleep(200_000_000)  # a tenth of a second
    return image * 2


def by_an_upload(image: torch.Tensor) -> torch.Tensor:
    host = (image * 2).cpu().pin_memory()
    torch.cuda._sleep(200_000_000)
    return host.to("cuda", non_blocking=True)


@pytest.mark.parametrize("make", [after_a_sleep, on_another_stream, by_an_upload])
def test_pixels_that_are_still_being_made(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    net, image = accelerate(network().eval(), tile=128), torch.rand(1, 1, 700, 500, device="cuda")
    wanted = gradients(net, (image * 2).clone())
    torch.cuda.synchronize()
    for _ in range(3):
        got = gradients(net, make(image))
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
