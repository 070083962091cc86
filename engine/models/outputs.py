"""What the numbers that a network gives mean: classes, labels, several heads; and their log-odds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import GigamorphError
from .views import Views, pool

Activation = Literal["softmax", "sigmoid", "probability", "ordinal", "number", "features"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclass(frozen=True)
class Head:
    """Neighbouring columns of a network's output that belong together.

    Attributes:
        classes: "softmax": names of classes that exclude each other, one a column. "sigmoid" and "probability": names
            of labels, any of which may hold, one a column; or of two classes for a single column, which is the
            second's. "ordinal": names of classes in their order, one more than columns, of which column k is the
            logit of being above class k for what is not below it. "number": names of numbers, one a column.
            "features": none; what is given is no prediction.
        activation: what makes probabilities of the columns; "probability": they are.
        columns: how many there are.
        name: tells the heads of one network apart.
        center, spread: of each number, which is center + spread * column.
    """

    classes: tuple[str, ...]
    activation: Activation
    columns: int
    name: str = ""
    center: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise GigamorphError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        fits = len(self.classes) == self.columns + (self.activation == "ordinal")
        fits = fits or (self.binary and len(self.classes) == 2)
        place = f"head {self.name!r}: " if self.name else ""
        if self.activation != "features" and not fits:
            raise GigamorphError(
                f"{place}{len(self.classes)} names ({', '.join(self.classes)}) do not fit {self.columns} "
                f"outputs of a {self.activation}"
            )
        if self.activation == "softmax" and self.columns < 2:
            raise GigamorphError(f"{place}a softmax of a single output is always 1; take sigmoid")

    @property
    def binary(self) -> bool:
        """Whether a single column stands for the second of two classes."""
        return self.columns == 1 and self.activation in ("sigmoid", "probability")

    def log_odds(self, values: Tensor) -> Tensor:
        """(N, columns) -> (N, classes): of each class against all others, of each label against its absence.

        Of numbers it is these.
        """
        if self.activation == "softmax":
            others = [torch.cat([values[:, :c], values[:, c + 1 :]], 1) for c in range(self.columns)]
            return torch.stack([values[:, c] - torch.logsumexp(others[c], 1) for c in range(self.columns)], 1)
        if self.activation == "ordinal":
            return _of_steps(values)
        if self.activation == "number":
            return values * values.new_tensor(self.spread) + values.new_tensor(self.center)
        found = torch.logit(values) if self.activation == "probability" else values
        return torch.cat([-found, found], 1) if self.binary and len(self.classes) == 2 else found


@dataclass(frozen=True)
class Outputs:
    """The heads of a network, whose columns stand side by side in its output (N, width).

    Attributes:
        averaged: what is given are log-odds (N, names) already, as of an ensemble.
        views: how several views of an exam are one; "attention" is by one column more, the last. None for networks
            of single images.
        members: of an ensemble of networks of exams: the outputs of each, whose columns stand side by side, for views
            are combined network by network before their probabilities are averaged.
    """

    heads: tuple[Head, ...]
    averaged: bool = False
    views: Views | None = None
    members: tuple[Outputs, ...] = ()

    @classmethod
    def of(cls, activation: Activation, columns: int, classes: tuple[str, ...] = ()) -> Outputs:
        """One head; without names classes are called 0, 1, ..., those of a single sigmoid 0 and 1."""
        if not classes and activation != "features":
            binary = columns == 1 and activation != "softmax"
            classes = tuple(str(i) for i in range(2 if binary else columns))
        return cls((Head(classes, activation, columns),))

    @property
    def columns(self) -> int:
        return sum(head.columns for head in self.heads)

    @property
    def width(self) -> int:
        """Columns of the network's output."""
        return self.columns + (self.views == "attention")

    @property
    def names(self) -> list[str]:
        """Of all classes and labels, in order; those of several heads begin with the head's."""
        if len(self.heads) == 1:
            return list(self.heads[0].classes)
        found: list[str] = []
        for head in self.heads:
            found += [head.name] if len(head.classes) == 1 else [f"{head.name}_{one}" for one in head.classes]
        return found

    @property
    def exclusive(self) -> bool:
        """Whether an image has exactly one of the names."""
        head = self.heads[0]
        own = head.activation in ("softmax", "ordinal") or (head.binary and len(head.classes) == 2)
        return len(self.heads) == 1 and own

    @property
    def ordered(self) -> bool:
        """Whether the names are classes in an order."""
        return self.heads[0].activation == "ordinal"

    @property
    def numbers(self) -> bool:
        """Whether what is predicted are numbers, no probabilities."""
        return any(head.activation == "number" for head in self.heads)

    @property
    def predicts(self) -> bool:
        """Whether all of it are predictions, none features."""
        return all(head.activation != "features" for head in self.heads)

    def log_odds(self, values: Tensor) -> Tensor:
        """(N, columns) or (N, width) of the network -> (N, names), differentiable."""
        if self.averaged:
            return values
        if self.members:
            own = values.tensor_split(len(self.members), 1)
            each = torch.stack([one.log_odds(part) for one, part in zip(self.members, own, strict=True)])
            return each.mean(0) if self.numbers else mean_log_odds(each)
        parts = torch.split(values[:, : self.columns], [head.columns for head in self.heads], 1)
        return torch.cat([head.log_odds(part) for head, part in zip(self.heads, parts, strict=True)], 1)

    def together(self, rows: Tensor) -> Tensor:
        """What the network gives of an exam's views (views, width) as that of the exam, (1, columns); see `views`."""
        assert self.views is not None
        if self.members:
            own = rows.tensor_split(len(self.members), 1)
            return torch.cat([one.together(part) for one, part in zip(self.members, own, strict=True)], 1)
        return pool(rows, self.views, exclusive=self.heads[0].activation == "softmax")

    def to_json(self) -> list[dict[str, Any]]:
        """Plain containers; `from_json` reads them back."""
        return [
            {
                "name": h.name,
                "activation": h.activation,
                "outputs": h.columns,
                "classes": list(h.classes),
                **({"center": list(h.center), "spread": list(h.spread)} if h.activation == "number" else {}),
            }
            for h in self.heads
        ]

    @classmethod
    def from_json(cls, heads: list[Mapping[str, Any]]) -> Outputs:
        """The inverse of `to_json`."""
        return cls(
            tuple(
                Head(
                    tuple(h["classes"]),
                    h["activation"],
                    h["outputs"],
                    h["name"],
                    tuple(h.get("center", ())),
                    tuple(h.get("spread", ())),
                )
                for h in heads
            )
        )


