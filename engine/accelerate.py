"""`accelerate`: a network that takes images of any size, with the outputs and gradients of the whole image."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from .. import kernels
from .backend import prepare
from .errors import GigamorphError
from .graph import Graph, Small, build_graph
from .memory import parse_bytes
from .ops import Reduction
from .pixels import PixelBatch, PixelSource, as_batch
from .plan import Plan, choose
from .scan import Autocast, Scan, TileEvent, cast_dtype
from .sweep import Sweep
from .trace import Op, bind, capture

_REMEMBERED = 16  # image sizes whose program and plan are kept


class _TensorPixels:
    """A tensor as a batch of pixels."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tensor.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.tensor[:, :, top:bottom, left:right]


class _ScanFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scan: Scan, image: Tensor | None, *smalls: Tensor):
        ctx.scan = scan
        ctx.image = None if image is None else (image.shape, image.dtype, image.device)
        ctx.save_for_backward(*smalls, *([] if image is None else [image]))
        ctx.set_materialize_grads(False)
        return scan.forward(smalls, ctx.needs_input_grad[2:], ctx.needs_input_grad[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        image_grad = None
        if ctx.image is not None and ctx.needs_input_grad[1]:
            shape, dtype, device = ctx.image
            image_grad = torch.zeros(shape, dtype=dtype, device=device)
        smalls = ctx.saved_tensors  # raises if one of them or the image was changed in place since the forward
        sums = ctx.scan.backward(grads, image_grad)
        results = []
        for value, small, wanted in zip(ctx.scan.sweep.graph.smalls, smalls, ctx.needs_input_grad[2:], strict=False):
            total = sums.pop(value, None) if wanted else None
            results.append(torch.zeros_like(small) if wanted and total is None else total)
        return None, image_grad, *results


class Accelerated(nn.Module):
    """What `accelerate` returns. It shares the parameters, buffers and children of the network it was made from.

    Attributes:
        on_tile: called with a `TileEvent` after each tile, for progress; None for silence.
    """

    def __init__(
        self, model: nn.Module, memory_budget: int | None, tile: tuple[int, int] | None, batch_norm: str | None,
        carries: str,
    ):  # fmt: skip
        super().__init__()
        # The very dictionaries of the network: state_dict keys, .to(), load_state_dict and deepcopy come out alike.
        self.__dict__["_parameters"] = model._parameters
        self.__dict__["_buffers"] = model._buffers
        self.__dict__["_modules"] = model._modules
        self.__dict__["_network"] = model
        self.memory_budget, self.tile, self.batch_norm, self.carries = memory_budget, tile, batch_norm, carries
        self.on_tile: Callable[[TileEvent], None] | None = None
        self._programs: OrderedDict[Any, tuple[Graph, Sweep, Plan]] = OrderedDict()
        self.train(model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_network"], name)

    def __getstate__(self) -> dict[str, Any]:
        # Recorded programs hold functions and fake shapes; they are made again in a moment.
        return {**self.__dict__, "_programs": OrderedDict(), "on_tile": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerated:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        state = self.__getstate__()
        # The network first, so that the shared dictionaries come out shared.
        network = copy.deepcopy(state.pop("_network"), memo)
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in state.items()})
        twin.__dict__["_network"] = network
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = network.__dict__[name]
        return twin

    def train(self, mode: bool = True) -> Accelerated:
        super().train(mode)
        self._network.training = mode
        if self.batch_norm == "frozen":
            freeze_batch_norm(self._network)
        return self

    def extra_repr(self) -> str:
        return f"accelerated: memory_budget={self.memory_budget}, tile={self.tile}"

    def plan_for(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = None) -> Plan:
        """The plan that an image batch of this shape (N, C, H, W) will run with."""
        device = torch.device(device) if device is not None else self._device()
        graph = self._program(tuple(shape), dtype, device, torch.is_grad_enabled(), False)[0]
        return choose(graph, self.memory_budget, self.tile, torch.is_grad_enabled(), self.carries)

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _program(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, training: bool, image_grad: bool
    ) -> tuple[Graph, Sweep, Plan]:
        modes = tuple((id(m), m.training) for m in self._network.modules())
        wants = tuple(p.requires_grad for p in self.parameters())
        settings = (self.tile, self.memory_budget, self.carries)
        autocast, triton = Autocast.current(device), kernels.enabled(device)
        key = (shape, dtype, device, training, image_grad, modes, wants, autocast, settings, triton)
        if key in self._programs:
            self._programs.move_to_end(key)
            return self._programs[key]
        graph = build_graph(capture(self._network, shape, dtype, device))
        prepare(graph, training, image_grad)
        counted = self.memory_budget is not None
        plan = choose(graph, self.memory_budget, self.tile, training, self.carries, image_grad, counted)
        sweep = Sweep(graph, plan.tile)
        self._programs[key] = graph, sweep, plan
        if len(self._programs) > _REMEMBERED:
            self._programs.popitem(last=False)
        return self._programs[key]

    def forward(self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource]) -> Any:
        """The network's output for an image batch.

        Args:
            x: a float tensor (N, C, H, W) on any device, a pixel source (one image), or a list of pixel sources.
                Sources of unequal sizes are taken one after the other and their outputs concatenated.

        Returns:
            What the network returns for the whole images.
        """
        if isinstance(x, (list, tuple)) and len({tuple(s.shape) for s in x}) > 1:
            outputs = [self._step(as_batch(source)) for source in x]
            return tree_map(lambda *parts: torch.cat(parts), *outputs)
        return self._step(as_batch(x))

    def _open(self, x: Tensor | PixelBatch) -> tuple[Tensor | None, Scan, dict[int, Tensor], list[Tensor]]:
        """The scan of an image batch with its smalls computed: (image if a tensor, scan, environment, smalls)."""
        if isinstance(x, Tensor):
            if x.dim() != 4 or not x.is_floating_point():
                raise GigamorphError(
                    f"the image batch must be a float tensor (N, C, H, W), not {x.dtype} of shape {tuple(x.shape)}"
                )
            pixels, image, dtype, device = _TensorPixels(x), x, x.dtype, self._device()
        else:
            parameter = next(self.parameters(), torch.empty(0))
            pixels, image, dtype, device = x, None, parameter.dtype, parameter.device
        image_grad = torch.is_grad_enabled() and image is not None and image.requires_grad
        training = torch.is_grad_enabled() and (image_grad or any(p.requires_grad for p in self.parameters()))
        graph, sweep, plan = self._program(tuple(pixels.shape), dtype, device, training, image_grad)
        scan = Scan(sweep, pixels, device, dtype, plan.carries, plan.retained, self.on_tile)
        env = self._bind_state(graph)
        _run(graph, graph.prelude, env, device)
        smalls = [env[v].to(cast_dtype(graph, v, env[v].dtype, scan.autocast)) for v in graph.smalls]
        return image, scan, env, smalls

    def _finish(self, scan: Scan, env: dict[int, Tensor], results: Sequence[Tensor]) -> Any:
        """The network's output from the results of its sweep."""
        graph = scan.sweep.graph
        for reduction, value in zip(graph.reductions, results, strict=False):
            env[reduction.op.outputs[0]] = value
        env.update(zip(graph.stored, results[len(graph.reductions) :], strict=True))
        _run(graph, graph.tail, env, scan.device)
        return bind(graph.program.output, env)

    def _step(self, x: Tensor | PixelBatch) -> Any:
        image, scan, env, smalls = self._open(x)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*smalls, *([] if image is None else [image]))):
            results = _ScanFunction.apply(scan, image, *smalls)
        else:
            results = scan.forward(smalls)
        return self._finish(scan, env, results)

    def evidence(self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource], output: int = 0) -> Tensor:
        """Where in the image an output comes from: the class activation map, exact at any image size.

        For the last map before the global pooling, the sum over channels of d output / d channel times the map (Zhou et
        al., 2016; Selvaraju et al., 2017: for average pooling the two agree). It takes two inference passes.

        Args:
            x: an image batch as for `forward`, all of one size.
            output: index of the output (column of the network's first output tensor).

        Returns:
            (N, h, w) float32 on the network's device, h and w at the stride of that map.

        Raises:
            GigamorphError: if the network has no global pooling.
        """
        with torch.no_grad():
            _, scan, env, smalls = self._open(as_batch(x))
            graph = scan.sweep.graph
            if not graph.reductions:
                raise GigamorphError("the network pools nothing over the image, so there is no evidence to show")
            results = scan.forward(smalls)
            with torch.enable_grad():
                leaves = [r.detach().requires_grad_() for r in results]
                scores = next(t for t in tree_leaves(self._finish(scan, env, leaves)) if isinstance(t, Tensor))
                scores = scores.reshape(scores.shape[0], -1)
                if not -scores.shape[1] <= output < scores.shape[1]:
                    raise GigamorphError(f"output {output} does not exist; the network has {scores.shape[1]}")
                grads = torch.autograd.grad(scores[:, output].sum(), leaves, allow_unused=True)
            size = graph.maps.size(graph.reductions[-1].value)
            total = torch.zeros(scores.shape[0], *size, device=scan.device)
            for reduction, grad in zip(graph.reductions, grads, strict=False):
                if grad is not None and graph.maps.size(reduction.value) == size:
                    tap = _evidence_tap(total, reduction, grad, graph.maps.axes[reduction.value])
                    taps = scan.taps.setdefault(reduction.value, [])
                    taps.append(tap)
            scan.forward(smalls)
        return total

    def _bind_state(self, graph: Graph) -> dict[int, Tensor]:
        """The parameters, buffers and constants of the program as they are now."""
        state = dict(self._network.named_buffers(remove_duplicate=False))
        state.update(self._network.named_parameters(remove_duplicate=False))
        env = {}
        for number, value in enumerate(graph.program.values):
            if value.name is not None:
                env[number] = state[value.name]
            elif value.constant is not None:
                env[number] = value.constant
        return env


