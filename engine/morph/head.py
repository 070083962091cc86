"""More outputs of a classifier: independent ones, softmax classes of a stated prior, or a class split into several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .copying import cast, duplicate
from .example import Example, as_inputs
from .report import Report
from .running import failures, output_tensors
from .step import EditAt
from .stock import stock
from .surgery import CONVS, morphed, plain
from .verify import OtherFunction

PRIOR = 0.01  # probability of a new softmax class, by default
# What to do where the network makes something else of its head's outputs.
KINDS = {
    "independent": "if a softmax follows, the kind is 'softmax'",
    "softmax": "if no softmax follows, the kind is 'independent'",
}


@torch.inference_mode(False)
def grow_head(
    model: nn.Module,
    example: Example,
    path: str,
    outputs: int,
    kind: str = "independent",
    *,
    prior: float | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Give the classifier `path` more outputs, after the old ones, which stay what they are.

    The new rows of weights are zero, so that a new output is the same number for every image, its bias.

    - "independent", each output its own sigmoid or regression: the bias is log(prior / (1 - prior)), the logit of the
      prior, or 0 without a prior.
    - "softmax": the bias is log(prior / (1 - n prior)) + L for n new classes, where L is the mean over the example of
      log(sum(exp(old logits))). On an image whose own sum is exp(L) a new class has the probability `prior`, so that
      its cross-entropy is -log(prior). The logits of the old classes stay exactly. Their probabilities are multiplied
      by 1 - n prior there, on other images by 1 / (1 + n exp(bias) / sum(exp(old logits))), all of an image by the
      same factor. The report says which range that is on the example: give one of typical images.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        path: the last linear layer or convolution.
        outputs: how many it shall have.
        kind: "independent" or "softmax", see above.
        prior: probability of each new class at the start, above 0 and below 1; 0.01 by default for a softmax.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: no plain layer, fewer outputs than now, a prior out of range, or a network that does more with the
            outputs than select them, e.g. a softmax after an "independent" head.
    """
    if not isinstance(outputs, int):
        raise MorphError(f"outputs {outputs!r}: give a whole number")
    if kind not in KINDS:
        raise MorphError(f"a head of kind {kind!r}; one of {', '.join(KINDS)}")
    if prior is not None and not 0 < prior < 1:
        raise MorphError(f"prior {prior!r}: give a probability above 0 and below 1")
    step, view = HeadStep(path, outputs, kind, 0.0), _View(example, kind == "softmax")
    with _says_what_follows(path, KINDS[kind]):
        if kind == "independent":
            step = replace(step, bias=math.log(prior / (1 - prior)) if prior else 0.0)
            return morphed(model, step, example, inplace=inplace, view=view)
        step, line = _with_prior(stock(model), step, view, PRIOR if prior is None else prior)
        child, report = morphed(model, step, example, inplace=inplace, view=view)
    return child, replace(report, changes=[*report.changes, line])


def _with_prior(model: nn.Module, step: HeadStep, view: _View, prior: float) -> tuple[HeadStep, str]:
    """The step with the bias that gives new classes that probability on the example, and a line that says what became
    of the others'.
    """
    new, found = view.new_classes(model, step)
    if new * prior >= 1:
        raise MorphError(f"prior {prior}: the {new} new classes have {new * prior:g} together; it must be less than 1")
    odds = math.log(prior / (1 - new * prior))
    step = replace(step, bias=odds - float(found.mean()))
    _, found = view.new_classes(model, step)
    if abs(float(found.mean()) - odds) > 1e-3:
        raise MorphError("the probabilities do not follow the bias") from OtherFunction()
    factors = 1 - new / (new + (-found).exp())
    return step, (
        f"{new} new classes of probability {prior:g}, bias {step.bias:.4g}; the old logits stay, and the old "
        f"probabilities are multiplied by {float(factors.min()):.4g} to {float(factors.max()):.4g} on the example"
    )


