"""More outputs of a classifier: independent ones, silent softmax classes, or a class split into several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from .copying import cast, duplicate
from .example import Example, as_inputs
from .report import Report
from .running import failures, output_tensors
from .step import EditAt
from .surgery import CONVS, morphed, plain
from .verify import OtherFunction

SILENT = -1e4  # a logit so low that its softmax is zero in every float format, and which all of them can hold
# What to do where the network makes something else of its head's outputs.
KINDS = {
    "independent": "if a softmax follows, the kind is 'softmax'",
    "softmax": "if no softmax follows, the kind is 'independent'",
}


def grow_head(
    model: nn.Module, example: Example, path: str, outputs: int, kind: str = "independent", *, inplace: bool = False
) -> tuple[nn.Module, Report]:
    """Give the classifier `path` more outputs, after the old ones.

    Args:
        model: the network; a copy is changed unless `inplace`.
        example: an input batch.
        path: the last linear layer or convolution.
        outputs: how many it shall have.
        kind: "independent" (each its own sigmoid or regression): the old outputs stay, the new ones begin at zero.
            "softmax": the old probabilities stay; the new ones are zero by a bias of -10^4 and get no gradient until
            that bias is raised. The terms of the softmax stay bit for bit, and their sum has zeros added, which PyTorch
            orders anew from as many classes on as a CPU's vector holds (8 with AVX2): then the last bit may differ. To
            begin with live classes, use `split_class`.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: no plain layer, fewer outputs than now, or a network that does more with the outputs than select
            them, e.g. a softmax after an "independent" head.
    """
    if not isinstance(outputs, int):
        raise MorphError(f"outputs {outputs!r}: give a whole number")
    if kind not in KINDS:
        raise MorphError(f"a head of kind {kind!r}; one of {', '.join(KINDS)}")
    step = HeadStep(path, outputs, kind)
    with _says_what_follows(path, KINDS[kind]):
        return morphed(model, step, example, inplace=inplace, view=_View(example, kind == "softmax"))


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
    members = {"index": index, "parts": into - 1}
    with _says_what_follows(path, "only classes of a softmax can be split"):
        return morphed(model, step, example, inplace=inplace, rounded=True, view=_View(example, True, **members))


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
    path: str, weight: Tensor, bias: Tensor | None, outputs: int, kind: str
) -> tuple[Tensor, Tensor | None]:
    """Weight (outputs, ...) and bias with new rows of zeros; the bias -10^4 for a softmax."""
    new = outputs - len(weight)
    if new < 1:
        raise MorphError(f"module '{path}' has {len(weight)} outputs already; give more than that")
    if bias is None and kind == "softmax":
        bias = weight.new_zeros(len(weight))
    weight = torch.cat([weight, weight.new_zeros(new, *weight.shape[1:])])
    if bias is not None:
        bias = torch.cat([bias, bias.new_full((new,), SILENT if kind == "softmax" else 0.0)])
    return weight, bias


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

    def edit(self, model: nn.Module) -> list[str]:
        head = _head(model, self.path)
        with torch.no_grad():
            return _set(head, self.path, *_grown_rows(self.path, head.weight, head.bias, self.outputs, self.kind))


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
    """Makes of (parent, child) two networks whose outputs are what the morph keeps."""

    def __init__(self, example: Example, softmax: bool, index: int = 0, parts: int = 0) -> None:
        self.example, self.softmax, self.index, self.parts = example, softmax, index, parts

    def __call__(self, parent: nn.Module, child: nn.Module) -> tuple[nn.Module, nn.Module]:
        old, new = (_outputs(net, self.example) for net in (parent, child))
        axes: list[int | None] = []
        for a, b in zip(old, new, strict=True):
            other = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
            axes.append(other[0] if other else None)
        if all(axis is None for axis in axes):
            raise MorphError("no output of the network grew with its head; name the last layer")
        sizes = [None if axis is None else a.shape[axis] for a, axis in zip(old, axes, strict=True)]
        arguments = (axes, sizes, self.softmax, self.index, self.parts)
        return _Kept(parent, *arguments), _Kept(child, *arguments)


class _Kept(nn.Module):
    """The old outputs, or their probabilities; those of split classes are added up again."""

    def __init__(
        self,
        network: nn.Module,
        axes: list[int | None],
        sizes: list[int | None],
        softmax: bool,
        index: int,
        parts: int,
    ) -> None:
        super().__init__()
        self.network, self.axes, self.sizes = network, axes, sizes
        self.softmax, self.index, self.parts = softmax, index, parts

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        results = []
        for tensor, axis, size in zip(
            output_tensors(self.network(*args, **kwargs)), self.axes, self.sizes, strict=True
        ):
            if axis is not None and size is not None:
                tensor = _probabilities(tensor, axis) if self.softmax else tensor
                kept, added = tensor.narrow(axis, 0, size), tensor.narrow(axis, size, tensor.shape[axis] - size)
                if self.parts and added.shape[axis]:
                    at = torch.tensor([self.index], device=tensor.device)
                    kept = kept.index_add(axis, at, added.sum(axis, keepdim=True))
                tensor = kept
            results.append(tensor)
        return results


def _probabilities(x: Tensor, axis: int) -> Tensor:
    """Softmax of logits; probabilities and their logarithms as probabilities."""
    for p in (x, x.exp()):
        if (p >= 0).all() and ((p.sum(axis) - 1).abs() < 1e-3).all():
            return p
    return x.softmax(axis)


def _outputs(network: nn.Module, example: Example) -> list[Tensor]:
    work = cast(duplicate(network), torch.float32).eval()
    with torch.no_grad(), failures("the network cannot be run"):
        inputs = as_inputs(example)
        return output_tensors(inputs.call(work, inputs.to(torch.float32)))