def _evidence_tap(total: Tensor, reduction: Reduction, grad: Tensor, axes: tuple[int, int]):
    """Adds a block's evidence to the map of it."""
    grad = reduction.keep_dims(grad)

    def add(block: Tensor, rect: tuple[int, int, int, int]) -> None:
        share = (block.float() * (grad.float() / reduction.count)).movedim(axes, (-2, -1))
        share = share.reshape(share.shape[0], -1, *share.shape[-2:]).sum(1)
        total[:, rect[0] : rect[1], rect[2] : rect[3]] += share

    return add


def _run(graph: Graph, ops: Sequence[Op | Small], env: dict[int, Tensor], device: torch.device) -> None:
    """Run small ops in program order with ordinary autograd."""
    values = graph.program.values
    for op in ops:
        if isinstance(op, Small):
            env.update(zip(op.outputs, op.run(env), strict=True))
            continue
        # A map that is only asked for its dtype and device is stood in for by an empty tensor.
        maps = {v: torch.empty(0, dtype=values[v].dtype, device=device) for v in graph.maps.inputs(op) if v not in env}
        scope = {**{v: env[v] for v in op.inputs if v in env}, **maps}
        with _autocast(op, device):
            result = op.func(*bind(op.args, scope), **bind(op.kwargs, scope))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        # Calls that return nothing (an assignment to a slice) give a new value to the tensor they wrote to.
        if len(tensors) < len(op.outputs):
            tensors += [scope[v] for v in op.mutated][: len(op.outputs) - len(tensors)]
        env.update(zip(op.outputs, tensors, strict=False))


