"""What the network's own class does: mixins of the root module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .piece import ramp


class Counts(nn.Module):
    """Counts its calls."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


class StaysFrozen(nn.Module):
    """Keeps its norms in evaluation mode."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class ExtraState(nn.Module):
    """Has state that is no tensor."""

    seen = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        return super().forward(*args, **kwargs)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class OwnStateDict(nn.Module):
    """Saves under other names."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        found["version"] = torch.ones(1)
        return found

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k: v for k, v in state_dict.items() if k != "version"}, *args, **kwargs)


class Heats(nn.Module):
    """A temperature at the root."""

    temperature = 2.0

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(image / self.temperature, *args, **kwargs)


class RootTensor(nn.Module):
    """A plain tensor at the root."""

    def __init__(self, spec: Any):
        super().__init__(spec)
        self.offset = ramp(1)

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(image + self.offset, *args, **kwargs)


class KeepsLast(nn.Module):
    """Leaves what it saw in an attribute."""

    last: Any = None

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.last = image.mean((2, 3)).detach()
        return super().forward(image, *args, **kwargs)


class ChangesImage(nn.Module):
    """Normalises the image in place."""

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        image.sub_(0.1).mul_(2)
        return super().forward(image, *args, **kwargs)


class NeverTrained(nn.Module):
    """Its forward is without gradients."""

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnCall(nn.Module):
    """Its call does more than its forward."""

    def __call__(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(image * 0.5, *args, **kwargs)


ROOTS = {
    kind.__name__: kind
    for kind in (
        Counts,
        StaysFrozen,
        ExtraState,
        OwnStateDict,
        Heats,
        RootTensor,
        KeepsLast,
        ChangesImage,
        NeverTrained,
        OwnCall,
    )
}
