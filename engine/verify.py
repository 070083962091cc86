"""The self-check: compares two steps by tiles with ordinary PyTorch, on copies of the network, in float64.

On a GPU the check also runs with gigamorph's kernel for every op: at other image sizes that kernel may be the faster.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.choice import override
from .errors import GigamorphError
from .torch_private import FakeTensor

# Tried in this order, because some networks accept no odd or no small sizes. Three tiles per axis.
_SIZES = ((97, 75), (128, 96), (224, 224))
_IMAGES = 2
_STEPS = 2  # the second step starts with the state that the first one changed
_GROWTH = 1.01  # factor on the parameters between steps, in place of an optimizer
_LIMIT = 1e-10
_NOISE = 100  # allowed ratio of a difference to the effect of a last-bit change of the image
_FLOOR = 1e-3  # smallest norm for relative errors, as a part of the largest tensor of the same kind
_DEEPEST = 6  # levels of nested containers that are compared
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


@dataclass
class _Record:
    """Outputs, gradients and state after some steps.

    Attributes:
        tensors: by kind, and then by name; compared by distance.
        facts: types, flags and counts by name; compared for equality.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, name: str, value: Any) -> None:
        """Record a value and the values in it."""
        for key, leaf in _leaves(value, 0):
            label = f"{kind} {name}{key}"
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
                self.tensors.setdefault(kind, {})[label] = leaf.detach().clone()
                self.facts[f"the dtype of {label}"] = leaf.dtype
            elif type(leaf) is float:
                self.tensors.setdefault(kind, {})[label] = torch.tensor(leaf, dtype=torch.float64)
            else:
                self.facts[label] = leaf


class CannotVerify(GigamorphError):
    """The network cannot be copied, or ordinary PyTorch does not run it on any of the small images."""


def verify(
    network: nn.Module,
    accelerated: Callable[[nn.Module, tuple[int, int]], nn.Module],
    axes: tuple[int, ...],
    device: torch.device,
) -> None:
    """Compare two steps on different small images, with and without gradients, with ordinary PyTorch.

    The check compares outputs and their types, gradients (or their absence), buffers, attributes of modules, and the
    image itself. The network and the random generators stay unchanged. Element-wise dropout is disabled, because its
    random numbers depend on the tiles. Hooks run on the copies.

    Args:
        network: the network, in the mode to check.
        accelerated: accelerates a copy of the network, with the given tile.
        axes: sizes between the batch axis and the rows: an image's channels, or a bag's images and their channels.
        device: device of the small images.

    Raises:
        CannotVerify: the network cannot be copied, or ordinary PyTorch fails on the small images.
        GigamorphError: the results differ; the message names the largest difference.
        UnsupportedError: the network cannot be computed by tiles.
    """
    devices = [device] if device.type == "cuda" else []
    dice, plain = torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False)
    with dice, torch.inference_mode(False), torch.enable_grad(), plain:
        images, expected = _first_that_runs(network, axes, device)
        tile = tuple(-(-side // 3) for side in images[0].shape[-2:])
        shaken = [image * (1 + torch.finfo(image.dtype).eps * torch.randn_like(image)) for image in images]
        again = _run(_twin(network), shaken)
        noise = _distance(expected, again)
        for condition in ("", ", with all kernels") if kernels.enabled(device) else ("",):
            with override("triton") if condition else contextlib.nullcontext():
                got = _run(_twin(network), images, lambda twin: accelerated(twin, tile))  # pyright: ignore
            found = _distance(expected, got)
            fact = next((f for f in _changed_facts(expected, got) if f not in _changed_facts(expected, again)), None)
            worst = max(found, key=lambda name: found[name] / max(_LIMIT, _NOISE * noise.get(name, 0)))
            if found[worst] > max(_LIMIT, _NOISE * noise.get(worst, 0)) or fact is not None:
                break
        else:
            return
        other = _distance(expected, _run(_twin(network), images, seed=1))
    if max(other.values()) > _LIMIT:
        raise GigamorphError(
            "verify: two runs differ because the network draws random numbers for each pixel; check it in eval() mode"
        )
    if fact is not None:
        differs = f"{fact} is {_format_fact(got.facts, fact)} instead of {_format_fact(expected.facts, fact)}"
    else:
        differs = f"{worst} differs by {found[worst]:.1e} from ordinary PyTorch"
    raise GigamorphError(
        f"verify: {differs} (image {tuple(images[0].shape)}, tile {tile[0]} x {tile[1]}{condition}); do not use the "
        f"accelerated network{', or set GIGAMORPH_KERNELS=stock' if condition else ''}, and report this"
    )


def _twin(network: nn.Module) -> nn.Module:
    """A copy in float64, without element-wise dropout."""
    # Weights computed from other weights (weight_norm, pruning masks) are computed again at the next call.
    attributes = [value for module in network.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, Tensor) and value.grad_fn is not None]
    try:
        twin = copy.deepcopy(network, {id(value): value.detach().clone() for value in computed}).double()
    except RuntimeError as error:
        raise CannotVerify(
            f"verify: the network cannot be copied ({str(error).splitlines()[0]}); omit verify=True"
        ) from error
    for module in twin.modules():
        if isinstance(module, nn.Dropout | nn.AlphaDropout):
            module.eval()
    return twin


def _first_that_runs(network: nn.Module, axes: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], _Record]:
    """Small images, one per step, and the record of ordinary PyTorch for them."""
    failure = "?"
    for height, width in _SIZES:
        generator = torch.Generator().manual_seed(0)
        shape = (_STEPS, _IMAGES, *axes, height, width)
        images = list(torch.randn(shape, dtype=torch.float64, generator=generator).to(device))
        try:
            return images, _run(_twin(network), images)
        except CannotVerify:
            raise
        except Exception as error:  # networks raise errors of any class for unsupported sizes
            failure = (str(error).splitlines() or [type(error).__name__])[0]
    raise CannotVerify(f"verify: the network does not run on small images in float64 ({failure}); omit verify=True")


