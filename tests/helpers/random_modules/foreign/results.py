"""Shapes as einops writes them, flips of the image, numbers on the side, and results of the author's own classes."""

from __future__ import annotations

import enum
import random
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import VALUES, Foreign


class Reshapes(Foreign):
    """Reshapes, as einops writes them."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.expand, self.size = nn.Conv2d(width, 4 * width, 1), dice.choice([1, 2])

    def depth_to_space(self, y: Tensor) -> Tensor:
        y = self.expand(y)
        n, c, h, w = y.shape
        return y.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)

    def pixel_shuffle(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(self.expand(y), 2)

    def space_to_depth(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        y = y[..., : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
        return y.permute(0, 3, 5, 1, 2, 4).reshape(n, 4, c, h // 2, w // 2).mean(1)

    def channel_shuffle(self, y: Tensor) -> Tensor:
        z = self.expand(y).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return z.unflatten(1, (-1, 4)).amax(2)

    def channels_last(self, y: Tensor) -> Tensor:
        return F.layer_norm(y.movedim(1, -1), (y.shape[1],)).movedim(-1, 1)

    def rows_as_batch(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        rows = y.permute(0, 2, 1, 3).reshape(n * h, c, w).softmax(1)
        return rows.reshape(n, h, c, w).permute(0, 2, 1, 3)

    def product(self, y: Tensor) -> Tensor:
        return torch.einsum("n c h w, d c -> n d h w", y, self.expand.weight[: y.shape[1], :, 0, 0])

    def windows(self, y: Tensor) -> Tensor:
        return F.unfold(y, 3, padding=1).unflatten(1, (y.shape[1], 9)).mean(2).unflatten(-1, y.shape[2:])

    def pixels_as_tokens(self, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        return F.layer_norm(tokens, tokens.shape[-1:]).transpose(1, 2).reshape(y.shape)

    def repeated(self, y: Tensor) -> Tensor:
        return torch.stack([y, y.tanh()], 2).flatten(1, 2)[:, ::2] + y.repeat_interleave(2, 1)[:, ::2]


class FlippedImage(Foreign):
    """The network takes views of its image, flipped, in front of frozen norms."""

    variations = ("horizontal", "both", "transposed", "cropped", "averaged", "strided", "quarter_turn", "in_norm")

    def setup(self, width: int, dice: random.Random) -> None:
        self.norm = nn.BatchNorm2d(width).eval()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in_norm":
            return self.norm(x[..., 1:].flip(3)) + self.norm(x[..., :-1])
        return self.norm(self.conv(x))

    def fit(self, net: nn.Module) -> None:
        how, kind = self.how, type(net)

        class Flips(kind):
            def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
                if how == "averaged":
                    return super().forward((image + image.flip(-1)) / 2, *args, **kwargs)
                return super().forward(_VIEWS.get(how, lambda x: x)(image), *args, **kwargs)

        Flips.__name__ = kind.__name__
        net.__class__ = Flips


_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "horizontal": lambda x: x.flip(-1),
    "both": lambda x: x.flip(2, 3)[:, :, 1:],
    "transposed": lambda x: x.transpose(2, 3).flip(2),
    "cropped": lambda x: x[..., 1:-1, 2:].flip(3),
    "strided": lambda x: x[..., ::2, :].flip(2),
    "quarter_turn": lambda x: torch.rot90(x, 1, (2, 3)),
}


class SideLists(Foreign):
    """Numbers, arrays and tensors that the forward leaves in lists and attributes."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.log: list[Any] = []
        self.named: dict[str, Any] = {}
        self.last: Any = None

    def number(self, y: Tensor) -> Tensor:
        self.log.append(y.detach().mean().item())
        return y.relu()

    def shape(self, y: Tensor) -> Tensor:
        self.log.append(y.shape)
        return y.relu()

    def array(self, y: Tensor) -> Tensor:
        self.last = y.detach().mean((0, 2, 3)).cpu().numpy()
        return y.relu()

    def list_of_numbers(self, y: Tensor) -> Tensor:
        self.named[f"call {len(self.named)}"] = y.detach().amax((2, 3)).tolist()
        return y.relu()

    def map_kept(self, y: Tensor) -> Tensor:
        self.last = y
        return y.relu()

    def view_kept(self, y: Tensor) -> Tensor:
        self.last = y[:, :1, 1:]
        return y.relu()

    def deleted_again(self, y: Tensor) -> Tensor:
        self.moment = y.mean()
        y = y * self.moment
        del self.moment
        return y

    def loss_kept(self, y: Tensor) -> Tensor:
        self.aux_loss = y.square().mean() * 0.1
        return y.relu()

    def nested(self, y: Tensor) -> Tensor:
        self.named.setdefault("calls", []).append({"mean": y.mean().detach(), "size": y.shape[1]})
        return y.relu()

    def decided_by_value(self, y: Tensor) -> Tensor:
        self.log.append("positive" if y.detach().mean() > 0 else "negative")
        return y.relu()

    def array_written(self, y: Tensor) -> Tensor:
        if self.last is None:
            self.last = np.zeros(y.shape[1])
        self.last += 1
        return y * float(self.last[0])

    def change(self, net: nn.Module, number: int) -> None:
        if number == 2:
            self.log.clear()
            self.named = {"new": VALUES[number]}


class Quality(enum.Enum):
    GOOD = 1
    POOR = 2


class Prediction(NamedTuple):
    logits: Any
    quality: Quality = Quality.GOOD
    count: int = 0


@dataclass(frozen=True)
class Frozen:
    logits: Any
    names: tuple[str, ...] = ("a", "b")

    @property
    def first(self) -> Any:
        return self.logits[0] if isinstance(self.logits, (list, tuple)) else self.logits


@dataclass
class Made:
    """A result whose fields are computed when it is made."""

    logits: Any
    extras: dict[str, Any] = field(default_factory=dict)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.extras)


@dataclass(slots=True)
class Slotted:
    logits: Any
    note: str = "slots"


class Named(UserDict):
    """A dictionary by another name."""


class KeywordResult(dict):
    """A dictionary whose keys are attributes."""

    def __init__(self, **values: Any):
        super().__init__(**values)
        self.__dict__ = self


class ResultKinds(Foreign):
    """The network returns an object of a class of its own."""

    results: ClassVar[dict[str, Callable[[Any, int], Any]]] = {
        "named_tuple": lambda found, count: Prediction(found, Quality.POOR, count),
        "nested_tuples": lambda found, count: Prediction(Prediction(found), count=count),
        "frozen_data_class": lambda found, count: Frozen(found),
        "made_data_class": lambda found, count: Made(found, {"count": count}),
        "slotted_data_class": lambda found, count: Slotted(found),
        "user_dictionary": lambda found, count: Named(logits=found),
        "keyword_result": lambda found, count: KeywordResult(logits=found, count=count),
        "enumeration_as_key": lambda found, count: {Quality.GOOD: found, Quality.POOR: None},
        "numbers": lambda found, count: (found, count, f"call {count}", Quality.GOOD),
        "set_and_range": lambda found, count: [found, {1, 2}, range(count), None],
        "data_class_of_type": lambda found, count: Made(found, {"kind": Quality, "call": max}),
    }
    variations = tuple(results)

    def setup(self, width: int, dice: random.Random) -> None:
        self.counts = dice.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def fit(self, net: nn.Module) -> None:
        make, kind, counts = self.results[self.how], type(net), self.counts

        class Returns(kind):
            count = 1

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                if counts:
                    self.count += 1
                return make(super().forward(*args, **kwargs), self.count)

        Returns.__name__ = kind.__name__
        net.__class__ = Returns
