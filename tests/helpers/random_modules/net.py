"""The network of a spec."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import hooks, outputs, roots
from .piece import PIECES

if TYPE_CHECKING:
    from .spec import Spec


class Net(nn.Module):
    """Pieces one after the other, what joins them, heads, and a container for what the heads give."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.stem = nn.Conv2d(spec.channels, spec.width, 3, padding=1)
        dices = [random.Random(part.seed) for part in spec.pieces]
        self.pieces = nn.ModuleList(
            PIECES[part.name](spec.width, dice) for part, dice in zip(spec.pieces, dices, strict=True)
        )
        self.skips = tuple(spec.skips)
        self.film = nn.Linear(3, spec.width) if "meta" in spec.inputs else None
        self.heads = nn.ModuleList(
            outputs.HEADS[part.name](spec.width, random.Random(part.seed)) for part in spec.heads
        )
        self.container = spec.container

    def trunk(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for number, piece in enumerate(self.pieces):
            result = piece(maps[-1])
            skip = number in self.skips and result.shape == maps[-1].shape
            maps.append(result + maps[-1] if skip else result)
        return maps

    def forward(
        self,
        image: Tensor,
        other: Tensor | None = None,
        mask: Tensor | None = None,
        meta: Tensor | None = None,
        scale: float = 1.0,
        flag: bool = False,
    ) -> Any:
        maps = self.trunk(image)
        x = maps[-1]
        if other is not None:
            y = self.trunk(other)[-1]
            x = torch.cat([x - y, x * y], 1)[:, : x.shape[1]] + y if x.shape == y.shape else x
        if mask is not None:
            x = x * F.interpolate(mask, x.shape[-2:])
        if meta is not None and self.film is not None:
            x = x * (1 + self.film(meta))[:, :, None, None]
        x = x * scale
        if flag:
            x = x.relu()
        found = [head(x, maps) for head in self.heads]
        return outputs.CONTAINERS[self.container](found, image)


def build(spec: Spec) -> nn.Module:
    """The network, float64, in training mode; the same for the same spec."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(spec.seed)
    kinds = (*(roots.ROOTS[name] for name in spec.roots), Net)
    net = (type("Net", kinds, {}) if len(kinds) > 1 else Net)(spec)
    net = net.double()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
        for module in net.modules():
            if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
                module.weight.copy_(torch.rand(module.weight.shape) + 0.5)
    for part in spec.fitted:
        hooks.FITTINGS[part.name](net, random.Random(part.seed))
    torch.set_rng_state(state)
    return net
