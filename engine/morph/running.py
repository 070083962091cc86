"""Runs of a network in float32 and float64, in eval and train mode, with errors in one line and exact arithmetic.

That arithmetic has no TF32 and no autocast, and is in float64 where a forward requests float32 by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from ..errors import GigamorphError, MorphError
from ..torch_private import TorchDispatchMode, tree_flatten
from .copying import view_in_dtype
from .example import Inputs


def output_leaves(result: Any) -> list[Any]:
    """Flatten the result of a network: tensors, plain values, and tensors in attributes of other objects."""
    leaves: list[Any] = []
    for leaf in tree_flatten(result)[0]:
        leaves += _held(leaf, set()) if _is_holder(leaf) else [leaf]
    return leaves


def output_tensors(result: Any) -> list[Tensor]:
    """Return the tensors among the `output_leaves`.

    Raises:
        MorphError: the result contains no tensor to compare.
    """
    tensors = [leaf for leaf in output_leaves(result) if isinstance(leaf, Tensor)]
    if not tensors:
        raise MorphError(
            f"the network returns a {type(result).__name__} without a tensor to compare; let it return tensors, "
            "directly or in tuples, lists, dictionaries or dataclasses"
        )
    return tensors


def _is_holder(leaf: Any) -> bool:
    """Return whether an object may have tensors in its attributes."""
    plain = leaf is None or isinstance(leaf, Tensor | bool | int | float | complex | str | bytes | type)
    return not plain and (hasattr(leaf, "__dict__") or hasattr(type(leaf), "__slots__"))


def _held(holder: Any, seen: set[int]) -> list[Tensor]:
    """Return the tensors in an object's attributes, in order."""
    seen.add(id(holder))
    slots = [name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]
    values = [*getattr(holder, "__dict__", {}).values(), *(getattr(holder, name, None) for name in slots)]
    found: list[Tensor] = []
    for value in tree_flatten(values)[0]:
        if isinstance(value, Tensor):
            found.append(value)
        elif id(value) not in seen and _is_holder(value) and not callable(value):
            found += _held(value, seen)
    return found


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode, and restore the mode of each afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Convert exceptions of the network's code to a MorphError of `what` and their first line.

    Raises:
        MorphError: the network's code raised an exception; errors of gigamorph are not converted.
    """
    try:
        yield
    except GigamorphError:
        raise
    except Exception as error:
        raise MorphError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32, autocast and similar settings; a Dirac convolution in TF32 would round its input to 10 bits."""
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for s, old in zip(settings, before, strict=True):
            s.fp32_precision = old


@contextmanager
def in_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Let a network that was cast to float64 create and cast to float64 where its forward requests float32.

    This covers `x.float() / 255`, `torch.zeros(...)` and `dtype=torch.float32`. Other dtypes change nothing.
    """
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)


class _Doubles(TorchDispatchMode):
    """Dispatch mode, because a function mode would disable PyTorch's fast paths."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.ops.aten.lift_fresh.default and args[0].dtype == torch.float32:  # torch.tensor(an array)
            return args[0].double()
        return func(*args, **kwargs)


log = logging.getLogger("gigamorph.morph")

STATISTICS = 64  # minimum number of values per batch statistic; fewer would magnify rounding
TRAIN_BATCH = 4  # maximum batch for that purpose

Runs = dict[str, list[Tensor]]  # "float32 eval" -> outputs in float64