def _autocast(op: Op, device: torch.device):
    if op.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=op.autocast[1], enabled=op.autocast[0])


def freeze_batch_norm(model: nn.Module) -> None:
    """Put every BatchNorm in evaluation mode: it uses and keeps its stored statistics; its affine part still learns."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def accelerate(
    model: nn.Module,
    memory_budget: int | str | None = None,
    tile: int | tuple[int, int] | None = None,
    batch_norm: str | None = None,
    carries: str = "auto",
) -> Accelerated:
    """Make a ConvNet train and run on images of any size within a memory budget, exactly.

    The result has the same parameters and `state_dict` keys as `model` (it shares them), and works with
    `loss.backward()`, autocast, gradient accumulation, DDP and Lightning as the network itself would.

    Args:
        model: any network whose layers are local (convolutions, pooling, pointwise, frozen norms) up to a reduction
            over the image (global pooling), behind which anything may follow.
        memory_budget: bytes for one step (``"4GiB"``), parameters and gradients included. It is used to the full:
            tiles whose graph still fits are not recomputed in the backward. None takes the least that the preferred
            tile needs, and refuses only what exceeds the free memory.
        tile: side, or (height, width), of a tile in image pixels; None lets the plan choose.
        batch_norm: ``"frozen"`` keeps every BatchNorm in evaluation mode, also after `train()`.
        carries: where the carries between tiles are kept for the backward: ``"device"``, ``"host"``, ``"disk"``, or
            ``"auto"``, the first of these that the budget allows.

    Raises:
        GigamorphError: for arguments that are not understood. Networks that cannot be computed exactly are refused
            with an `UnsupportedError` at the first image, before any work.
    """
    if isinstance(model, Accelerated):
        raise GigamorphError("the model is accelerated already")
    if batch_norm not in (None, "frozen"):
        raise GigamorphError(f'batch_norm={batch_norm!r} is not known; give "frozen" or None')
    if carries not in ("auto", "device", "host", "disk"):
        raise GigamorphError(f'carries={carries!r} is not known; give "auto", "device", "host" or "disk"')
    if isinstance(tile, int):
        tile = (tile, tile)
    if tile is not None and min(tile) < 1:
        raise GigamorphError(f"tile={tile} must be positive")
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    return Accelerated(model, budget, tile, batch_norm, carries)
