"""Captures a whole step as CUDA graphs: all stages, the computations between them, and the backward.

Captures of stages or tiles (`cuda_graphs/`) leave folded norms and heads to the host. They also copy every stored map
to and from fixed addresses, and with norms in training mode every norm is a stage. If a step has few tiles and memory
is ample, the whole step is captured instead. Its maps are at fixed addresses because the graph allocates them.

    copy in    the image; in the backward the gradients of the results
    replay     the steps in their order, and the updates of running statistics
    copy out   the results; in the backward the gradients of the parameters

Parameters and buffers are read and written in place. The first step runs op by op, the second is captured. The same
happens again after a tensor has moved. While a forward waits for its backward, other forwards run op by op.
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
from ..torch_private import keeps_graph, saved_tensors_hooks
from .image_batch import as_uploaded
from .stage_function import OwnNode, is_watched, unreached


class CapturedForward(Protocol):
    """The interface of a forward (`forward.py`) that a captured step uses."""

    env: dict[int, Tensor]
    passed: dict[int, Any]
    image: Tensor | None
    pixels: Pixels
    device: torch.device
    dtype: torch.dtype
    prepared: Any

    @property
    def targets(self) -> Mapping[int, Tensor]: ...

    @property
    def observers(self) -> Mapping[int, Any]: ...

    def output(self) -> Any: ...


# (image, state, tensors to write) -> results by value number, computed op by op.
Compute = Callable[[Tensor, Mapping[int, Tensor], Mapping[int, Tensor]], dict[int, Tensor]]


class WholeStep:
    """The captured step of a network on images of one size, for the latest settings.

    Args:
        executor: captures the work.
        retained: whether all tiles retain their graphs, so that none is recomputed.

    Attributes:
        failed: whether the capture failed; later steps then run without it.
    """

    def __init__(self, executor: Executor, retained: bool):
        self.executor, self.retained, self.failed = executor, retained, False
        self._key: Hashable = None
        self._work: _Captured | None = None

    def serves(self, forward: CapturedForward) -> bool:
        """Whether a forward can be replayed: nothing observes its steps, and its tensors remain at their addresses."""
        state = _state(forward)
        image_grad = forward.image is not None and forward.image.requires_grad
        moves = image_grad or any(t.is_inference() or t.requires_grad for t in forward.targets.values())
        moves = moves or not all(t.is_leaf for t in state.values())
        # If a loss does not reach a parameter, autograd would call its hooks with None.
        hooked = any(is_watched(t) for v, t in state.items() if v not in forward.prepared.always_reached)
        # A checkpoint compares the tensors saved in both forwards; anomaly mode checks every gradient.
        saved = saved_tensors_hooks()
        looks = saved is not None or torch.is_anomaly_enabled() or forward.observers
        return not (moves or hooked or looks)

    def result(self, forward: CapturedForward, compute: Compute) -> tuple[Any] | None:
        """The outputs of the network, in a tuple; None if the step cannot be replayed."""
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

    def see(self, forward: CapturedForward) -> None:
        """Check after an op-by-op step whether results share memory with state or each other; copies would not."""
        if self._work is None and not self.failed:
            program = forward.prepared.staged.program
            state = [forward.targets.get(v, forward.env.get(v)) for v in program.state()]
            results = [forward.env[v] for v in dict.fromkeys(program.handed_out()) if v in forward.env]
            lasting = {t.untyped_storage().data_ptr() for t in state if t is not None and t.numel()}
            self.failed = any(t.untyped_storage().data_ptr() in lasting for t in results) or _overlap(results)


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two tensors share an element; disjoint parts of one storage do not."""
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


def _key(forward: CapturedForward, state: Mapping[int, Tensor]) -> Hashable:
    """The key of a captured step: settings, and the addresses of its tensors."""
    places = tuple((v, t.data_ptr(), t.requires_grad) for v, t in state.items())
    return places, torch.is_grad_enabled(), forward.dtype, Autocast.current(forward.device), switches()


def _state(forward: CapturedForward) -> dict[int, Tensor]:
    """Parameters, buffers and constants by value number, without the copies made for written tensors."""
    made = forward.prepared.folded
    return {v: forward.targets.get(v, t) for v, t in forward.env.items() if v not in made}