def split_class(
    model: nn.Module,
    example: Example,
    path: str,
    index: int,
    into: int = 2,
    *,
    shares: Sequence[float] | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Split one softmax class into several that add up to its probability; all other probabilities stay.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        path: the last linear layer or convolution.
        index: the class; it becomes the first part, the others come after all old classes.
        into: the number of parts.
        shares: of the parts; they add up to 1. Equal by default.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: no plain layer, no such class, or shares that are not positive or do not add up to 1.
    """
    parts = [1 / into] * into if shares is None and into > 1 else list(shares or [])
    if len(parts) != into or into < 2 or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-9:
        raise MorphError(f"class {index} into {into} parts with shares {shares}: give 2 or more, with sum 1")
    step = SplitClassStep(path, index, tuple(parts))
    with _says_what_follows(path, "only classes of a softmax can be split"):
        return morphed(model, step, example, inplace=inplace, rounded=True, view=_View(example, True, index))


@contextmanager
def _says_what_follows(path: str, remedy: str) -> Iterator[None]:
    """Of a head another function is no fault of the engine's: the network makes something else of its outputs."""
    try:
        yield
    except MorphError as error:
        if not isinstance(error.__cause__, OtherFunction):
            raise
        raise MorphError(
            f"module '{path}': the function differs, since the network makes something else of these outputs than this "
            f"keeps; {remedy}; the original is unchanged"
        ) from error


def _grown_rows(
    path: str, weight: Tensor, bias: Tensor | None, outputs: int, value: float
) -> tuple[Tensor, Tensor | None]:
    """Weight (outputs, ...) and bias with new rows of zeros, and that value in the bias."""
    new = outputs - len(weight)
    if new < 1:
        raise MorphError(f"module '{path}' has {len(weight)} outputs already; give more than that")
    if bias is None and value:
        bias = weight.new_zeros(len(weight))
    weight = torch.cat([weight, weight.new_zeros(new, *weight.shape[1:])])
    return weight, None if bias is None else torch.cat([bias, bias.new_full((new,), value)])


def _split_rows(
    path: str, weight: Tensor, bias: Tensor | None, index: int, shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Weight and bias with row `index` as often as there are shares, each logit plus the logarithm of its share."""
    if not 0 <= index < len(weight):
        raise MorphError(f"module '{path}' has no class {index}; it has {len(weight)}")
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    parts = (bias[index].double() + torch.tensor(shares, dtype=torch.float64, device=bias.device).log()).to(bias.dtype)
    bias = torch.cat([bias, parts[1:]])
    bias[index] = parts[0]
    return torch.cat([weight, weight[index : index + 1].repeat(len(shares) - 1, *[1] * (weight.ndim - 1))]), bias


# -- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadStep(EditAt, op="head"):
    """See `grow_head`."""

    outputs: int
    kind: str
    bias: float | None = None  # of the new rows; recipes of a softmax that lack it had -10^4

    def edit(self, model: nn.Module) -> list[str]:
        head = _head(model, self.path)
        bias = self.bias if self.bias is not None else -1e4 if self.kind == "softmax" else 0.0
        with torch.no_grad():
            return _set(head, self.path, *_grown_rows(self.path, head.weight, head.bias, self.outputs, bias))


@dataclass(frozen=True)
class SplitClassStep(EditAt, op="split_class"):
    """See `split_class`."""

    index: int
    shares: tuple[float, ...]

    def edit(self, model: nn.Module) -> list[str]:
        head = _head(model, self.path)
        with torch.no_grad():
            return _set(head, self.path, *_split_rows(self.path, head.weight, head.bias, self.index, self.shares))


def _head(model: nn.Module, path: str) -> Any:
    head = plain(model, path, nn.Linear, *CONVS)
    if getattr(head, "groups", 1) != 1:
        raise MorphError(f"module '{path}' is a grouped convolution; a head with one group is needed")
    return head


def _set(head: Any, path: str, weight: Tensor, bias: Tensor | None) -> list[str]:
    line = f"{path}: {len(head.weight)} -> {len(weight)} outputs"
    trainable = head.weight.requires_grad
    head.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=trainable)
    name = "out_features" if isinstance(head, nn.Linear) else "out_channels"
    setattr(head, name, len(weight))
    return [line]


# -- what shall stay ---------------------------------------------------------------------------------------------


class _View:
    """Makes of (parent, child) two networks whose outputs are what the morph preserves."""

    def __init__(self, example: Example, softmax: bool, index: int | None = None) -> None:
        self.example, self.softmax, self.index = example, softmax, index

    def __call__(self, parent: nn.Module, child: nn.Module) -> tuple[nn.Module, nn.Module]:
        old, new = (_outputs(net, self.example) for net in (parent, child))
        axes = _grown_axes(old, new)
        undo = [[] if axis is None else [(a.shape[axis], self.index)] for a, axis in zip(old, axes, strict=True)]
        none: list[Any] = [[] for _ in axes]
        arguments = (self.softmax, self.index is not None)
        return OldOutputs(parent, axes, none, *arguments), OldOutputs(child, axes, undo, *arguments)

    def new_classes(self, model: nn.Module, step: HeadStep) -> tuple[int, Tensor]:
        """How many there are, and log(p / (1 - n p)) of their probability p, for each row of the example's outputs."""
        child = step.repeat(cast(duplicate(model), torch.float32))  # whose bias is not rounded
        old, new = _outputs(model, self.example), _outputs(child, self.example)
        found, count = [], 0
        for before, after, axis in zip(old, new, _grown_axes(old, new), strict=True):
            if axis is None:
                continue
            count = after.shape[axis] - before.shape[axis]
            p = _probabilities(after, axis)
            p = (after.softmax(axis) if p is None else p).select(axis, before.shape[axis]).reshape(-1)
            found.append(p.log() - (1 - count * p).log())
        return count, torch.cat(found)


class OldOutputs(nn.Module):
    """The outputs of a network with the growth of its head undone: old ones, or what stays of their probabilities.

    `undo` has for each output, the last growth first, the number of classes before it, and the class whose parts the
    new ones are, if it was split. Parts are added up. Of a softmax with new classes the logits stay; where the network
    returns probabilities, those of the old classes are divided by their sum. `split`: logits become probabilities.
    """

    def __init__(
        self,
        network: nn.Module,
        axes: Sequence[int | None],
        undo: Sequence[Sequence[tuple[int, int | None]]],
        softmax: bool,
        split: bool,
    ) -> None:
        super().__init__()
        self.network, self.axes, self.undo, self.softmax, self.split = network, axes, undo, softmax, split

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        outputs = output_tensors(self.network(*args, **kwargs))
        return [
            y if axis is None else self._old(y, axis, undo)
            for y, axis, undo in zip(outputs, self.axes, self.undo, strict=True)
        ]

    def _old(self, y: Tensor, axis: int, undo: Sequence[tuple[int, int | None]]) -> Tensor:
        p = _probabilities(y, axis) if self.softmax else None
        if p is None and self.split:
            p = y.softmax(axis)
        result = y if p is None else p
        for width, index in undo:
            result, added = result.split([width, result.shape[axis] - width], axis)
            if index is not None:
                at = torch.tensor([index], device=y.device)
                result = result.index_add(axis, at, added.sum(axis, keepdim=True))
            elif p is not None:
                result = result / result.sum(axis, keepdim=True)
        return result


def _probabilities(x: Tensor, axis: int) -> Tensor | None:
    """Probabilities, of themselves or of their logarithms; None for logits."""
    for p in (x, x.exp()):
        if (p >= 0).all() and ((p.sum(axis) - 1).abs() < 1e-3).all():
            return p
    return None


def _grown_axes(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[int | None]:
    """Of each output the axis along which it grew."""
    axes: list[int | None] = []
    for a, b in zip(old, new, strict=True):
        axes.append(next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None))
    if all(axis is None for axis in axes):
        raise MorphError("no output of the network grew with its head; name the last layer")
    return axes


def _outputs(network: nn.Module, example: Example) -> list[Tensor]:
    work = cast(duplicate(network), torch.float32).eval()
    with torch.no_grad(), failures("the network cannot be run"):
        inputs = as_inputs(example)
        return output_tensors(inputs.call(work, inputs.to(torch.float32)))
