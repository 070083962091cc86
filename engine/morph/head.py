"""Growth of a classifier: independent outputs, softmax classes with a given prior, or a class split into several."""

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
from .running import failures, output_tensors
from .step import EditAt, Report
from .stock import stock
from .surgery import CONVS, morphed, plain
from .verify import OtherFunction

PRIOR = 0.01  # default probability of a new softmax class
# Advice for a network that processes the outputs of its head differently.
KINDS = {
    "independent": "if a softmax follows, use kind 'softmax'",
    "softmax": "if no softmax follows, use kind 'independent'",
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
    """Append outputs to the classifier `path`; the old outputs do not change.

    The new weight rows are zero, so a new output equals its bias on every image.

    - "independent", each output has its own sigmoid or regression: the bias is log(prior / (1 - prior)), the logit of
      the prior, or 0 without a prior.
    - "softmax": the bias is log(prior / (1 - n prior)) + L for n new classes, where L is the mean over the example of
      log(sum(exp(old logits))). On an image with sum exp(L) a new class has the probability `prior` and therefore the
      cross-entropy -log(prior). The logits of the old classes do not change. Their probabilities are multiplied by
      1 - n prior there, and on other images by 1 / (1 + n exp(bias) / sum(exp(old logits))), the same factor for all
      old classes of an image. The report states the range of this factor on the example, so give typical images.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        path: the last linear layer or convolution.
        outputs: the new number of outputs.
        kind: "independent" or "softmax".
        prior: initial probability of each new class, above 0 and below 1; for a softmax 0.01 by default.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: the module is not a plain layer, `outputs` is not larger than now, the prior is out of range, or
            the network does more with the outputs than select them, e.g. a softmax after an "independent" head.
    """
    if not isinstance(outputs, int):
        raise MorphError(f"outputs must be an integer, not {outputs!r}")
    if kind not in KINDS:
        raise MorphError(f"unknown kind {kind!r} of a head; choose from {', '.join(KINDS)}")
    if prior is not None and not 0 < prior < 1:
        raise MorphError(f"prior must be above 0 and below 1, not {prior!r}")
    step, view = HeadStep(path, outputs, kind, 0.0), _View(example, kind == "softmax")
    with _explain_failure(path, KINDS[kind]):
        if kind == "independent":
            step = replace(step, bias=math.log(prior / (1 - prior)) if prior else 0.0)
            return morphed(model, step, example, inplace=inplace, view=view)
        step, line = _with_prior(stock(model), step, view, PRIOR if prior is None else prior)
        child, report = morphed(model, step, example, inplace=inplace, view=view)
    return child, replace(report, changes=[*report.changes, line])


def _with_prior(model: nn.Module, step: HeadStep, view: _View, prior: float) -> tuple[HeadStep, str]:
    """Return the step with the bias that gives new classes the prior on the example, and a report line on old ones."""
    new, found = view.new_classes(model, step)
    if new * prior >= 1:
        raise MorphError(f"prior {prior}: the {new} new classes have {new * prior:g} together, which must be below 1")
    odds = math.log(prior / (1 - new * prior))
    step = replace(step, bias=odds - float(found.mean()))
    _, found = view.new_classes(model, step)
    if abs(float(found.mean()) - odds) > 1e-3:
        raise MorphError("the probabilities do not depend on the bias as a softmax does") from OtherFunction()
    factors = 1 - new / (new + (-found).exp())
    return step, (
        f"{new} new classes of probability {prior:g}, bias {step.bias:.4g}; the old logits do not change, and the old "
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
    """Split one softmax class into several that add up to its probability; all other probabilities stay the same.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an input batch.
        path: the last linear layer or convolution.
        index: the class; it becomes the first part, the other parts follow after all old classes.
        into: the number of parts.
        shares: shares of the parts, with sum 1; equal by default.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: the module is not a plain layer, the class does not exist, or the shares are not positive or do not
            add up to 1.
    """
    parts = [1 / into] * into if shares is None and into > 1 else list(shares or [])
    if len(parts) != into or into < 2 or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-9:
        raise MorphError(
            f"cannot split class {index} into {into} parts with shares {shares}; give 2 or more parts, with sum 1"
        )
    step = SplitClassStep(path, index, tuple(parts))
    with _explain_failure(path, "only classes of a softmax can be split"):
        return morphed(model, step, example, inplace=inplace, rounded=True, view=_View(example, True, index))


@contextmanager
def _explain_failure(path: str, remedy: str) -> Iterator[None]:
    """Turn a failed check into an explanation: the network processes the outputs of its head differently."""
    try:
        yield
    except MorphError as error:
        if not isinstance(error.__cause__, OtherFunction):
            raise
        raise MorphError(
            f"module '{path}': the function differs, because the network processes these outputs in a way that this "
            f"morph does not preserve; {remedy}; the original is unchanged"
        ) from error


# -- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadStep(EditAt, op="head"):
    """Step of `grow_head`."""

    outputs: int
    kind: str
    bias: float | None = None  # bias of the new rows; None in old recipes means -10^4 for a softmax

    def edit(self, model: nn.Module) -> list[str]:
        head = _head(model, self.path)
        value = self.bias if self.bias is not None else -1e4 if self.kind == "softmax" else 0.0
        new = self.outputs - len(head.weight)
        if new < 1:
            raise MorphError(f"module '{self.path}' already has {len(head.weight)} outputs; give a larger number")
        with torch.no_grad():
            bias = head.weight.new_zeros(len(head.weight)) if head.bias is None and value else head.bias
            bias = None if bias is None else torch.cat([bias, bias.new_full((new,), value)])
            zeros = head.weight.new_zeros(new, *head.weight.shape[1:])
            return _set(head, self.path, torch.cat([head.weight, zeros]), bias)


@dataclass(frozen=True)
class SplitClassStep(EditAt, op="split_class"):
    """Step of `split_class`."""

    index: int
    shares: tuple[float, ...]

    def edit(self, model: nn.Module) -> list[str]:
        head = _head(model, self.path)
        weight, count = head.weight, len(self.shares) - 1
        if not 0 <= self.index < len(weight):
            raise MorphError(f"module '{self.path}' has no class {self.index}; it has {len(weight)}")
        with torch.no_grad():
            bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias
            logs = torch.tensor(self.shares, dtype=torch.float64, device=bias.device).log()
            parts = (bias[self.index].double() + logs).to(bias.dtype)  # the share multiplies the probability
            bias = torch.cat([bias, parts[1:]])
            bias[self.index] = parts[0]
            copies = weight[self.index : self.index + 1].repeat(count, *[1] * (weight.ndim - 1))
            return _set(head, self.path, torch.cat([weight, copies]), bias)


def _head(model: nn.Module, path: str) -> Any:
    head = plain(model, path, nn.Linear, *CONVS)
    if getattr(head, "groups", 1) != 1:
        raise MorphError(f"module '{path}' is a grouped convolution; the head must have one group")
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


# -- preserved outputs -------------------------------------------------------------------------------------------


class _View:
    """Wraps (parent, child) so that both return the outputs that the morph preserves."""

    def __init__(self, example: Example, softmax: bool, index: int | None = None) -> None:
        self.example, self.softmax, self.index = example, softmax, index

    def __call__(self, parent: nn.Module, child: nn.Module) -> tuple[nn.Module, nn.Module]:
        old, new = (outputs_on(net, self.example) for net in (parent, child))
        axes = _grown_axes(old, new)
        undo = [[] if axis is None else [(a.shape[axis], self.index)] for a, axis in zip(old, axes, strict=True)]
        none: list[Any] = [[] for _ in axes]
        arguments = (self.softmax, self.index is not None)
        return OldOutputs(parent, axes, none, *arguments), OldOutputs(child, axes, undo, *arguments)

    def new_classes(self, model: nn.Module, step: HeadStep) -> tuple[int, Tensor]:
        """Return their number n, and log(p / (1 - n p)) of their probability p for each row of the outputs."""
        child = step.repeat(cast(duplicate(model), torch.float32))  # in float32, so that the bias is not rounded
        old, new = outputs_on(model, self.example), outputs_on(child, self.example)
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
    """Network with the growth of its head undone: it returns the old outputs, or their preserved probabilities.

    It returns the first outputs, as many as `axes`.

    `undo` lists for each output, the last growth first, the number of classes before the growth, and the class that was
    split, if any. The parts of a split class are added up. The old logits of a softmax do not change; if the network
    returns probabilities, those of the old classes are divided by their sum. With `split`, logits become probabilities.
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
            y if axis is None else self._undo_growth(y, axis, undo)
            for y, axis, undo in zip(outputs, self.axes, self.undo, strict=False)
        ]

    def _undo_growth(self, y: Tensor, axis: int, undo: Sequence[tuple[int, int | None]]) -> Tensor:
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
    """Return the probabilities if x contains probabilities or their logarithms; None for logits."""
    for p in (x, x.exp()):
        if (p >= 0).all() and ((p.sum(axis) - 1).abs() < 1e-3).all():
            return p
    return None


def _grown_axes(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[int | None]:
    """Return for each output the axis along which it grew, or None."""
    axes: list[int | None] = []
    for a, b in zip(old, new, strict=True):
        axes.append(next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None))
    if all(axis is None for axis in axes):
        raise MorphError("no output of the network grew with this layer; name the last layer")
    return axes


def outputs_on(network: nn.Module, example: Example) -> list[Tensor]:
    """Run a copy of a network in float32 and eval mode on an example."""
    work = cast(duplicate(network), torch.float32).eval()
    with torch.no_grad(), failures("the network cannot be run"):
        inputs = as_inputs(example)
        return output_tensors(inputs.call(work, inputs.to(torch.float32)))
