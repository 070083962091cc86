"""Whether a network's step agrees with stock PyTorch's, or differs by what stock's own rounding explains.

The engine always runs as users run it; what is varied is stock. In this order, as far as needed:

1.  Every tensor agrees to the limit. Gradients of which both sides are within the limit of the largest gradient are
    zero (those of a bias in front of a norm).
2.  Networks that cast to float32 themselves round there: both get float64 in place of float32.
3.  PyTorch's BatchNorm on the CPU misreads gradients in some orders in memory (`engine/capture/corrected.py`): stock
    gets plain ones. Taken only if that moves stock's own result a thousand times more than the limit.
4.  PyTorch's live BatchNorm rounds more than its definition: stock has it written out. Buffers are those of 1 or 3.
5.  Stock's noise: what each of its tensors moves by when the result of every one of its operations, forward and
    backward, is changed in the last bit at random (Monte Carlo arithmetic: Parker, 1997), or its maps have another
    order in memory (other sums), or its live BatchNorm is written out (as in 4). A tensor may differ by four times its
    own noise: both sides round, and in a sum more is rounded than its result, which alone is changed. But nothing
    beyond 1e-9 is called rounding: where stock's own noise is beyond that, what differs by as much is unclear.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from exactness import Step, step, step_errors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWS = 4
_TIMES = 4  # of its noise
ROUNDING = 1e-9  # more than this is an error, whatever stock's noise
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def judge(
    model: nn.Module, image: Tensor, fast: Callable[[nn.Module], nn.Module], casts: bool, limit: float
) -> dict[str, Any]:
    """Whether all is well ("good") or "unclear", the worst "error" and its tensor, "notes", and the "float32" errors.

    Also the "largest" error of any tensor, which need not be the worst, and the largest "noise", 0 where it was not
    needed.

    Args:
        model: float64, in the mode to be compared; it is copied.
        image: float64.
        fast: makes the network that is judged of a copy.
        casts: whether the network casts to float32 itself.
        limit: of relative errors.
    """
    notes: list[str] = []
    in_stock: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    with contextlib.ExitStack() as both:

        def ours() -> Step:
            return _run(fast(copy.deepcopy(model)), image)

        def stock(*variants: contextlib.AbstractContextManager[Any]) -> Step:
            with contextlib.ExitStack() as stack:
                for variant in variants:
                    stack.enter_context(variant)
                return _run(copy.deepcopy(model), image)

        got, truth = ours(), stock()
        errors = _errors(truth, got, limit)
        if casts and _worst(errors) > limit:
            notes.append("casts to float32 itself, for this comparison to float64")
            both.enter_context(double_casts())
            got, truth = ours(), stock()
            errors = _errors(truth, got, limit)
        if _worst(errors) > limit:
            plain = stock(plain_order())
            if _worst(step_errors(truth, plain)) > 1000 * limit:
                notes.append("stock's gradient is wrong unless its BatchNorm is given contiguous tensors, as here")
                in_stock, truth = plain_order, plain
                errors = _errors(truth, got, limit)
        if _worst(errors) > limit and all(e <= limit for name, e in errors.items() if name.endswith(_STATISTICS)):
            written = dataclasses.replace(stock(in_stock(), written_out()), buffers=truth.buffers)
            others = _errors(written, got, limit)
            if _worst(others) <= limit:
                moved = _worst(errors)
                notes.append(
                    f"stock's BatchNorm rounds more than its definition, written out here (it differs by {moved:.1e})"
                )
                truth, errors = written, others
        good = _worst(errors) <= limit
        worst, rounding, unclear = max(errors, key=lambda name: errors[name]), 0.0, False
        if not good:
            noise = _noise(model, image, truth)
            times = {name: error / max(noise[name], 1e-300) for name, error in errors.items() if error > limit}
            worst = max(times, key=lambda name: times[name])
            rounding = max(noise.values())
            good = times[worst] <= _TIMES and _worst(errors) <= ROUNDING
            unclear = times[worst] <= _TIMES and not good
            if unclear:
                worst = max(errors, key=lambda name: errors[name])
            notes.append(f"{times[worst]:.1f} times stock's own noise, which is {noise[worst]:.1e}")
    single = _float32(model, image, fast, truth, in_stock)
    found = {"good": good, "unclear": unclear, "error": errors[worst], "worst": worst, "float32": single}
    found |= {"noise": rounding, "largest": _worst(errors)}
    return found | ({"notes": "; ".join(notes)} if notes else {})


def _run(network: nn.Module, x: Tensor) -> Step:
    torch.manual_seed(1)
    return step(network, x)


def _errors(truth: Step, got: Step, limit: float) -> dict[str, float]:
    """The errors of a step, but for gradients that are zero."""
    errors = step_errors(truth, got)
    sizes = {name: 0.0 if grad is None else grad.abs().amax().item() for name, grad in truth.gradients.items()}
    least = limit * max(sizes.values(), default=0.0)
    for name, size in sizes.items():
        grad = got.gradients[name]
        if grad is not None and size <= least and grad.abs().amax().item() <= least:
            errors[name] = 0.0
    return errors


def _worst(errors: dict[str, float]) -> float:
    return max(errors.values())


def _float32(
    model: nn.Module,
    image: Tensor,
    fast: Callable[[nn.Module], nn.Module],
    truth: Step,
    in_stock: Callable[[], contextlib.AbstractContextManager[Any]],
) -> dict[str, float]:
    """The errors of all outputs, and of all gradients, in float32, as multiples of stock PyTorch's own.

    Stock's is the largest of a few roundings: a value that rounding moves over the kink of a ReLU makes a gradient
    jump, and which value that is differs from rounding to rounding.
    """

    def distances(run: Step) -> list[float]:
        gradients = [*((grad, truth.gradients[name]) for name, grad in run.gradients.items()), (run.image, truth.image)]
        groups = zip(run.outputs, truth.outputs, strict=True), gradients
        return [
            sum((a.double() - b).square().sum().item() for a, b in group if a is not None and b is not None) ** 0.5
            for group in groups
        ]

    stock = [0.0, 0.0]
    for rounding in (contextlib.nullcontext(), *map(LastBits, range(_DRAWS))):
        with in_stock(), rounding:
            run = _run(copy.deepcopy(model).float(), image.float())
        stock = [max(pair) for pair in zip(stock, distances(run), strict=True)]
    tiled = distances(_run(fast(copy.deepcopy(model).float()), image.float()))
    ratios = (other / own if own else float(other > 0) for own, other in zip(stock, tiled, strict=True))
    return dict(zip(("outputs", "gradients"), ratios, strict=True))


def _noise(model: nn.Module, image: Tensor, truth: Step) -> dict[str, float]:
    """By tensor, how far stock's result moves where only rounding differs, and not what its BatchNorm misreads."""
    noise: dict[str, float] = {}

    def add(run: Step) -> None:
        for name, error in step_errors(truth, dataclasses.replace(run, structure=truth.structure)).items():
            noise[name] = max(error, noise.get(name, 0.0))

    for draw in range(_DRAWS):
        with plain_order(), LastBits(draw):
            run = _run(copy.deepcopy(model), image)
        add(run)
    other_order = copy.deepcopy(model)
    for parameter in other_order.parameters():
        if parameter.dim() == 4:  # not the kernels of 3d convolutions, which have an order of their own
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    with plain_order():
        run = _run(other_order, image.contiguous(memory_format=torch.channels_last))
    add(run)
    with written_out():
        run = _run(copy.deepcopy(model), image)
    add(dataclasses.replace(run, buffers=truth.buffers))
    return noise


