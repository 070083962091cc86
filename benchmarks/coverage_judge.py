"""Judges whether a network's step agrees with stock PyTorch's, or differs only by rounding that stock has as well.

The engine runs as for users; stock is varied. These steps are applied in order, as far as needed:

1.  Every tensor agrees to the limit. Gradients that are within the limit of the largest gradient on both sides count as
    zero (those of a bias before a norm).
2.  Networks that cast to float32 round there: on both sides they get float64 instead of float32.
3.  PyTorch's BatchNorm on the CPU misreads gradients in some memory orders (`engine/capture/gradient_fixes.py`): stock
    gets contiguous ones, but only if that changes stock's own result by more than a thousand times the limit.
4.  PyTorch's live BatchNorm rounds more than its definition: stock has it written out. Buffers are those of 1 or 3.
5.  Stock's noise: the change of each of its tensors when the result of every operation, forward and backward, is
    changed randomly in the last bit (Monte Carlo arithmetic: Parker, 1997), when its maps have another memory order
    (other sums), or when its live BatchNorm is written out (as in 4). A tensor may differ by four times its own noise:
    both sides round, and a sum rounds more often than in its result, which alone is changed. A difference above 1e-9
    never counts as rounding: if stock's own noise is above that, such a difference is unclear.
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
_TIMES = 4  # allowed multiple of the noise
ROUNDING = 1e-9  # larger differences are errors, whatever stock's noise
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def judge(
    model: nn.Module,
    image: Tensor,
    fast: Callable[[nn.Module], nn.Module],
    casts: bool,
    limit: float,
    single: bool = True,
) -> dict[str, Any]:
    """Return "good" or "unclear", the worst "error" and its tensor, "notes", and the "float32" errors if wanted.

    The result also has the "largest" error of any tensor, which need not be the worst, and the largest "noise", or 0 if
    it was not needed.

    Args:
        model: float64, in the mode to compare; it is copied.
        image: float64.
        fast: makes the network under test from a copy.
        casts: whether the network itself casts to float32.
        limit: limit on relative errors.
        single: whether float32 is compared too.
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
    found: dict[str, Any] = {"good": good, "unclear": unclear, "error": errors[worst], "worst": worst}
    if single:
        found["float32"] = _float32(model, image, fast, truth, in_stock)
    found |= {"noise": rounding, "largest": _worst(errors)}
    return found | ({"notes": "; ".join(notes)} if notes else {})


def _run(network: nn.Module, x: Tensor) -> Step:
    torch.manual_seed(1)
    return step(network, x)


def _errors(truth: Step, got: Step, limit: float) -> dict[str, float]:
    """Return the errors of a step; those of zero gradients are 0."""
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
    """Return the errors of all outputs, and of all gradients, in float32, as multiples of stock PyTorch's own.

    Stock's is the largest of a few roundings: if rounding moves a value over the kink of a ReLU, a gradient jumps, and
    different roundings move different values.
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
    """Return by tensor how far stock's result moves if only rounding differs, with contiguous input of BatchNorm."""
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
        if parameter.dim() == 4:  # not for 3d kernels, which have another memory format
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    with plain_order():
        run = _run(other_order, image.contiguous(memory_format=torch.channels_last))
    add(run)
    with written_out():
        run = _run(copy.deepcopy(model), image)
    add(dataclasses.replace(run, buffers=truth.buffers))
    return noise


class LastBits(TorchDispatchMode):
    """Change each result of an operation randomly in its last bit, also in the backward."""

    sees_tiles = True

    def __init__(self, seed: int):
        super().__init__()
        self.dice = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views, and tensors that were written to, are results of other operations.
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
    """Replace live BatchNorm by its definition, without running statistics."""

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
    """Make a network that casts to float32 cast to float64."""
    return _patched(torch.Tensor, "float", lambda _original: torch.Tensor.double)


def plain_order() -> contextlib.AbstractContextManager[None]:
    """Give BatchNorm contiguous maps and gradients."""

    def make(original: Any) -> Any:
        def batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = original(x.contiguous(), *args, **kwargs)
            if result.requires_grad:
                result.register_hook(lambda grad: grad.contiguous())
            return result

        return batch_norm

    return _patched(F, "batch_norm", make)
