"""What growth will cost, before anything is done: parameters, FLOPs and activation memory per space and channel.

Each figure is the difference of two networks, the parent and the one with a single step more in that space; the latter
exists as shapes only (`Spaces.check`, then one forward on fake tensors). So cost of every kind is counted, whatever
the architecture: both sides of a channel, norms, groups, and a flattened map in front of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.flop_counter import FlopCounterMode

from ..errors import MorphError
from ..tiling.memory import format_bytes
from .copies import Copies
from .running import failures
from .spaces import Space, Spaces, find_spaces
from .stem import activation_bytes
from .tensors import fill
from .tracer import Fault, Mismatch
from .verify import count_parameters
from .widen import check_counts
from .widths import Counts, choose_counts


@dataclass(frozen=True)
class Cost:
    """Of a network, or of the difference of two."""

    parameters: int
    flops: int  # multiplications and additions of a forward
    activation_bytes: int  # what stock autograd keeps between forward and backward

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters - other.parameters,
            self.flops - other.flops,
            self.activation_bytes - other.activation_bytes,
        )

    def __str__(self) -> str:
        memory = format_bytes(self.activation_bytes)
        return f"{self.parameters:,} parameters, {short(self.flops)}FLOP, {memory} of activations"


@dataclass(frozen=True)
class Row:
    """A space, and what the smallest step in it costs; no cost where it is frozen."""

    space: Space
    step: int  # channels that it grows by at once
    cost: Cost | None

    def per_channel(self) -> tuple[float, float, float] | None:
        """Parameters, FLOPs and activation bytes of one more channel, on average over the step."""
        c = self.cost
        return None if c is None else tuple(n / self.step for n in (c.parameters, c.flops, c.activation_bytes))  # pyright: ignore


@dataclass(frozen=True)
class Growth:
    """The table: what the network costs, and each of its spaces. `print` it."""

    shape: tuple[int, ...]  # of the image batch that FLOPs and memory are for
    total: Cost
    rows: list[Row]
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
        """What the network would cost after `widen` with the same arguments; nothing is computed.

        Raises:
            MorphError: a space cannot be widened thus.
        """
        chosen, new = choose_counts(self.spaces, counts or {}, factor, free or {}, seed)
        child, _ = check_counts(self.spaces, chosen, new)
        return _cost_of(child, self.shape, self.spaces.inputs.tensors[0])

    def __str__(self) -> str:
        _, _, *size = self.shape
        image = " x ".join(map(str, size))
        head = f"{'id':>3}  {'width':>6}  {'step':>5}  {'parameters':>10}  {'FLOPs':>8}  {'memory':>10}  members"
        lines = [f"on images of {image}: {self.total}; each further channel costs", head]
        lines += [
            "  ".join([*(f"{c:>{w}}" for c, w in zip(cells(r), _WIDTHS, strict=True)), where(r)]) for r in self.rows
        ]
        return "\n".join(lines)


_WIDTHS = (3, 6, 5, 10, 8, 10)


@torch.inference_mode(False)
def plan_growth(model: nn.Module, example: Tensor, size: tuple[int, int] | None = None) -> Growth:
    """Cost of every channel space of a network.

    Args:
        model: any eager network that takes one image batch; it is not changed.
        example: an image batch (N, C, H, W); a small one will do, unless a linear layer wants the real size.
        size: (height, width) of the images that FLOPs and memory are for; the example's by default. Nothing of that
            size is allocated.

    Raises:
        MorphError: the network cannot be followed, or does not take images of that size.
    """
    shape = (1, *example.shape[1:-2], *(size or example.shape[-2:]))
    spaces = find_spaces(model, example)
    total = _cost_after(spaces, {}, shape)
    rows = []
    for space in spaces:
        first = space.order[0]
        step = space.classes.count(first)
        cost = None if space.frozen else _step_cost(spaces, space, shape) - total
        rows.append(Row(space, step if cost else 0, cost))
    return Growth(shape, total, rows, spaces)


def cells(row: Row) -> list[str]:
    """Id, width, step and cost per channel, as text."""
    costs = row.per_channel()
    space = row.space
    if costs is None:
        return [str(space.id), str(space.width), "-", "-", "-", "-"]
    parameters, flops, memory = costs
    return [
        str(space.id),
        str(space.width),
        str(row.step),
        f"{parameters:,.0f}",
        short(flops),
        format_bytes(round(memory)),
    ]


def where(row: Row) -> str:
    """The first members of a space, and why it cannot grow if it cannot."""
    members = [f"{name}:{axis}" for name, axis in row.space.members]
    text = ", ".join(members[:2]) + (f" and {len(members) - 2} more" if len(members) > 2 else "")
    return f"{text}  [{row.space.frozen}]" if row.space.frozen else text


def short(number: float) -> str:
    """With a decimal prefix: 1.8 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.0f} "


def _step_cost(spaces: Spaces, space: Space, shape: tuple[int, ...]) -> Cost:
    """After the smallest step: one more copy of the first class, or of all where only equal counts are possible."""
    for classes in (space.order[:1], space.order):
        try:
            return _cost_after(spaces, dict.fromkeys(classes, (2, 0)), shape)
        except Fault:
            raise
        except MorphError as error:
            reason = error
    raise reason


def _cost_after(spaces: Spaces, copies: Copies, shape: tuple[int, ...]) -> Cost:
    try:
        child, _ = spaces.check(copies)
    except Mismatch as error:
        raise MorphError(f"these counts would change the function: {error}; nothing was changed") from None
    return _cost_of(child, shape, spaces.inputs.tensors[0])


def _cost_of(child: nn.Module, shape: tuple[int, ...], example: Tensor) -> Cost:
    def blank(tensor: Tensor) -> Tensor:
        # One stored number stands for the whole tensor: the shape is all that counts, and no view of a weight that
        # autograd keeps (a linear layer's transpose) counts as an activation.
        if not isinstance(tensor, nn.Parameter):
            return tensor
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

    fill(child, child, blank)
    counter = FlopCounterMode(display=False)
    with failures(f"the network cannot be run on images of {shape}"):
        try:
            kept = activation_bytes(_Counted(child, counter), shape, example)  # pyright: ignore[reportArgumentType]
        except DataDependentOutputException as error:
            raise MorphError(
                "the forward goes by a value of a tensor (.item(), bool), so that its cost cannot be counted without "
                "computing it; widen() does not need that"
            ) from error
    return Cost(count_parameters(child), counter.get_total_flops(), kept)


class _Counted(nn.Module):
    """Counts FLOPs inside of whatever modes its caller has entered."""

    def __init__(self, body: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self.body, self.counter = body, counter

    def forward(self, x: Tensor) -> Any:
        with self.counter:
            return self.body(x)