class LastBits(TorchDispatchMode):
    """Changes each result of an operation in its last bit, up, down or not at all, also in the backward."""

    sees_tiles = True

    def __init__(self, seed: int):
        super().__init__()
        self.dice = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views, and tensors that were written to, are others' results.
        new = [not r.alias_info for r in func._schema.returns]
        results = result if isinstance(result, (tuple, list)) else (result,)
        for fresh, one in zip(new * (len(results) if len(new) == 1 else 1), results, strict=False):
            if fresh and isinstance(one, Tensor) and one.is_floating_point():
                signs = torch.randint(-1, 2, one.shape, generator=self.dice, dtype=torch.int8)
                one.mul_(signs.to(one.dtype).mul_(torch.finfo(one.dtype).eps).add_(1))
        return result


@contextlib.contextmanager
def _patched(owner: Any, name: str, make: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def written_out() -> contextlib.AbstractContextManager[None]:
    """Live BatchNorm by its definition, without running statistics."""

    def make(original: Any) -> Any:
        def batch_norm(
            x: Any,
            mean: Any,
            var: Any,
            weight: Any = None,
            bias: Any = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Any:
            if not training:
                return original(x, mean, var, weight, bias, training, momentum, eps)
            dims = [d for d in range(x.dim()) if d != 1]
            centred = x - x.mean(dims, keepdim=True)
            y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
            shape = [-1 if d == 1 else 1 for d in range(x.dim())]
            y = y if weight is None else y * weight.reshape(shape)
            return y if bias is None else y + bias.reshape(shape)

        return batch_norm

    return _patched(F, "batch_norm", make)


def double_casts() -> contextlib.AbstractContextManager[None]:
    """A network that casts to float32 casts to float64."""
    return _patched(torch.Tensor, "float", lambda _original: torch.Tensor.double)


def plain_order() -> contextlib.AbstractContextManager[None]:
    """BatchNorm gets maps and gradients in the plain order."""

    def make(original: Any) -> Any:
        def batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = original(x.contiguous(), *args, **kwargs)
            if result.requires_grad:
                result.register_hook(lambda grad: grad.contiguous())
            return result

        return batch_norm

    return _patched(F, "batch_norm", make)
