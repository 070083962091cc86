"""Growing a network, including the checks, compared with steps of stock PyTorch on the grown network, in one run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gigamorph.engine.models import create_model
from gigamorph.engine.morph.deepen import insert_identity
from gigamorph.engine.morph.widen import widen

SIDE = 64


@pytest.mark.parametrize("name", ["widen", "insert_identity"])
def test_a_morph(compare: Callable[..., float], name: str) -> None:
    torch.manual_seed(0)
    net, example = create_model("lesionnet", in_channels=1).eval(), torch.rand(2, 1, SIDE, SIDE)
    morph = {
        "widen": lambda: widen(net, example, factor=2),
        "insert_identity": lambda: insert_identity(net, example, next(n for n, m in net.named_children() if n)),
    }[name]
    grown, _ = morph()
    image = torch.rand(4, 1, 4 * SIDE, 4 * SIDE)

    def ten_steps() -> None:
        for _ in range(10):
            grown.zero_grad()
            grown(image).square().mean().backward()

    compare(f"{name} against ten steps of what it makes", morph, ten_steps)
