"""Cost of growth before it happens: parameters, FLOPs and activation memory per space and channel.

Each figure is the difference between the parent and a network with one more step in that space. That network exists as
shapes only (`Spaces.check`, then one forward on fake tensors). So every cost counts for any architecture: both sides of
a channel, norms, groups, and a flattened map in front of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..capture.refusals import NEEDS_VALUES
from ..errors import MorphError
from ..tiling.memory import format_bytes
from .copying import fill
from .running import failures
from .spaces import Space, Spaces, find_spaces
from .stem import activation_bytes
from .tracer import Fault
from .verify import count_parameters
from .widen import Counts, check_counts, choose_counts


@dataclass(frozen=True)
class Cost:
    """Cost of a network, or the difference of two costs."""

    parameters: int
    flops: int  # multiplications and additions of a forward
    activation_bytes: int  # memory that stock autograd stores between forward and backward

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters - other.parameters, self.flops - other.flops, self.activation_bytes - other.activation_bytes
        )

    def __str__(self) -> str:
        memory = format_bytes(self.activation_bytes)
        return f"{self.parameters:,} parameters, {short(self.flops)}FLOP, {memory} of activations"


@dataclass(frozen=True)
class CostRow:
    """A space and the cost of its smallest step; the cost is None if the space is frozen."""

    space: Space
    step: int  # number of channels in the smallest step
    cost: Cost | None

    def per_channel(self) -> tuple[float, float, float] | None:
        """Return parameters, FLOPs and activation bytes of one more channel, averaged over the step."""
        c = self.cost
        return None if c is None else tuple(n / self.step for n in (c.parameters, c.flops, c.activation_bytes))  # pyright: ignore


@dataclass(frozen=True)
class Growth:
    """Table of the costs of a network and of each of its spaces; `print` shows it."""

    shape: tuple[int, ...]  # shape of the image batch for FLOPs and memory
    total: Cost
    rows: list[CostRow]
    spaces: Spaces = field(repr=False)

    @torch.inference_mode(False)
    def predict(
        self,
        counts: Counts | None = None,
        factor: float | None = None,
        *,
        free: Mapping[int | str, int] | None = None,
        seed: int = 0,
    ) -> Cost:
        """Predict the cost of the network after `widen` with the same arguments, without computing weights.

        Raises:
            MorphError: a space cannot be widened in this way.
        """
        chosen, new = choose_counts(self.spaces, counts or {}, factor, free or {}, seed)
        return _cost_after(self.spaces, chosen, new, self.shape)

    def __str__(self) -> str:
        _, _, *size = self.shape
        image = " x ".join(map(str, size))
        head = f"{'id':>3}  {'width':>6}  {'step':>5}  {'parameters':>10}  {'FLOPs':>8}  {'memory':>10}  members"
        lines = [f"on images of {image}: {self.total}; each further channel costs", head]
        for row in self.rows:
            columns = [f"{cell:>{width}}" for cell, width in zip(cells(row), _WIDTHS, strict=True)]
            lines.append("  ".join([*columns, str(row.space)]))
        return "\n".join(lines)


_WIDTHS = (3, 6, 5, 10, 8, 10)


@torch.inference_mode(False)
def plan_growth(model: nn.Module, example: Tensor, size: tuple[int, int] | None = None) -> Growth:
    """Compute the cost of every channel space of a network.

    Args:
        model: any eager network that takes one image batch; it is not changed.
        example: an image batch (N, C, H, W); a small one is enough unless a linear layer needs the real size.
        size: (height, width) of the images for FLOPs and memory; by default the example's. Nothing of that size is
            allocated.

    Raises:
        MorphError: the network cannot be followed, or does not accept images of that size.
    """
    shape = (1, *example.shape[1:-2], *(size or example.shape[-2:]))
    spaces = find_spaces(model, example)
    total = _cost_after(spaces, {}, {}, shape)
    rows = []
    for space in spaces:
        first = space.order[0]
        step = space.classes.count(first)
        cost = None if space.frozen else _step_cost(spaces, space, shape) - total
        rows.append(CostRow(space, step if cost else 0, cost))
    return Growth(shape, total, rows, spaces)


def cells(row: CostRow) -> list[str]:
    """Return id, width, step and cost per channel as text."""
    space, costs = row.space, row.per_channel()
    if costs is None:
        return [str(space.id), str(space.width), "-", "-", "-", "-"]
    each = f"{costs[0]:,.0f}", short(costs[1]), format_bytes(round(costs[2]))
    return [str(space.id), str(space.width), str(row.step), *each]


def short(number: float) -> str:
    """Format a number with a decimal prefix, e.g. 1.8 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.0f} "


def _step_cost(spaces: Spaces, space: Space, shape: tuple[int, ...]) -> Cost:
    """Return the cost after the smallest step: one more copy of the first class, or of all if counts must be equal."""
    for counts in ((2, *[1] * (len(space.order) - 1)), (2,) * len(space.order)):
        try:
            return _cost_after(spaces, {space.key: counts}, {}, shape)
        except Fault:
            raise
        except MorphError as error:
            reason = error
    raise reason


def _cost_after(
    spaces: Spaces, copies: Mapping[str, Sequence[int]], free: Mapping[str, Sequence[int]], shape: tuple[int, ...]
) -> Cost:
    child, _ = check_counts(spaces, copies, free)

    def blank(tensor: Tensor) -> Tensor:
        # One stored number represents the whole tensor, because only its shape matters. So a view of a weight that
        # autograd stores (a linear layer's transpose) does not count as an activation.
        if not isinstance(tensor, nn.Parameter):
            return tensor
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

    fill(child, child, blank)
    counter = FlopCounterMode(display=False)
    with failures(f"the network cannot be run on images of {shape}"):
        try:
            stored = activation_bytes(_Counted(child, counter), shape, spaces.inputs.tensors[0])  # pyright: ignore[reportArgumentType]
        except RuntimeError as error:
            if type(error).__name__ not in NEEDS_VALUES:
                raise
            raise MorphError(
                "the forward depends on a value of a tensor (.item(), bool), so its cost cannot be counted without "
                "computing it; use widen() without a plan"
            ) from error
    return Cost(count_parameters(child), counter.get_total_flops(), stored)


class _Counted(nn.Module):
    """Wrapper that counts FLOPs inside the modes of its caller."""

    def __init__(self, body: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self.body, self.counter = body, counter

    def forward(self, x: Tensor) -> Any:
        with self.counter:
            return self.body(x)
