"""A training step on the whole image by PyTorch's own ops, in the memory format of the caller's image.

Each stage takes some milliseconds of Python per tile. On the CPU, with ample memory or budget, the plan selects this
step where that is more than tiles save. The step stores what stock PyTorch stores and differs from it in three things:
frozen norms are folded into convolutions, gradients of norms have the memory order of their maps
(`capture/gradient_fixes.py`), and blocks come from the arena, whose pages stay resident until the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from ..capture.program import call, op_autocast
from ..lowering.folding import FOLDED
from ..module.first_order import Memory, memory_of_parameters, refuse_moved
from ..tiling.arena import Arena, arena, in_arena
from ..torch_private import after_backward
from .forward import Forward

_thread = threading.local()


def run_untiled(forward: Forward) -> None:
    """Run all ops of a forward on the whole image."""
    program, env, found = forward.prepared.staged.program, forward.env, arena()
    assert forward.image is not None
    env[program.image], folded = forward.image, list[Tensor]()
    if found is not None:
        found.no_limit()
    with in_arena(forward.device):
        for op, fold, ended, overwritten in forward.prepared.whole_ops:
            if fold is not None:
                env.update(zip((ref.value for ref in FOLDED), fold(env), strict=True))
                folded += [env[v] for v in fold.inputs]
            with op_autocast(op, forward.device):
                results = call(op, env, [v for v in op.mutated if v not in overwritten])
            env.update(zip(op.outputs, results, strict=False))
            for value in ended:
                env.pop(value, None)
    enter = _before_backward(found, memory_of_parameters(t for t in folded if isinstance(t, nn.Parameter)))
    for value in forward.prepared.handed_out:
        if env[value].grad_fn is not None and forward.passed.get(value) is None:  # not a tensor of the caller
            env[value].register_hook(enter)


def _before_backward(found: Arena | None, memory: Memory) -> Callable[[Tensor], None]:
    """A hook of outputs: checks the folded parameters, and makes the backward allocate from the arena."""

    def leave() -> None:
        if found is not None and _thread.__dict__.pop("inside", False):
            found.leave()

    def enter(_grad: Tensor) -> None:
        refuse_moved(memory)
        if found is None or after_backward is None:
            return
        if not _thread.__dict__.get("inside", False):  # else an earlier backward has failed
            found.enter()
            _thread.inside = True
        after_backward(leave)

    return unserializable_hook(enter)  # an output can be saved without a warning
