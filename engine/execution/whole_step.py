"""A whole step captured: all stages and what is computed between them, and the backward of all.

What is captured stage by stage or tile by tile (cuda_graphs/) leaves folded norms and heads to the host, and copies
every stored map to and from fixed addresses: where norms take the statistics of the image, there is a stage for each of
them. Where tiles are few and memory is ample, the step is captured as it stands instead: its maps lie at fixed
addresses because the graph has made them.

    copy in    the image; in the backward the gradients of the results
    replay     the steps in their order, and the updates of running statistics
    copy out   the results; in the backward the gradients of the parameters

Parameters and buffers are read, and buffers written, where they lie. The first step runs op by op, the second is
captured; so it is again after one of them has moved. While a forward waits for its backward another runs op by op.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cuda_graphs.buffers import Executor, GraphBuffers, captured_if_it_fits
from ..cuda_graphs.recording import switches
from ..images.batches import StoredBatch
from ..module import locks
from ..module.first_order import first_order, note_memory
from ..tiling.halos import copy_all
from ..tiling.scan import Autocast, Pixels
from .image_batch import as_uploaded
from .stage_function import OwnNode, is_watched, keeps_graph, unreached


class Step(Protocol):
    """What is asked of a forward (forward.py)."""

    env: dict[int, Tensor]
    passed: dict[int, Any]
    image: Tensor | None
    pixels: Pixels
    device: torch.device
    dtype: torch.dtype
    on_tile: Any
    prepared: Any

    @property
    def targets(self) -> Mapping[int, Tensor]: ...

    @property
    def observers(self) -> Mapping[int, Any]: ...

    def output(self) -> Any: ...


# (image, state, tensors that are written to) -> results by value number, computed op by op.
Compute = Callable[[Tensor, Mapping[int, Tensor], Mapping[int, Tensor]], dict[int, Tensor]]


class WholeStep:
    """The step of a network on images of one size, captured as it was last asked for.

    Args:
        retained: memory is there for the graphs of all tiles, none of which is computed again then.

    Attributes:
        failed: it could not be: steps go another way from now on.
    """

    def __init__(self, executor: Executor, retained: bool):
        self.executor, self.retained, self.failed = executor, retained, False
        self._key: Hashable = None
        self._work: _Captured | None = None

    def serves(self, forward: Step) -> bool:
        """Whether nobody looks on, and all that is read or written has a place of its own from step to step."""
        state = _state(forward)
        image_grad = forward.image is not None and forward.image.requires_grad
        moves = image_grad or any(t.is_inference() or t.requires_grad for t in forward.targets.values())
        moves = moves or not all(t.is_leaf for t in state.values())
        # A loss that leaves a parameter out would have autograd call its hooks with None.
        hooked = any(is_watched(t) for v, t in state.items() if v not in forward.prepared.always_reached)
        # A checkpoint compares what is saved the first time and the second; anomaly mode looks at every gradient.
        saved = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
        looks = saved is not None or torch.is_anomaly_enabled() or forward.observers or forward.on_tile
        return not (moves or hooked or looks)

    def result(self, forward: Step, compute: Compute) -> tuple[Any] | None:
        """What the network returns, in a tuple; None where it has to be computed in another way."""
        if self._work is not None and self._work.failed:
            self.failed, self._work = True, None
            return None
        state = _state(forward)
        key = _key(forward, state)
        if key != self._key:
            self._key, self._work = key, None
            return None
        if self._work is None:
            self._work = _Captured(forward, state, compute, self.executor.apart())
        return self._work.result(forward, state)

    def see(self, forward: Step) -> None:
        """Learn from a step op by op whether results share memory, with state or one another: copies would not."""
        if self._work is None and not self.failed:
            program = forward.prepared.staged.program
            state = [forward.targets.get(v, forward.env.get(v)) for v in program.state()]
            results = [forward.env[v] for v in dict.fromkeys(program.handed_out()) if v in forward.env]
            lasting = {t.untyped_storage().data_ptr() for t in state if t is not None and t.numel()}
            self.failed = any(t.untyped_storage().data_ptr() in lasting for t in results) or _overlap(results)


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two tensors have an element in common; parts of one that lie side by side have none."""
    together: dict[tuple[int, int], list[Tensor]] = {}
    for tensor in tensors:
        place = tensor.untyped_storage().data_ptr(), tensor.element_size()
        together.setdefault(place, []).append(tensor)
    for (_, size), parts in together.items():
        if len(parts) > 1:
            taken = torch.zeros(parts[0].untyped_storage().nbytes() // size, dtype=torch.bool)
            for t in parts:
                shape = [n if stride else min(n, 1) for n, stride in zip(t.shape, t.stride(), strict=True)]
                own = taken.as_strided(shape, t.stride(), t.storage_offset())
                if own.any():
                    return True
                own.fill_(True)
    return False


def _key(forward: Step, state: Mapping[int, Tensor]) -> Hashable:
    """What a captured step holds for: settings, and where its tensors lie."""
    places = tuple((v, t.data_ptr(), t.requires_grad) for v, t in state.items())
    return places, torch.is_grad_enabled(), forward.dtype, Autocast.current(forward.device), switches()


def _state(forward: Step) -> dict[int, Tensor]:
    """Parameters, buffers and constants themselves, not copies of what will be written to."""
    made = forward.prepared.folded
    return {v: forward.targets.get(v, t) for v, t in forward.env.items() if v not in made}


class Waiting:
    """A forward that was replayed.

    Attributes:
        over: there will be no backward any more.
    """

    over = False


class _Pair:
    """A forward, and the backward that goes on where it ends: they share what the forward leaves in memory.

    Attributes:
        form: of which results there are gradients; None while there is no backward yet.
        fresh: the forward was captured for the one that it was last replayed for.
    """

    def __init__(self) -> None:
        self.first: Callable[[], None] | None = None
        self.second: Callable[[], None] | None = None
        self.form: tuple[int, ...] | None = None
        self.fresh = True
        self.results: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}


