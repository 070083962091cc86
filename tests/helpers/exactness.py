"""Accelerated against stock, in float64: outputs, the gradient of every parameter and of the image, all buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gigamorph import Accelerated, accelerate
from gigamorph.engine.execution.programs import Programs

LIMIT = 1e-12
FLOOR = 1e-3  # of the largest tensor in a group: below it, a tensor's error is measured against that floor


@dataclass(frozen=True)
class Step:
    """What one training step leaves: outputs, gradients by parameter name and of the image, buffers by name."""

    outputs: list[Tensor]
    structure: Any
    gradients: dict[str, Tensor | None]
    image: Tensor | None
    buffers: dict[str, Tensor | None] = field(default_factory=dict)


def buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the buffers by name: running statistics and counters."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and scales for every norm, and layer scales near one, so that every branch counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), Tensor):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):  # layer scales begin so small that their blocks would not count
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def step(model: nn.Module, image: Any, seed: int = 0, image_gradient: bool = True) -> Step:
    """One forward and backward with random weights on all outputs; gradients are cleared before and after."""
    model.zero_grad(set_to_none=True)
    leaf = image.detach().clone().requires_grad_(image_gradient) if isinstance(image, Tensor) else image
    result = model(leaf)
    outputs, structure = tree_flatten(result)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        loss = loss.to(output.device) + (output.double() * weight).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    image_grad = leaf.grad if isinstance(leaf, Tensor) else None
    return Step([o.detach() for o in outputs], structure, gradients, image_grad, buffers(model))


def distance(truth: Step, got: Step) -> tuple[float, float]:
    """Relative error of the outputs, and of all gradients taken as one vector."""

    def flat(tensors: list[Tensor | None]) -> Tensor:
        return torch.cat([t.double().flatten() for t in tensors if t is not None])

    outputs, want = flat([*got.outputs]), flat([*truth.outputs])
    gradients = flat([*got.gradients.values(), got.image])
    expected = flat([*truth.gradients.values(), truth.image])
    return (
        ((outputs - want).norm() / want.norm()).item(),
        ((gradients - expected).norm() / expected.norm()).item(),
    )


def errors(expected: dict[str, Tensor | None], got: dict[str, Tensor | None]) -> dict[str, float]:
    """Relative error of every tensor of a group; one that is missing is missing in both."""
    assert expected.keys() == got.keys()
    largest = max((t.double().norm().item() for t in expected.values() if t is not None), default=0.0)
    result = {}
    for name, want in expected.items():
        have = got[name]
        assert (want is None) == (have is None), f"{name}: {have} instead of {want}"
        if want is None or have is None:
            want = have = torch.zeros(())
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)} instead of {tuple(want.shape)}"
        assert have.dtype == want.dtype, f"{name}: {have.dtype} instead of {want.dtype}"
        assert torch.equal(have.isnan(), want.isnan()), f"{name}: other elements are NaN"
        have, want = have.double().nan_to_num(), want.double().nan_to_num()
        scale = max(want.norm().item(), FLOOR * largest)
        distance = (have - want).norm().item()
        result[name] = distance if scale == 0 else distance / scale
    return result


def assert_near_under_autocast(model: nn.Module, image: Tensor, *, tile: int, floor: float | None = None) -> None:
    """Gradients under bfloat16 autocast, all together, err at most 1.25 times as much as stock's.

    Args:
        model, image: in float64.
        floor: gradients no larger than this share of the largest do not count.
    """
    exact = step(model, image).gradients
    sizes = {name: 0.0 if grad is None else grad.norm().item() for name, grad in exact.items()}
    counted = [name for name, size in sizes.items() if floor is None or size > floor * max(sizes.values())]
    model, image = model.float(), image.float()
    distances = []
    for net in (model, accelerate(model, tile=tile)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = step(net, image).gradients
        distances.append(errors(exact, {name: None if g is None else g.double() for name, g in found.items()}))
    stock, ours = (sum(found[name] ** 2 for name in counted) ** 0.5 for found in distances)
    assert ours < 1.25 * stock, (ours, stock)


def named(tensors: Iterable[Tensor]) -> dict[str, Tensor | None]:
    return {f"output {i}": t for i, t in enumerate(tensors)}


def step_errors(expected: Step, got: Step) -> dict[str, float]:
    """Errors of outputs, parameter gradients, buffers after the step, and the image's gradient, by name."""
    assert got.structure == expected.structure, f"output {got.structure} instead of {expected.structure}"
    result = errors(named(expected.outputs), named(got.outputs))
    result |= errors(expected.gradients, got.gradients)
    result |= errors(expected.buffers, got.buffers)
    if expected.image is not None:
        result |= errors({"image": expected.image}, {"image": got.image})
    return result


