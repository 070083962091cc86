"""Acceptance A10: the same checks on any device, channels-last, with TF32 and autocast switched on outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exactness import randomize
from morph_networks import half_resnet
from torch import Tensor, nn

from gigamorph.engine.morph.decompose import decompose
from gigamorph.engine.morph.deepen import insert_identity, insert_pair, insert_residual
from gigamorph.engine.morph.front import front
from gigamorph.engine.morph.inputs import add_planes
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.merge import merge
from gigamorph.engine.morph.widen import widen

MORPHS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "widen": lambda m, x: widen(m, x, factor=1.5),
    "merge": lambda m, x: merge(widen(m, x, factor=2)[0], x),
    "identity": lambda m, x: insert_identity(m, x, "layer1", act="SiLU"),
    "pair": lambda m, x: insert_pair(m, x, "layer2.0", "GELU"),
    "residual": lambda m, x: insert_residual(m, x, "layer3"),
    "decompose": lambda m, x: decompose(m, x, "layer1.0.conv1"),
    "kernel": lambda m, x: grow_kernel(m, x, ["layer1.0.conv2"], 5),
    "front": lambda m, x: front(m, x, 2, "stages"),
    "planes": lambda m, x: add_planes(m, torch.cat([x, x], 1), 1),
}


@pytest.fixture
def low_precision() -> Iterator[None]:
    """What a training script may have switched on."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@pytest.mark.usefixtures("low_precision")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", MORPHS)
def test_checks_are_in_full_precision(name: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    model = randomize(half_resnet(3, 1, 8)).to(device, memory_format=torch.channels_last)
    x = torch.zeros(2, 1, 64, 64, device=device).to(memory_format=torch.channels_last)
    with torch.autocast(device, dtype=torch.bfloat16):
        child, report = MORPHS[name](model, x)
    assert report.difference.float64 <= 1e-12 and report.difference.noise_ratio <= 8
    assert report.difference.noise_eval < 1e-5  # neither TF32 (5e-4) nor bfloat16 (4e-3)
    assert {p.device.type for p in child.parameters()} == {device}
