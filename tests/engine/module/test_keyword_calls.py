"""Calls as transformers' models have them: pixels and labels by keyword, a loss in an output that is an object."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from exactness import LIMIT, errors, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate


@dataclass
class Output(OrderedDict):
    """A dataclass that is a dictionary of what is not None, as transformers' ModelOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value


class ForImages(nn.Module):
    """A backbone, a head for an image or for each pixel, and a loss where labels are given."""

    def __init__(self, pixels: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pixels, self.head = pixels, nn.Conv2d(8, 4, 1) if pixels else nn.Linear(8, 4)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        first = self.first(pixel_values)
        second = self.second(first)
        logits = self.head(second if self.pixels else second.mean((2, 3)))
        loss = None
        if labels is not None:
            size = labels.shape[-2:]
            whole = F.interpolate(logits, size=size, mode="bilinear", align_corners=False) if self.pixels else logits
            loss = F.cross_entropy(whole, labels)
        if return_dict is False:
            return (loss, logits) if loss is not None else (logits,)
        return Output(loss, logits, (first, second) if output_hidden_states else None)


def pair(pixels: bool) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Stock, accelerated, two images and their labels."""
    torch.manual_seed(0)
    model = randomize(ForImages(pixels)).double().train()
    labels = torch.randint(0, 4, (2, 70, 53)) if pixels else torch.tensor([3, 1])
    return model, accelerate(copy.deepcopy(model), tile=16), torch.randn(2, 3, 70, 53, dtype=torch.float64), labels


@pytest.mark.parametrize("pixels", [False, True], ids=["of an image", "of each pixel"])
def test_a_step_by_keywords_is_stocks(pixels: bool) -> None:
    model, net, x, labels = pair(pixels)
    found = []
    for network in (model, net):
        inside = x.clone().requires_grad_()
        out = network(pixel_values=inside, labels=labels)
        assert isinstance(out, Output) and list(out) == ["loss", "logits"] and out["loss"] is out.loss
        assert out.loss is not None and out.logits is not None
        out.loss.backward()
        values = {"loss": out.loss.detach(), "logits": out.logits.detach(), "pixel_values": inside.grad}
        found.append(values | {n: p.grad for n, p in network.named_parameters()} | dict(network.named_buffers()))
    worst = errors(*found)
    assert not [name for name, error in worst.items() if not error <= LIMIT], worst


def test_other_labels_and_other_arguments_are_other_calls() -> None:
    """Nothing of an earlier call is left: not its labels, nor which outputs there were."""
    model, net, x, labels = pair(pixels=False)
    for network in (model, net):
        network.eval()
    calls: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels.flip(0)},
        {},
        {"output_hidden_states": True},
        {"labels": labels, "return_dict": False},
    ]
    for call in calls:
        with torch.no_grad():
            expected, got = model(pixel_values=x, **call), net(pixel_values=x, **call)
        assert type(got) is type(expected)
        names = list(expected) if isinstance(expected, Output) else range(len(expected))
        assert len(got) == len(expected)
        for name in names:
            torch.testing.assert_close(got[name], expected[name], rtol=LIMIT, atol=LIMIT)


class Given(OrderedDict):
    """A dictionary with attributes, which cannot be made without arguments."""

    def __init__(self, logits: Tensor, names: list[str]) -> None:
        super().__init__(logits=logits)
        self.logits, self.names = logits, names


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, pixel_values: Tensor) -> Given:
        return Given(self.conv(pixel_values).mean((2, 3)), ["a", "b"])


def test_dictionaries_that_take_arguments_come_back_with_their_attributes() -> None:
    model = Named().double()
    x = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    expected, got = model(pixel_values=x), accelerate(copy.deepcopy(model), tile=16)(pixel_values=x)
    assert type(got) is Given and got.names == ["a", "b"] and got["logits"] is got.logits
    torch.testing.assert_close(got.logits, expected.logits, rtol=LIMIT, atol=LIMIT)