class _Captured:
    """A step on fixed addresses: a pair for each form of backward that was asked for."""

    def __init__(self, forward: Step, state: Mapping[int, Tensor], compute: Compute, executor: Executor):
        self.compute, self.executor, self.failed = compute, executor, False
        self.program, self.buffers = forward.prepared.staged.program, GraphBuffers()
        self.autocast = Autocast.current(forward.device)
        # Aliases of the parameters: gradients are taken with respect to these, and given to those.
        self.state = {v: t.detach().requires_grad_(t.requires_grad) for v, t in state.items()}
        self.leaves = [v for v, t in state.items() if t.requires_grad and torch.is_grad_enabled()]
        self.targets = {v: t.detach() for v, t in forward.targets.items()}
        self.read = [v for v in state if v not in {*self.leaves, *self.targets}]
        # What the latest forward has read and written to; of the statistics that norms only write nothing depends.
        read = forward.prepared.kept_for_backward
        updates = [(v, after) for v, after in self.program.updates if v in self.targets]
        self.before = {v: torch.empty_like(self.targets[v]) for v, after in updates if v in read or after in read}
        self.pairs: list[_Pair] = []  # the one that was used last is the last, and serves the next forward
        self.latest: weakref.ref[Waiting] | None = None

    # -- forward --------------------------------------------------------------------------------------------------

    def result(self, forward: Step, state: Mapping[int, Tensor]) -> tuple[Any] | None:
        """The output of a forward, if no earlier one waits for its backward."""
        latest = None if self.latest is None else self.latest()
        if latest is not None and not latest.over:
            return None
        self._load(forward)
        if self.pairs:
            self.pairs[-1].fresh = False
        elif self._new_pair() is None:
            return None
        if self.leaves:
            made = CapturedStep.apply(self, [state[v] for v in self.read], *(state[v] for v in self.leaves))
            if len(made) > 1:
                made = tuple(OwnNode.apply(t) if t.requires_grad else t for t in made)
        else:
            made = self.replay()
        for target in forward.targets.values():
            torch.autograd.graph.increment_version(target)  # a graph writes where PyTorch does not see it
        forward.env.update(zip(self.pairs[-1].results, made, strict=True))  # pyright: ignore[reportArgumentType]
        forward.passed.update((v, forward.targets[b]) for b, v in self.program.updates if b in forward.targets)
        return (forward.output(),)

    def _load(self, forward: Step) -> None:
        _, _, height, width = forward.pixels.shape
        source = as_uploaded(forward.pixels, forward.device)
        pixels = source.read(0, height, 0, width).to(forward.device, non_blocking=True)
        image = source.develop(pixels) if isinstance(source, StoredBatch) else pixels
        self.buffers.load({("image",): image.detach().to(forward.dtype)})

    def replay(self) -> tuple[Tensor, ...]:
        pair = self.pairs[-1]
        assert pair.first is not None
        copy_all((t, self.targets[v]) for v, t in self.before.items())
        pair.first()
        return tuple(t.detach().clone() for t in pair.results.values())

    def _new_pair(self) -> _Pair | None:
        """A forward whose backward is still to come; of others the latest is kept, for each holds a step's memory."""
        del self.pairs[:-1]
        pair = _Pair()
        pair.first = self._capture(partial(self._run_forward, pair))
        if pair.first is None:
            return None
        self.pairs.append(pair)
        return pair

    def _run_forward(self, pair: _Pair) -> None:
        with torch.set_grad_enabled(bool(self.leaves)), self.autocast.enter():
            pair.results = self.compute(self.buffers.inputs["image",], self.state, self.targets)

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(self, grads: Sequence[Tensor | None], again: bool) -> list[Tensor | None]:
        """Gradients of the leaves, None where none leads there.

        Args:
            grads: of the results, None for zero.
            again: this is not the first backward of the forward: what that has left was used up.
        """
        form = tuple(n for n, grad in enumerate(grads) if grad is not None)
        if not form:
            return [None for _ in self.leaves]
        self.buffers.load({("grad", n): grads[n] for n in form})  # pyright: ignore[reportArgumentType]
        replayed = next(reversed(self.pairs), None)
        pair = self._pair(form)
        if again or pair is not replayed:
            self._replay_unnoticed(pair)
        assert pair.second is not None
        pair.second()
        found = {v: torch.empty_like(t) for v, t in pair.grads.items()}
        copy_all((found[v], t) for v, t in pair.grads.items())
        return [found.get(v) for v in self.leaves]

    def _pair(self, form: tuple[int, ...]) -> _Pair:
        """The pair with a backward of this form, which is made if there is none; from now on it is the last."""
        # Autograd would not take a captured forward whose weights have changed since.
        self.pairs = [pair for pair in self.pairs if pair.form is not None or pair.fresh]
        pair = next((pair for pair in self.pairs if pair.form in (form, None)), None) or self._new_pair()
        if pair is not None and pair.form is None:
            pair.second, pair.form = self._capture(partial(self._run_backward, pair, form)), form
        if pair is None or pair.second is None:
            raise RuntimeError("the backward of a captured step could not be captured; call the network again")
        self.pairs = [*(one for one in self.pairs if one is not pair), pair]
        return pair

    def _replay_unnoticed(self, pair: _Pair) -> None:
        """The latest forward once more, on the buffers as it found them; they stay as they are now."""
        assert pair.first is not None
        now = {v: t.clone() for v, t in self.targets.items()}
        copy_all((self.targets[v], t) for v, t in self.before.items())
        pair.first()
        copy_all((self.targets[v], t) for v, t in now.items())

    def _run_backward(self, pair: _Pair, form: tuple[int, ...]) -> None:
        results = list(pair.results.values())
        leaves = [self.state[v] for v in self.leaves]
        given = [self.buffers.inputs["grad", n] for n in form]
        grads = torch.autograd.grad([results[n] for n in form], leaves, given, allow_unused=True)
        pair.grads = {v: grad for v, grad in zip(self.leaves, grads, strict=True) if grad is not None}

    def _capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        work = captured_if_it_fits(self.executor, run)
        self.failed = self.failed or work is None
        return work


class CapturedStep(torch.autograd.Function):
    """parameters -> results of a captured step.

    `read` are the tensors that it reads besides, and does not write to.
    """

    @staticmethod
    def forward(ctx: Any, work: _Captured, read: Sequence[Tensor], *parameters: Tensor):
        ctx.work, ctx.turn, ctx.waiting, ctx.used = work, locks.current(), Waiting(), False
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *read)  # in the backward it is told if one of them has changed
        note_memory(ctx, (*parameters, *read))
        made = work.replay()
        work.latest = weakref.ref(ctx.waiting)
        ctx.mark_non_differentiable(
            *(t for t, of in zip(made, work.pairs[-1].results.values(), strict=True) if not of.requires_grad)
        )
        return made

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None):
        parameters = ctx.saved_tensors  # raises if one of them was changed in place since the forward
        found = ctx.work.backward(grads, ctx.used)
        ctx.used, ctx.waiting.over = True, not keeps_graph()
        for value, parameter, grad in zip(ctx.work.leaves, parameters, found, strict=False):
            if grad is None and is_watched(parameter):  # since the forward
                raise unreached(f"parameter '{ctx.work.program.values[value].name}' has a hook")
        return None, None, *found
