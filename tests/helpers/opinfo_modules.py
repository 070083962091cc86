"""PyTorch's own samples of its operations (OpInfo), each as a network: convolution, operation, convolution.

Tensors among an operation's arguments become parameters of the network where they may, so that their gradients are
compared too, else buffers. What
PyTorch itself does not run this way (dimensions that a map does not have) is left out.
"""

from __future__ import annotations

import functools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from random_modules import Spec, Visit
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

PER_OPERATION = 12
_LIMIT = 20_000  # elements of a map
# Random, without fixed values, without tensors as inputs, or no part of a forward.
_LEFT_OUT = re.compile(
    r"^_|^(linalg|fft|sparse|torch\.ops|jiterator|signal|empty|rand|normal|bernoulli|multinomial|cauchy|exponential)"
    r"|^(geometric|log_normal|uniform|new_empty|to_sparse|histc|histogram|svd|pca|geqrf|ormqr|lu|cholesky|triangular)"
    r"|^(qr|eig|symeig|pinverse|logdet|slogdet|inverse|stft|istft|full|ones$|zeros$|arange|linspace|logspace|eye|tri)"
    r"|dropout|polygamma|zeta|embedding|rrelu|ctc_loss|resize|item$|equal$|allclose|byte$|short$|char$|half$|bfloat16$|chalf|cdouble"
    r"|cfloat|scaled_dot|multi_head|fractional|gumbel|grid_sampler_3d|bincount|unique|nonzero|block_diag|cartesian"
)


@functools.cache
def _all() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    found = {}
    for info in op_db:
        name = f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name
        if not _LEFT_OUT.search(info.name) and info.supports_dtype(torch.float64, "cpu"):
            found[name] = info
    return found


def operations() -> list[str]:
    """The names of all operations, by family and then by name."""
    return sorted(_all())


class Between(nn.Module):
    """An operation between two convolutions.

    Args:
        call: gets the map and the other arguments.
        shape: of the map that the operation takes.
        squash: brings the map into the operation's domain.
        given: the other arguments, whose tensors become parameters or buffers.
    """

    def __init__(self, call: Callable[..., Any], shape: tuple[int, ...], squash: bool, given: Any):
        super().__init__()
        self.call, self.squash = call, squash
        self.first = nn.Conv2d(2, shape[1], 3, padding=1)
        leaves, self.structure = tree_flatten(given)
        self.constants: list[Any] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.names = [f"argument{n}" if isinstance(leaf, Tensor) else "" for n, leaf in enumerate(leaves)]
        for name, leaf in zip(self.names, leaves, strict=True):
            if name and leaf.requires_grad and leaf.is_floating_point():
                self.register_parameter(name, nn.Parameter(leaf.detach().clone()))
            elif name:
                self.register_buffer(name, leaf.detach().clone())
        self.last: nn.Module | None = None

    def result(self, image: Tensor) -> Any:
        x = self.first(image)
        x = x.sigmoid() * 0.8 + 0.1 if self.squash else x
        leaves = [getattr(self, n) if n else c for n, c in zip(self.names, self.constants, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return self.call(x, *args, **kwargs)

    def forward(self, image: Tensor) -> Any:
        result = self.result(image)
        if self.last is None:
            return result
        return self.last(next(t for t in tree_leaves(result) if _is_map(t))), result


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.dtype == torch.float64 and value.numel() > 0


@dataclass(frozen=True)
class Sample(Spec):
    """A sample of an operation, and the usual visits to it."""

    name: str = ""
    number: int = 0
    variant: str = ""
    squash: bool = False

    def __str__(self) -> str:
        shape, args, kwargs = _drawn(self.name)[self.number]
        told = tree_map_only(Tensor, lambda t: f"<{'x'.join(map(str, t.shape))}>", (args, kwargs))
        return f"{self.name}{self.variant} on {shape}: {told}"[:300]

    def build(self) -> nn.Module:
        info = _all()[self.name]
        call = {"": info.op, " in place": info.inplace_variant, " method": info.method_variant}[self.variant]
        shape, args, kwargs = _drawn(self.name)[self.number]
        state = torch.get_rng_state()
        torch.manual_seed(0)
        try:
            net = Between(call, shape, self.squash, (args, kwargs)).double()
            with torch.no_grad():
                result = net.result(torch.randn(shape[0], 2, *shape[2:], dtype=torch.float64))
            maps = [t for t in tree_leaves(result) if _is_map(t)]
            if maps:
                kernel = 3 if min(maps[0].shape[2:]) >= 3 else 1
                net.last = nn.Conv2d(maps[0].shape[1], 2, kernel).double()
        finally:
            torch.set_rng_state(state)
        return net


@functools.lru_cache(maxsize=4)
def _drawn(name: str) -> list[tuple[tuple[int, int, int, int], Any, Any]]:
    """Shapes of the map, and the other arguments, of samples that differ."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    random.seed(0)
    found, seen = [], set()
    try:
        for sample in _all()[name].sample_inputs("cpu", torch.float64, requires_grad=True):
            given = sample.args, sample.kwargs
            if not isinstance(sample.input, Tensor) or sample.input.dim() > 4 or 0 in sample.input.shape:
                continue
            if sample.input.dtype != torch.float64:
                continue
            shape = (*(1,) * (4 - sample.input.dim()), *sample.input.shape)
            tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.dim()]
            if sample.input.dim() < 4 and not tensors:
                shape = (2, 3, 9, 8)
            key = shape, repr(tree_map_only(Tensor, lambda t: t.shape, given))
            if key not in seen and torch.Size(shape).numel() <= _LIMIT:
                seen.add(key)
                found.append((shape, *given))
    finally:
        torch.set_rng_state(state)
    return found[:: max(1, len(found) // PER_OPERATION)][:PER_OPERATION]


def samples(name: str) -> Iterator[Sample]:
    """The samples of an operation that PyTorch runs on a map with finite results."""
    info = _all()[name]
    for number, (shape, _, _) in enumerate(_drawn(name)):
        variants = [""]
        if number == 0:
            variants += [" in place"] * (info.inplace_variant is not None)
            variants += [" method"] * (info.method_variant is not None)
        for variant in variants:
            visit = Visit(size=shape[2:], batch=shape[0])
            quiet = Visit(size=shape[2:], batch=shape[0], grad="no_grad", image="plain")
            for squash in (False, True):
                tile = tuple(max(1, (side + 1) // 2) for side in shape[2:])
                sample = Sample(
                    0, tile=tile, visits=(visit, quiet), name=name, number=number, variant=variant, squash=squash
                )
                if _finite(sample):
                    yield sample
                    break


def _finite(sample: Sample) -> bool:
    try:
        net = sample.build()
        image = torch.randn(sample.visits[0].batch, 2, *sample.visits[0].size, dtype=torch.float64)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [t for t in tree_leaves(net(image)) if isinstance(t, Tensor)]
    except Exception:  # whatever PyTorch says of a sample that is no map
        return False
    return bool(found) and all(t.isfinite().all() for t in found if t.is_floating_point())