def compare(
    model: nn.Module,
    image: Tensor,
    *,
    image_gradient: bool = True,
    seed: int | None = None,
    inference: bool | None = None,
    fast: Accelerated | None = None,
    **options: Any,
) -> dict[str, float]:
    """Errors of an accelerated training step, and of inference, against the network itself.

    Args:
        model: in the mode (train or eval) and dtype to be compared; it is copied, not changed.
        image: the batch.
        image_gradient: whether the image wants a gradient.
        seed: for networks that draw random numbers: set before each forward.
        inference: whether to compare it, too: a recording and a forward more. If None, hypothesis' examples do so at
            every other size of the image.
        fast: an accelerated copy of the model, with its state; None makes one.
        options: of `accelerate`.
    """
    if inference is None:
        from hypothesis import currently_in_test_context  # which benchmarks do without

        inference = not currently_in_test_context() or sum(image.shape) % 2 == 0
    fast = accelerate(copy.deepcopy(model), **options) if fast is None else fast
    return _compare(copy.deepcopy(model), fast, image, image_gradient, seed, inference)


def compare_each(
    model: nn.Module, image: Tensor, changes: Iterable[Callable[[], object]], *, inference: bool = True, **options: Any
) -> Iterator[dict[str, float]]:
    """Errors as `compare` returns them, of one recording that is planned again after each of the changes.

    Args:
        model, image, inference, options: as in `compare`.
        changes: called one after the other.
    """
    stock, fast = copy.deepcopy(model), accelerate(copy.deepcopy(model), **options)
    for change in changes:
        change()
        plan_again(fast)
        yield _compare(stock, fast, image, inference=inference)


def _compare(
    stock: nn.Module,
    fast: nn.Module,
    image: Tensor,
    image_gradient: bool = True,
    seed: int | None = None,
    inference: bool = True,
) -> dict[str, float]:
    runs = []
    for network in (stock, fast):
        if seed is not None:
            torch.manual_seed(seed)
        runs.append(step(network, image, image_gradient=image_gradient))
    result = step_errors(*runs)
    if not inference:
        return result
    with torch.no_grad():
        if any(module.training for module in stock.modules()) and runs[0].buffers:
            stock(image)  # updates its running statistics also without a gradient
        if seed is not None:
            torch.manual_seed(seed)
        outputs = tree_flatten(fast(image))[0]
    inferred = errors(named(runs[0].outputs), named(outputs)) | errors(buffers(stock), buffers(fast))
    return result | {f"{name} (inference)": error for name, error in inferred.items()}


def assert_exact(model: nn.Module, image: Tensor, *, limit: float = LIMIT, **options: Any) -> None:
    """Fail with the worst tensors' names unless everything agrees to `limit`."""
    found = compare(model, image, **options)
    wrong = sorted(((e, n) for n, e in found.items() if not e <= limit), reverse=True)
    assert not wrong, "; ".join(f"{name}: {error:.1e}" for error, name in wrong[:8])


def assert_each_exact(model: nn.Module, cases: Iterable[tuple[Tensor, Any]], **options: Any) -> None:
    """`assert_exact` for images in tiles, (image, tile) for each case, by one accelerated network.

    It is recorded for the first image, and in each mode once more for all further sizes: for batches of one image apart
    from others. Each case begins with the model's state. Inference is compared for images that are not of the first
    shape, and for the last: of the first shape it would be a recording more.
    """
    cases = list(cases)
    fast = accelerate(copy.deepcopy(model), **{name: options.pop(name) for name in ("halos",) if name in options})
    for number, (image, tile) in enumerate(cases):
        fast.tile = tile if isinstance(tile, tuple) else (tile, tile)
        take_state(fast, model)
        inference = image.shape != cases[0][0].shape or number == len(cases) - 1
        try:
            assert_exact(model, image, fast=fast, **{"inference": inference, **options})
        except AssertionError as error:
            error.add_note(f"image {tuple(image.shape)}, tile {tile}")
            raise


def take_state(fast: nn.Module, model: nn.Module) -> None:
    """Copy parameters and buffers, also those that no `state_dict` has."""
    with torch.no_grad():
        for tensors in (nn.Module.parameters, nn.Module.buffers):
            for kept, first in zip(tensors(fast), tensors(model), strict=True):
                kept.copy_(first)


def plan_again(fast: Accelerated) -> None:
    """Forget the plans, but not what was recorded."""
    fast._runner.programs = Programs()