class Waiting:
    """A replayed forward.

    Attributes:
        over: whether no further backward will run.
    """

    over = False


class _Pair:
    """A captured forward and its captured backward, which share the saved tensors.

    Attributes:
        first: replays the forward.
        second: replays the backward.
        form: indices of the results with gradients; None until the backward is captured.
        fresh: whether the latest replay of the forward directly followed its capture.
        results: results of the forward by value number.
        grads: gradients of the leaves by value number.
    """

    def __init__(self) -> None:
        self.first: Callable[[], None] | None = None
        self.second: Callable[[], None] | None = None
        self.form: tuple[int, ...] | None = None
        self.fresh = True
        self.results: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}


class _Captured:
    """A captured step on fixed addresses, with a pair for each form of backward."""

    def __init__(self, forward: CapturedForward, state: Mapping[int, Tensor], compute: Compute, executor: Executor):
        self.compute, self.executor, self.failed = compute, executor, False
        self.program, self.buffers = forward.prepared.staged.program, GraphBuffers()
        self.autocast = Autocast.current(forward.device)
        # Aliases of the parameters, with respect to which gradients are computed.
        self.state = {v: t.detach().requires_grad_(t.requires_grad) for v, t in state.items()}
        self.leaves = [v for v, t in state.items() if t.requires_grad and torch.is_grad_enabled()]
        self.targets = {v: t.detach() for v, t in forward.targets.items()}
        self.read = [v for v in state if v not in {*self.leaves, *self.targets}]
        # Written tensors as the latest forward read them; statistics that norms only write are not needed.
        read = forward.prepared.kept_for_backward
        updates = [(v, after) for v, after in self.program.updates if v in self.targets]
        self.before = {v: torch.empty_like(self.targets[v]) for v, after in updates if v in read or after in read}
        self.pairs: list[_Pair] = []  # the last used is the last, and serves the next forward
        self.latest: weakref.ref[Waiting] | None = None

    # -- forward --------------------------------------------------------------------------------------------------

    def result(self, forward: CapturedForward, state: Mapping[int, Tensor]) -> tuple[Any] | None:
        """The outputs of a forward in a tuple; None if an earlier forward waits for its backward."""
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
            torch.autograd.graph.increment_version(target)  # PyTorch does not see the graph's writes
        forward.env.update(zip(self.pairs[-1].results, made, strict=True))  # pyright: ignore[reportArgumentType]
        forward.passed.update((v, forward.targets[b]) for b, v in self.program.updates if b in forward.targets)
        return (forward.output(),)

    def _load(self, forward: CapturedForward) -> None:
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
        """Capture a forward for a new form of backward; only the latest other pair remains, to save memory."""
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
        """Gradients of the leaves; None for leaves that the results do not depend on.

        Args:
            grads: gradients of the results, None for zero.
            again: whether the forward had a backward before, which consumed its saved tensors.
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
        """The pair with a backward of this form, which is captured if necessary; it becomes the last pair."""
        # Autograd would reject a captured forward whose weights have changed since.
        self.pairs = [pair for pair in self.pairs if pair.form is not None or pair.fresh]
        pair = next((pair for pair in self.pairs if pair.form in (form, None)), None) or self._new_pair()
        if pair is not None and pair.form is None:
            pair.second, pair.form = self._capture(partial(self._run_backward, pair, form)), form
        if pair is None or pair.second is None:
            raise RuntimeError("cannot capture the backward of a captured step; call the network again")
        self.pairs = [*(one for one in self.pairs if one is not pair), pair]
        return pair

    def _replay_unnoticed(self, pair: _Pair) -> None:
        """Replay the latest forward with its original buffers, then restore the current values of the buffers."""
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
    """A captured step as an autograd function of the parameters.

    `read` are the other tensors that it reads and does not write.
    """

    @staticmethod
    def forward(ctx: Any, work: _Captured, read: Sequence[Tensor], *parameters: Tensor):
        ctx.work, ctx.turn, ctx.waiting, ctx.used = work, locks.current(), Waiting(), False
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *read)  # the backward raises if one has changed
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
            if grad is None and is_watched(parameter):  # a hook registered since the forward
                raise unreached(f"parameter '{ctx.work.program.values[value].name}' has a hook")
        return None, None, *found
