"""A training step on the whole image by PyTorch's own ops, for images on the CPU that tiles would not make faster.

Each stage takes some milliseconds of Python per tile. Without a budget, the plan selects this step if memory is ample.
The step stores what stock PyTorch stores, and differs from it in four things: frozen norms are folded into
convolutions, maps in float32 are NHWC, gradients of norms have the memory order of their maps
(`capture/gradient_fixes.py`), and blocks come from the arena, whose pages stay resident until the next step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from ..capture.program import Op, Value, call, in_stock_order, op_autocast, reads_memory
from ..lowering.folding import FOLDED
from ..lowering.winograd import convolution
from ..tiling.arena import Arena, arena, in_arena
from ..torch_private import after_backward
from .forward import Forward

# Ops that write to an input in place if no later op reads it, as in stock PyTorch.
_IN_PLACE = frozenset(
    "relu relu_ relu6 hardtanh hardtanh_ silu hardswish hardsigmoid leaky_relu leaky_relu_ elu elu_ celu selu mish "
    "dropout batch_norm add_ iadd mul_ imul".split()
)
_thread = threading.local()


def run_untiled(forward: Forward) -> None:
    """Run all ops of a forward on the whole image."""
    program, env, found = forward.prepared.staged.program, forward.env, arena()
    assert forward.image is not None
    env[program.image] = _in_order(forward.image)
    if found is not None:
        found.no_limit()
    with in_arena(forward.device):
        for op, fold, ended in forward.prepared.whole_ops:
            if fold is not None:
                env.update(zip((ref.value for ref in FOLDED), fold(env), strict=True))
            with op_autocast(op, forward.device):
                results = _call(op, env, ended, program.values)
            if op.name.startswith("conv"):
                results = map(_in_order, results)
            env.update(zip(op.outputs, results, strict=False))
            for value in ended:
                env.pop(value, None)
    if found is not None:
        enter = _backward_in(found)
        for value in set(program.handed_out()):
            if env[value].requires_grad:
                env[value].register_hook(enter)


def _call(op: Op, env: dict[int, Tensor], ended: Container[int], values: Sequence[Value]) -> list[Tensor]:
    if op.name == "conv2d" and (y := convolution(op, env)) is not None:
        return [y]
    copied = [v for v in op.mutated if v not in ended or op.name not in _IN_PLACE]
    if not reads_memory(op):
        with contextlib.suppress(RuntimeError):  # a view of a map that stock PyTorch stores in another order
            return call(op, env, copied)
    return call(op, {v: in_stock_order(values[v], env[v]) for v in op.inputs}, copied)


def _in_order(tensor: Tensor) -> Tensor:
    """A map in NHWC, for which oneDNN has faster kernels; float64 remains as it is."""
    if tensor.dim() != 4 or tensor.dtype == torch.float64:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _backward_in(found: Arena) -> Callable[[Tensor], None]:
    """A hook of an output that makes its backward allocate from the arena, also after an earlier one that failed."""

    def leave() -> None:
        if _thread.__dict__.pop("inside", False):
            found.leave()

    def enter(_grad: Tensor) -> None:
        if after_backward is None:
            return
        if not _thread.__dict__.get("inside", False):
            found.enter()
            _thread.inside = True
        after_backward(leave)

    return unserializable_hook(enter)  # an output can be saved without a warning