def mean_log_odds(log_odds: Tensor) -> Tensor:
    """Log-odds (...) of the mean of the probabilities along the first axis, without rounding them to 0 or 1."""
    return torch.logsumexp(F.logsigmoid(log_odds), 0) - torch.logsumexp(F.logsigmoid(-log_odds), 0)


def _of_steps(steps: Tensor) -> Tensor:
    """Log-odds (N, K) of ordered classes from logits (N, K - 1) of going on above each class but the last."""
    on, end = F.logsigmoid(steps), F.logsigmoid(-steps)
    reached = torch.cat([torch.zeros_like(on[:, :1]), on.cumsum(1)], 1)  # log of the probability of class k or above
    own = torch.cat([reached[:, :-1] + end, reached[:, -1:]], 1)
    others = [torch.logsumexp(torch.cat([own[:, :k], own[:, k + 1 :]], 1), 1) for k in range(own.shape[1])]
    return own - torch.stack(others, 1)


_ATTRIBUTE = "gigamorph_outputs"


def set_outputs(network: Any, outputs: Outputs) -> None:
    """Have a network say what its outputs are, for `outputs_of`."""
    setattr(network, _ATTRIBUTE, outputs)


def outputs_of(network: Any) -> Outputs | None:
    """What the outputs of a network or an accelerated one are; None where it does not say: logits of a softmax."""
    found = getattr(network, _ATTRIBUTE, None)
    return found if isinstance(found, Outputs) else None
