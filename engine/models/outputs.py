"""The meaning of a network's output columns: classes, labels, several heads; their log-odds; views of an exam pooled.

Also the tensors in the result of a forward by name, and a hook that concatenates some of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import from_plain, to_plain
from ..errors import GigamorphError

Views = Literal["mean", "max", "attention"]
VIEWS: tuple[str, ...] = get_args(Views)


def pool(rows: Tensor, views: Views, *, exclusive: bool) -> Tensor:
    """Pool the rows of the views of an exam to one row (1, columns), differentiable.

    With rows x_v (the network's columns for view v), the exam's row is

        mean        sum_v x_v / V
        max         for labels, numbers and ordinal columns max_v x_v; for two classes the row of the view with the
                    highest log-odds of the second; for more classes max_v log softmax(x_v)
        attention   sum_v a_v x_v with a = softmax over the views of one further column

    No pooling depends on the order of the views, nor on offsets that a softmax ignores. Attention follows Ilse, Tomczak
    and Welling (2018), applied to each view's outputs instead of its features, so that each view's contribution is
    known (as in Javed et al., 2022).

    Args:
        rows: (views, columns); with "attention" (views, columns + 1).
        exclusive: whether the columns are logits of one softmax.
    """
    if views == "attention":
        return (torch.softmax(rows[:, -1:], 0) * rows[:, :-1]).sum(0, keepdim=True)
    if views == "mean":
        return rows.mean(0, keepdim=True)
    if exclusive and rows.shape[1] == 2:
        return rows[(rows[:, 1] - rows[:, 0]).argmax()][None]
    return (torch.log_softmax(rows, 1) if exclusive else rows).amax(0, keepdim=True)


Activation = Literal["softmax", "sigmoid", "probability", "ordinal", "number", "features"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclass(frozen=True)
class Head:
    """Adjacent columns of a network's output that belong together.

    Attributes:
        classes: "softmax": names of exclusive classes, one per column. "sigmoid" and "probability": names of labels,
            any of which may apply, one per column; or two class names for a single column, which belongs to the
            second. "ordinal": names of ordered classes, one more than columns; column k is the logit of being above
            class k, given that it is not below. "number": names of numbers, one per column. "features": empty; the
            output is not a prediction.
        activation: function that turns the columns into probabilities; with "probability" they already are.
        outputs: number of columns.
        name: distinguishes the heads of one network.
        center, spread: per number; the number is center + spread * column.
    """

    classes: tuple[str, ...]
    activation: Activation
    outputs: int
    name: str = ""
    center: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise GigamorphError(f"activation {self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
        fits = len(self.classes) == self.outputs + (self.activation == "ordinal")
        fits = fits or (self.binary and len(self.classes) == 2)
        place = f"head {self.name!r}: " if self.name else ""
        if self.activation != "features" and not fits:
            raise GigamorphError(
                f"{place}{len(self.classes)} names ({', '.join(self.classes)}) do not fit {self.outputs} "
                f"outputs of a {self.activation}"
            )
        if self.activation == "softmax" and self.outputs < 2:
            raise GigamorphError(f"{place}a softmax of a single output is always 1; use sigmoid")

    @property
    def binary(self) -> bool:
        """Whether a single column belongs to the second of two classes."""
        return self.outputs == 1 and self.activation in ("sigmoid", "probability")

    def log_odds(self, values: Tensor) -> Tensor:
        """(N, columns) -> (N, classes): log-odds of each class against all others, of each label against its absence.

        Numbers are returned as they are, after center and spread.
        """
        if self.activation == "softmax":
            others = [torch.cat([values[:, :c], values[:, c + 1 :]], 1) for c in range(self.outputs)]
            return torch.stack([values[:, c] - torch.logsumexp(others[c], 1) for c in range(self.outputs)], 1)
        if self.activation == "ordinal":
            return _ordinal_log_odds(values)
        if self.activation == "number":
            return values * values.new_tensor(self.spread) + values.new_tensor(self.center)
        found = torch.logit(values) if self.activation == "probability" else values
        return torch.cat([-found, found], 1) if self.binary and len(self.classes) == 2 else found


@dataclass(frozen=True)
class Outputs:
    """The heads of a network, in the order of their columns in its output (N, width).

    Attributes:
        averaged: the output already holds log-odds (N, names), as from an ensemble.
        views: how the views of an exam are pooled; "attention" uses one more column, the last. None for networks of
            single images.
        members: outputs of each network in an ensemble of exam networks, in the order of their columns. Views are
            pooled per network, before the probabilities are averaged.
    """

    heads: tuple[Head, ...]
    averaged: bool = False
    views: Views | None = None
    members: tuple[Outputs, ...] = ()

    @classmethod
    def of(cls, activation: Activation, columns: int, classes: tuple[str, ...] = ()) -> Outputs:
        """Return outputs with one head; default class names are 0, 1, ..., and 0 and 1 for a single sigmoid."""
        if not classes and activation != "features":
            binary = columns == 1 and activation != "softmax"
            classes = tuple(str(i) for i in range(2 if binary else columns))
        return cls((Head(classes, activation, columns),))

    @property
    def columns(self) -> int:
        return sum(head.outputs for head in self.heads)

    @property
    def width(self) -> int:
        """Number of columns of the network's output."""
        return self.columns + (self.views == "attention")

    @property
    def names(self) -> list[str]:
        """Names of all classes and labels, in order; with several heads, each begins with its head's name."""
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
        """Whether the names are ordered classes."""
        return self.heads[0].activation == "ordinal"

    @property
    def numbers(self) -> bool:
        """Whether the predictions are numbers, not probabilities."""
        return any(head.activation == "number" for head in self.heads)

    @property
    def predicts(self) -> bool:
        """Whether all columns are predictions, not features."""
        return all(head.activation != "features" for head in self.heads)

    def log_odds(self, values: Tensor) -> Tensor:
        """(N, columns) or (N, width) network output -> (N, names), differentiable."""
        if self.averaged:
            return values
        if self.members:
            own = values.tensor_split(len(self.members), 1)
            each = torch.stack([one.log_odds(part) for one, part in zip(self.members, own, strict=True)])
            return each.mean(0) if self.numbers else mean_log_odds(each)
        parts = torch.split(values[:, : self.columns], [head.outputs for head in self.heads], 1)
        return torch.cat([head.log_odds(part) for head, part in zip(self.heads, parts, strict=True)], 1)

    def together(self, rows: Tensor) -> Tensor:
        """Pool the outputs for an exam's views (views, width) to one row (1, columns); see `pool`."""
        assert self.views is not None
        if self.members:
            own = rows.tensor_split(len(self.members), 1)
            return torch.cat([one.together(part) for one, part in zip(self.members, own, strict=True)], 1)
        return pool(rows, self.views, exclusive=self.heads[0].activation == "softmax")

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain containers; `from_json` reads them."""
        return [to_plain(head, () if head.activation == "number" else ("center", "spread")) for head in self.heads]

    @classmethod
    def from_json(cls, heads: list[dict[str, Any]]) -> Outputs:
        """Invert `to_json`."""
        return cls(tuple(from_plain(head, Head, "outputs") for head in heads))


def mean_log_odds(log_odds: Tensor) -> Tensor:
    """Return the log-odds (...) of the mean probability along the first axis, without rounding to 0 or 1."""
    return torch.logsumexp(F.logsigmoid(log_odds), 0) - torch.logsumexp(F.logsigmoid(-log_odds), 0)


def _ordinal_log_odds(steps: Tensor) -> Tensor:
    """Return log-odds (N, K) of ordered classes from logits (N, K - 1) of exceeding each class but the last."""
    on, end = F.logsigmoid(steps), F.logsigmoid(-steps)
    reached = torch.cat([torch.zeros_like(on[:, :1]), on.cumsum(1)], 1)  # log of the probability of class k or above
    own = torch.cat([reached[:, :-1] + end, reached[:, -1:]], 1)
    others = [torch.logsumexp(torch.cat([own[:, :k], own[:, k + 1 :]], 1), 1) for k in range(own.shape[1])]
    return own - torch.stack(others, 1)


_ATTRIBUTE = "gigamorph_outputs"


def set_outputs(network: Any, outputs: Outputs) -> None:
    """Attach the meaning of a network's outputs to it, for `outputs_of`."""
    setattr(network, _ATTRIBUTE, outputs)


def outputs_of(network: Any) -> Outputs | None:
    """Return the outputs of a network or an accelerated one; None if not attached, which means logits of a softmax."""
    found = getattr(network, _ATTRIBUTE, None)
    return found if isinstance(found, Outputs) else None


def tensors_in(result: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in a forward's result by keys, attributes and numbers joined with dots, as in "heads.0".

    Containers are mappings (also Hugging Face's), data classes, tuples (also named ones) and lists; other values
    are ignored. A single tensor is called "output".
    """
    if isinstance(result, Tensor):
        return {name or "output": result}
    parts: Mapping[Any, Any] = {}
    if isinstance(result, Mapping):
        parts = result
    elif is_dataclass(result) and not isinstance(result, type):
        parts = {one.name: getattr(result, one.name) for one in fields(result)}
    elif isinstance(result, tuple) and (named := getattr(result, "_fields", ())):
        parts = dict(zip(named, result, strict=True))
    elif isinstance(result, Sequence) and not isinstance(result, str):
        parts = dict(enumerate(result))
    found: dict[str, Tensor] = {}
    for key, part in parts.items():
        found |= tensors_in(part, f"{name}.{key}" if name else str(key))
    return found


def is_row(value: Tensor) -> bool:
    """Whether it has numbers per image and nothing else: floating point, (N,) or (N, columns)."""
    return value.ndim in (1, 2) and value.is_floating_point()


@dataclass(frozen=True)
class Columns:
    """A forward hook that concatenates some tensors of a network's result: (N, columns).

    Attributes:
        names: as in `tensors_in`. A tensor (N,) is one column.
    """

    names: tuple[str, ...]

    def __call__(self, module: Any, given: Any, result: Any) -> Tensor:
        found = tensors_in(result)
        for name in self.names:
            if name not in found or not is_row(found[name]):
                raise GigamorphError(f"the network has no row of numbers {name!r}; it outputs {format_tensors(found)}")
        rows = [found[name] for name in self.names]
        return torch.cat([row if row.ndim == 2 else row[:, None] for row in rows], 1)


def format_tensors(found: Mapping[str, Tensor]) -> str:
    """Format the names and shapes of tensors for a message."""
    shown = [f"{name} ({' x '.join(map(str, value.shape))})" for name, value in found.items()]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    return f"{', '.join(shown[:10]) or 'no tensor'}{more}"