class NoDropout(TorchFunctionMode):
    """Function mode that disables dropout: copies draw separate masks, so random paths are not preserved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name == "bernoulli_":  # the mask of stochastic depth; its caller has already divided by p
            return args[0].fill_(1)
        return func(*args, **kwargs)


class _NoModules(ModuleTracker):
    """Module tracker without hooks: PyTorch's hooks fail on a view of a parameter made without gradients."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class NetworkRuns:
    """One of the two networks, and its outputs.

    Attributes:
        runs: outputs by dtype and mode.
        shapes: shapes of the eval outputs.
        flops: FLOPs of one eval forward.
        trained_on: the inputs in train mode.
        untrained: why it could not run in train mode; empty if it could.
        inputs: the inputs in eval mode.
    """

    inputs: Inputs

    def __init__(self, model: nn.Module, who: str) -> None:
        self.model, self.who = model, who
        self.runs: Runs = {}
        self.shapes: list[tuple[int, ...]] = []
        self.flops = 0
        self.trained_on: Inputs | None = None
        self.untrained = ""
        self.works: dict[torch.dtype, nn.Module] = {}

    def run(self, inputs: Inputs, train: Inputs | Callable[[int, int], Inputs] | None, seed: int = 0) -> None:
        """Run the network in all modes.

        Args:
            inputs: the inputs in eval mode.
            train: the inputs in train mode, or a function of seed and minimum batch; None skips train mode.
            seed: seed of these inputs.
        """
        self.inputs = inputs
        counter, norms = FlopCounterMode(display=False), _Norms()
        counter.mod_tracker = _NoModules()
        devices = sorted({x.device.index or 0 for x in inputs.tensors if x.is_cuda})
        with torch.no_grad(), torch.random.fork_rng(devices), full_precision():
            for dtype in (torch.float32, torch.float64):
                short = str(dtype).removeprefix("torch.")
                work = view_in_dtype(self.model, dtype)
                # Function modes disable PyTorch's fast paths, which users' calls take and which bypass modules.
                fast = has_fast_path(self.model)
                with nullcontext() if fast or self.flops else counter, norms:
                    self.runs[f"{short} eval"] = self._call(work, inputs, dtype, False)
                self.shapes = [tuple(t.shape) for t in self.runs[f"{short} eval"]]
                if fast and not self.flops:  # the counter does not count fused ops, so count a run without them
                    with NoDropout(), counter:
                        self._call(work, inputs, dtype, False)
                self.flops = counter.get_total_flops()
                if callable(train):
                    batch = min(TRAIN_BATCH, -(-STATISTICS // max(norms.fewest, 1))) if norms.fewest else 1
                    train = train(seed, batch)
                if train is not None and not self.untrained:
                    self._train(work, train, dtype, short)
                self.works[dtype] = work

    def run_eval(self, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
        """Run eval mode on other inputs; return float64. If train mode ran before, its running statistics are used."""
        if dtype not in self.works:
            self.works[dtype] = view_in_dtype(self.model, dtype)
        with torch.no_grad(), torch.random.fork_rng([]), full_precision():
            return self._call(self.works[dtype], inputs, dtype, False)

    def _train(self, work: nn.Module, train: Inputs, dtype: torch.dtype, short: str) -> None:
        with NoDropout():
            try:
                self.runs[f"{short} train"] = self._call(work, train, dtype, True)
                self.trained_on = train
            except MorphError as error:
                self.untrained, self.trained_on = str(error), None

    def _call(self, work: nn.Module, inputs: Inputs, dtype: torch.dtype, training: bool) -> list[Tensor]:
        torch.manual_seed(0)
        work.train(training)
        mode = "train" if training else "eval"
        log.info("running %s in %s, %s mode", self.who, str(dtype).removeprefix("torch."), mode)
        given = inputs.to(dtype)
        with failures(f"{self.who} cannot be run in {mode} mode"), in_dtype(dtype):
            result = inputs.call(work, given)
        return [t.detach().double() for t in output_tensors(result)]

    def finite(self) -> bool:
        """Return whether all outputs are finite."""
        return all(bool(t.isfinite().all()) for tensors in self.runs.values() for t in tensors)


class _Norms(TorchDispatchMode):
    """Dispatch mode that finds the fewest values per channel and image of any batch norm; 0 without a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fewest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in str(func) and args and isinstance(args[0], Tensor) and args[0].ndim > 1:
            values = math.prod(args[0].shape[2:])
            self.fewest = min(self.fewest or values, values)
        return func(*args, **(kwargs or {}))


def has_fast_path(model: nn.Module) -> bool:
    """Return whether PyTorch may run modules of the network in eval mode as one fused op on the submodules' weights."""
    return any(isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention) for m in model.modules())


def distance(want: list[Tensor], have: list[Tensor]) -> float:
    """Return the largest relative difference of two lists of tensors in the maximum norm; nan if any is not finite."""
    worst = 0.0
    for a, b in zip(want, have, strict=True):
        if not a.numel():
            continue
        difference, scale = (a - b).abs().max().item(), a.abs().max().item()
        if not math.isfinite(difference) or not math.isfinite(scale):
            return math.nan
        if difference:
            worst = max(worst, difference / scale if scale else math.inf)
    return worst
