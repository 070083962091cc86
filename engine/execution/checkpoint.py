"""Gradient checkpointing: segments of steps whose maps are freed and recomputed in the backward (Chen et al., 2016)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..module import locks
from ..module.first_order import first_order, note_memory
from ..tiling.arena import in_arena
from ..tiling.stored_maps import add_reader
from ..torch_private import keeps_graph
from .forward import Forward, step_together
from .prepared import Segment


class Checkpointed(torch.autograd.Function):
    """A segment of steps as one autograd function of the segment's inputs in all forwards that run together."""

    @staticmethod
    def run(forwards: Sequence[Forward], number: int) -> None:
        """Run the segment that begins at a step and store its outputs in the environments of the forwards."""
        segments = [forward.prepared.segments[number] for forward in forwards]
        inputs, tensors = [], []
        for forward, segment in zip(forwards, segments, strict=True):
            inputs.append(tuple(v for v in segment.inputs if v in forward.env))  # only the dtype of a map may be read
            tensors += [forward.env[v] for v in inputs[-1]]
            tensors += [] if forward.image is None else [forward.image]
        results = iter(Checkpointed.apply(forwards, segments, inputs, *tensors))  # pyright: ignore[reportArgumentType]
        for forward, segment in zip(forwards, segments, strict=True):
            forward.take_over(segment.outputs, [next(results) for _ in segment.outputs])
            for value in segment.ends:
                forward.env.pop(value, None)

    @staticmethod
    def forward(
        ctx: Any, outer: Sequence[Forward], segments: list[Segment], inputs: list[tuple[int, ...]], *tensors: Tensor
    ):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        note_memory(ctx, tensors)
        for tensor, wanted in zip(tensors, ctx.needs_input_grad[3:], strict=True):
            add_reader(tensor, int(wanted))
        ctx.segments, ctx.inputs, ctx.turn = segments, inputs, locks.current()
        ctx.images = [one.image is not None for one in outer]
        ctx.outer = [one.part({}, None) for one in outer]
        inner = _inner_forwards(outer, inputs, ctx.images, tensors)
        with locks.RANDOM if any(tiled.random for tiled in outer[0].prepared.stages) else contextlib.nullcontext():
            ctx.random_state = None
            if not outer[0].alone:  # captured work draws nothing and must not read the state
                gpu = outer[0].device if outer[0].device.type == "cuda" else None
                ctx.random_state = torch.get_rng_state(), gpu and torch.cuda.get_rng_state(gpu)
            for number in segments[0].steps:
                step_together(inner, number)
            ctx.drawn = locks.drawn()
        return tuple(one.env[v] for one, segment in zip(inner, segments, strict=True) for v in segment.outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None):
        last = not keeps_graph()
        tensors = [
            t.detach().requires_grad_(wanted)
            for t, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        inner = _inner_forwards(ctx.outer, ctx.inputs, ctx.images, tensors)
        device = inner[0].device
        with in_arena(device), torch.enable_grad(), _drawing_the_same(ctx, device):
            for number in ctx.segments[0].steps:
                step_together(inner, number, again=True)
        roots = [i.env.pop(v) for i, segment in zip(inner, ctx.segments, strict=True) for v in segment.outputs]
        pairs = [(t, g) for t, g in zip(roots, grads, strict=True) if g is not None and t.requires_grad]
        wanted = [t for t in tensors if t.requires_grad]
        for one in inner:
            one.env.clear()
        del roots
        if not pairs:
            return None, None, None, *[None] * len(tensors)
        ends, end_grads = zip(*pairs, strict=True)
        del pairs
        with in_arena(device):
            results = iter(torch.autograd.grad(ends, wanted, end_grads, allow_unused=True))
        for tensor in wanted if last else ():
            add_reader(tensor, -1)
        return None, None, None, *(next(results) if t.requires_grad else None for t in tensors)


@contextlib.contextmanager
def _drawing_the_same(ctx: Any, device: torch.device) -> Iterator[None]:
    """Context with PyTorch's random number generators in the states of the forward."""
    if ctx.random_state is None:
        yield
        return
    gpus = [device] if device.type == "cuda" else []
    with locks.RANDOM, torch.random.fork_rng(devices=gpus):
        torch.set_rng_state(ctx.random_state[0])
        for gpu in gpus:
            torch.cuda.set_rng_state(ctx.random_state[1], gpu)
        yield
        locks.check_drawn(ctx.drawn)


def _inner_forwards(
    outer: Sequence[Forward], inputs: Sequence[tuple[int, ...]], images: Sequence[bool], tensors: Sequence[Tensor]
) -> list[Forward]:
    """The forwards of a segment on its input tensors: the values of each forward, then its image if it is a tensor."""
    left, inner = iter(tensors), []
    for one, values, has_image in zip(outer, inputs, images, strict=True):
        env = {v: next(left) for v in values}
        inner.append(one.part(env, next(left) if has_image else None))
    return inner