def _run(
    twin: nn.Module, images: list[Tensor], form: Callable[[nn.Module], nn.Module] = lambda twin: twin, seed: int = 0
) -> _Record:
    """Record a training step and an inference on each image.

    Args:
        twin: a copy of the network, which the steps change.
        images: one image batch per step.
        form: makes the module to call from the copy.
        seed: seed of the global random generator.
    """
    record, network = _Record(), form(twin)
    for number, image in enumerate(images):
        when = f"(step {number + 1})"
        torch.manual_seed(seed)
        leaf = image.clone().requires_grad_()
        given = leaf * 1  # a copy, which the network may change in place
        outputs = network(given)
        record.add("output", when, outputs)
        record.add("image", f"after the call {when}", given)
        tensors = [t for _, t in _leaves(outputs, 0) if isinstance(t, Tensor)]
        record.facts[f"the outputs' requires_grad {when}"] = [t.requires_grad for t in tensors]
        wanted = {"the image": leaf, **{n: p for n, p in twin.named_parameters() if p.requires_grad}}
        grads = _gradients(tensors, list(wanted.values()))
        for name, grad in zip(wanted, grads, strict=True):
            record.add("gradient", f"of '{name}' {when}", grad)
        _record_state(record, twin, when)
        torch.manual_seed(seed)
        given = image.clone()
        with torch.no_grad():
            record.add("output", f"without gradients {when}", network(given))
        record.add("image", f"after the call without gradients {when}", given)
        _record_state(record, twin, f"without gradients {when}")
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(_GROWTH)
    return record


def _gradients(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the sum of all outputs, each value with a random weight."""
    generator = torch.Generator().manual_seed(2)
    real = [torch.view_as_real(t) if t.is_complex() else t for t in outputs]
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device) for t in real]
    terms = [(t * weight).sum() for t, weight in zip(real, weights, strict=True) if t.requires_grad]
    if not terms:
        return [None] * len(wanted)
    return list(torch.autograd.grad(sum(terms, torch.zeros(()).to(terms[0])), wanted, allow_unused=True))


def _record_state(record: _Record, twin: nn.Module, when: str) -> None:
    """Record buffers and attributes of modules."""
    for name, buffer in twin.named_buffers():
        record.add("buffer", f"'{name}' {when}", buffer)
    for path, module in twin.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                record.add("attribute", f"'{path}.{name}' {when}" if path else f"'{name}' {when}", value)


def _leaves(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """(key, value) of each tensor and plain value in a value, and the types of their containers."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    items: Any = None
    if value is None or isinstance(value, Tensor | bool | int | float | complex | str | bytes | torch.dtype):
        yield "", kind if isinstance(value, FakeTensor) else value
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple | deque):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) or type(value).__name__ == "SimpleNamespace":
        items = vars(value).items() if hasattr(value, "__dict__") else None
    yield "", kind
    for key, item in (items or ()) if depth < _DEEPEST else ():
        for path, leaf in _leaves(item, depth + 1):
            yield f"[{key!r}]{path}", leaf


def _changed_facts(expected: _Record, got: _Record) -> dict[str, None]:
    """Names of the facts that differ or are missing."""
    missing = object()
    names = dict.fromkeys([*expected.facts, *got.facts])
    return {n: None for n in names if expected.facts.get(n, missing) != got.facts.get(n, missing)}


def _format_fact(facts: dict[str, Any], name: str) -> str:
    return str(facts[name])[:80] if name in facts else "missing"


def _distance(expected: _Record, got: _Record) -> dict[str, float]:
    """Relative errors by name; infinite if a tensor is missing, or shapes or positions of non-finite values differ."""
    found: dict[str, float] = {}
    for kind in dict.fromkeys([*expected.tensors, *got.tensors]):
        tensors, others = expected.tensors.get(kind, {}), got.tensors.get(kind, {})
        largest = max((_plain(t).norm().item() for t in tensors.values()), default=0.0)
        for name in dict.fromkeys([*tensors, *others]):
            want, have = tensors.get(name), others.get(name)
            if (
                want is None
                or have is None
                or have.shape != want.shape
                or not torch.equal(have.isfinite(), want.isfinite())
            ):
                found[name] = float("inf")
            else:
                scale = max(_plain(want).norm().item(), _FLOOR * largest)
                distance = (_plain(have) - _plain(want)).norm().item()
                found[name] = distance / scale if scale else distance
    return found


def _plain(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.double().nan_to_num(posinf=0, neginf=0)
