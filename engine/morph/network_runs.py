"""One network run on the inputs of a comparison: in both precisions; in eval mode and train mode."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from ..errors import MorphError
from .copying import view_in_dtype
from .example import Inputs
from .precision import full_precision, in_dtype
from .running import failures, output_tensors

log = logging.getLogger("gigamorph.morph")

STATISTICS = 64  # values of which a batch statistic is taken at least: fewer would magnify rounding
TRAIN_BATCH = 4  # at most so many images for that

Runs = dict[str, list[Tensor]]  # "float32 eval" -> outputs in float64


class NoDropout(TorchFunctionMode):
    """Dropout of any kind passes its input through: masks of copies are drawn apart, so paths are not preserved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name == "bernoulli_":  # stochastic depth draws its mask thus; p has been divided out by its caller
            return args[0].fill_(1)
        return func(*args, **kwargs)


class _NoModules(ModuleTracker):
    """All counts as one: PyTorch's own hooks cannot take a view of a parameter that is made without gradients."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class NetworkRuns:
    """One of the two networks, and what it returned.

    Attributes:
        runs: outputs by dtype and mode.
        shapes: of the eval outputs.
        flops: of one eval forward.
        trained_on: the inputs of train mode.
        untrained: why it could not be run in train mode.
        inputs: those of eval mode.
    """

    def __init__(self, model: nn.Module, who: str, outputs: Callable[[Any], Any] | None) -> None:
        self.model, self.who, self.outputs = model, who, outputs
        self.runs: Runs = {}
        self.shapes: list[tuple[int, ...]] = []
        self.flops = 0
        self.trained_on: Inputs | None = None
        self.untrained = ""
        self.inputs: Inputs | None = None
        self.works: dict[torch.dtype, nn.Module] = {}

    def run(self, inputs: Inputs, train: Inputs | Callable[[int, int], Inputs] | None, seed: int = 0) -> None:
        """All runs; `train` gives train mode's inputs, of a seed and a least batch; None: no such runs."""
        self.inputs = inputs
        counter, norms = FlopCounterMode(display=False), _Norms()
        counter.mod_tracker = _NoModules()
        devices = sorted({x.device.index or 0 for x in inputs.tensors if x.is_cuda})
        with torch.no_grad(), torch.random.fork_rng(devices), full_precision():
            for dtype in (torch.float32, torch.float64):
                short = str(dtype).removeprefix("torch.")
                work = view_in_dtype(self.model, dtype)
                # As it will be run: function modes switch PyTorch's fast paths off, which read weights past modules.
                fast = has_fast_path(self.model)
                with nullcontext() if fast or self.flops else counter, norms:
                    self.runs[f"{short} eval"] = self._call(work, inputs, dtype, False)
                self.shapes = [tuple(t.shape) for t in self.runs[f"{short} eval"]]
                if fast and not self.flops:  # whose fused ops are not counted
                    with NoDropout(), counter:
                        self._call(work, inputs, dtype, False)
                self.flops = counter.get_total_flops()
                if callable(train):
                    batch = min(TRAIN_BATCH, -(-STATISTICS // max(norms.fewest, 1))) if norms.fewest else 1
                    train = train(seed, batch)
                if train is not None and not self.untrained:
                    self._train(work, train, dtype, short)
                self.works[dtype] = work

    def again(self, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
        """Eval mode on other inputs, in float64; the statistics are those that train mode left, if it was run."""
        if dtype not in self.works:
            self.works[dtype] = view_in_dtype(self.model, dtype)
        with torch.no_grad(), torch.random.fork_rng([]), full_precision():
            return self._call(self.works[dtype], inputs, dtype, False)

    def after(self) -> list[Tensor]:
        """Eval mode on the same inputs, in float64, with the statistics that train mode left."""
        assert self.inputs is not None
        return self.again(self.inputs, torch.float64)

    def _train(self, work: nn.Module, train: Inputs, dtype: torch.dtype, short: str) -> None:
        self.trained_on = train
        with NoDropout():
            try:
                self.runs[f"{short} train"] = self._call(work, train, dtype, True)
            except MorphError as error:
                self.untrained = str(error)

    def _call(self, work: nn.Module, inputs: Inputs, dtype: torch.dtype, training: bool) -> list[Tensor]:
        torch.manual_seed(0)
        work.train(training)
        mode = "train" if training else "eval"
        log.info("running %s in %s, %s mode", self.who, str(dtype).removeprefix("torch."), mode)
        given = inputs.to(dtype)
        with failures(f"{self.who} cannot be run in {mode} mode"), in_dtype(dtype):
            result = inputs.call(work, given)
            result = self.outputs(result) if self.outputs else result
        return [t.detach().double() for t in output_tensors(result)]

    def finite(self) -> bool:
        """Whether all outputs are."""
        return all(bool(t.isfinite().all()) for tensors in self.runs.values() for t in tensors)


class _Norms(TorchDispatchMode):
    """Of how few values per channel and image a norm over the batch takes its statistics; 0: there is no such norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fewest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in str(func) and args and isinstance(args[0], Tensor) and args[0].ndim > 1:
            values = math.prod(args[0].shape[2:])
            self.fewest = min(self.fewest or values, values)
        return func(*args, **(kwargs or {}))


def has_fast_path(model: nn.Module) -> bool:
    """Whether PyTorch may compute modules of it in eval mode by one fused op that reads the weights of their parts."""
    return any(isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention) for m in model.modules())


def distance(want: list[Tensor], have: list[Tensor]) -> float:
    """Largest relative difference of a list of tensors in the maximum norm; nan if anything is not finite."""
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
