"""`accelerate`: a network that takes images of any size, with the outputs and gradients of the whole image."""

from __future__ import annotations

import contextlib
import importlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map

from .. import kernels
from .capture.arguments import Arguments
from .capture.program import wants
from .capture.trace import Program, Spec, capture, refuse_backward_hooks
from .cuda_graphs import buffers
from .errors import GigamorphError
from .execution.evidence import Evidence, Score, find_evidence
from .execution.forward import Forward, ImageTensor
from .execution.prepared import Prepared, ProgramKey
from .execution.run import run
from .images.batches import as_batch, as_batches
from .images.pixels import PixelBatch, PixelSource
from .lowering.ops import VectorOp
from .module.arguments import HALO_PLACES, check_choice, check_network, image_shape, tile_sides
from .module.delegation import Container, Delegate, is_container
from .module.entrance import entrance
from .parallel.processes import check_same, check_same_steps, world
from .planning.plan import Plan
from .planning.search import Request, arrange, arrange_together
from .tiling.memory import parse_bytes
from .tiling.page_pool import PagePool
from .tiling.scan import Autocast, Pixels, TileEvent
from .tiling.spatial import SpatialShard, spatial_group
from .tiling.stage import TiledStage
from .verify import CannotVerify
from .verify import verify as verify_network

_REMEMBERED = 16  # image sizes whose program and plan are kept
_VARIANTS = 4  # programs of one size, of different states of the network


@dataclass(frozen=True)
class Form:
    """What is computed with a network instead of its call alone.

    Attributes:
        key: tells it from others.
        call: gets the image and further maps.
        inputs: shapes and dtypes of those maps, whose image axes are the last two, and whether they want a gradient.
        vectors: the same of tensors without image axes, which it gets after the maps.
    """

    key: Hashable
    call: Callable[..., Any]
    inputs: tuple[Spec, ...] = ()
    vectors: tuple[Spec, ...] = ()


@dataclass(frozen=True)
class _Images:
    """An image batch: its pixels, the tensor if it is one, and how it will be computed."""

    pixels: Pixels
    image: Tensor | None
    dtype: torch.dtype
    device: torch.device
    training: bool
    image_grad: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape)


class Accelerated(Delegate):
    """What `accelerate` returns: the network it was made from, with a forward by tiles.

    It shares the network's parameters, buffers and children. Whatever a module is asked for (`train`, `to`,
    `state_dict`, `load_state_dict`, extra state, hooks on those) the network does, with its own methods where its class
    overrides some, also as the child of another module. Attributes that are read or set are the network's, but for
    those that `accelerate` was given. Methods of the network run as they are, on the network: what they compute by
    calling `self(x)` or parts of it is right, but ordinary PyTorch on the whole image; only calls of `net` itself, and
    `evidence`, go by tiles. Hooks on `net` see its input and output, hooks on modules in it are recorded.

    Threads that use one `net` take turns; `torch.compile` leaves it as it is.

    Attributes:
        on_tile: called with a `TileEvent` after each tile, for progress; None for silence.
    """

    def __init__(
        self,
        model: nn.Module,
        memory_budget: int | None,
        tile: tuple[int, int] | None,
        batch_norm: str | None,
        halos: str,
        fallback: str | None = None,
        split: Any = None,
    ):
        super().__init__(model)
        self.memory_budget, self.tile, self.batch_norm, self.halos = memory_budget, tile, batch_norm, halos
        self.fallback, self.split = fallback, split
        self.on_tile: Callable[[TileEvent], None] | None = None
        self._programs: OrderedDict[ProgramKey, list[tuple[Prepared, ...]]] = OrderedDict()
        self._page_pool = PagePool()
        self._checked: set[Any] | None = None  # with verify=True: the modes that were compared with ordinary PyTorch
        self.seal()
        if batch_norm == "frozen":
            freeze_batch_norm(model)

    def __getstate__(self) -> dict[str, Any]:
        # Recorded programs hold functions and fake shapes; they are made again in a moment.
        return {**super().__getstate__(), "_programs": OrderedDict(), "_page_pool": PagePool(), "on_tile": None}

    def train(self, mode: bool = True) -> Accelerated:
        super().train(mode)
        if self.batch_norm == "frozen":
            freeze_batch_norm(self._network)
        return self

    def eval(self) -> Accelerated:
        super().eval()
        return self

    def extra_repr(self) -> str:
        return f"accelerated: memory_budget={self.memory_budget}, tile={self.tile}"

    def plan_for(self, shape: Sequence[int], dtype: torch.dtype | None = None, device: Any = None) -> Plan:
        """The plan that an image batch of this shape (N, C, H, W) will run with.

        Args:
            dtype: of the image; None takes that of the parameters.
            device: where it would run; None takes that of the parameters, or the CPU for those on the meta device.
        """
        device = torch.device(self._device() if device is None else device)
        device = torch.device("cpu") if device.type == "meta" else device
        dtype = dtype or next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        training = torch.is_grad_enabled()
        program = capture(self._network, image_shape(shape), dtype, device)
        shard = self._shard(program)
        return arrange(program, self._request(training), shard=shard)[1]

    def _request(self, training: bool, image_grad: bool = False, count_tile: bool = True) -> Request:
        given = self.memory_budget, self.tile, training, self.halos
        return Request(*given, image_grad, count_tile, self.fallback)

    def _shard(self, program: Program) -> SpatialShard | None:
        """The processes that share an image; to a SyncBatchNorm among them they are one."""
        if self.split is None:
            return None
        shard = spatial_group(self.split)
        for op in program.ops:
            if op.group is not None and dist.get_world_size(op.group) != shard.count:
                raise GigamorphError(
                    f"module '{op.module}' shares its statistics with other processes than those that share an image; "
                    "give its process_group and split the same processes"
                )
            op.group = None
        return shard

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _state(self) -> tuple[Any, ...]:
        """What a recorded program depends on besides the image: modes, and the hooks that users have registered."""
        return tuple(
            (id(m), m.training, *m._forward_pre_hooks, *m._forward_hooks, *m._backward_pre_hooks, *m._backward_hooks)
            for m in self._network.modules()
        )

    def _program(self, images: Sequence[_Images], form: Form | None = None) -> tuple[Prepared, ...]:
        """The network made ready for image batches: one alone, or several that go through it side by side."""
        form, first = form or Form((), self._network), images[0]
        device, training = first.device, first.training
        if self.split is not None:
            what = repr((first.shape, first.dtype, training, first.image_grad, self.memory_budget))
            check_same(
                spatial_group(self.split).group,
                what,
                device,
                "processes that share an image have images of different shapes, other settings or other modes; give "
                "all of them the same",
            )
        image_grads = tuple(one.image_grad for one in images)
        key = ProgramKey(
            shapes=tuple(one.shape for one in images),
            dtype=first.dtype,
            device=device,
            training=training,
            image_grads=image_grads,
            wanting=tuple(wants(one.image) for one in images),
            modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            autocast=Autocast.current(device),
            settings=(self.tile, self.memory_budget, self.halos),
            triton=kernels.enabled(device),
            world=world(),
            form=(form.key, form.inputs, form.vectors),
        )
        known = self._programs.setdefault(key, [])
        self._programs.move_to_end(key)
        for place, ready in enumerate(known):
            if ready[0].staged.program.guard.holds():
                known.insert(0, known.pop(place))
                return ready
        if training:
            refuse_backward_hooks(self._network)
        if self._checked is not None:
            self._check(first.shape[1], device)
        programs = [
            capture(
                self._network, one.shape, first.dtype, device, form.call, form.inputs, form.vectors, wants(one.image)
            )
            for one in images
        ]
        for ready in known:  # what a call changes may differ (a counter), and all else be the same
            if all(one.staged.program.take_over(other) for one, other in zip(ready, programs, strict=True)):
                return ready
        counted = self.memory_budget is not None or buffers.executor(device) is not None
        shard = None if len(images) > 1 else self._shard(programs[0])
        if len(images) > 1:
            arranged = arrange_together(programs, self._request(training, count_tile=counted), image_grads)
        else:
            request = self._request(training, image_grads[0], counted)
            arranged = [arrange(programs[0], request, shard=shard, agree=True)]
        prepared = []
        for staged, plan in arranged:
            stages = tuple(TiledStage(stage, tile) for stage, tile in zip(staged.stages, plan.sides, strict=True))
            prepared.append(Prepared(staged, stages, plan, shard=shard))
        known.insert(0, tuple(prepared))
        del known[_VARIANTS:]
        if len(self._programs) > _REMEMBERED:
            self._programs.popitem(last=False)
        return known[0]

    def _check(self, channels: int, device: torch.device) -> None:
        """Compare with ordinary PyTorch on a small image, once for each mode of the network; see `verify.verify`."""
        checked, state = self._checked if self._checked is not None else set(), self._state()
        if state not in checked:
            make = lambda twin, tile: Accelerated(twin, None, tile, None, "device", self.fallback)  # noqa: E731
            verify_network(self._network, make, channels, device)
            checked.add(state)

    @entrance
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output for an image batch.

        Args:
            args: what the network's own forward takes. The first image among them, a float tensor (N, C, H, W) on any
                device or a pixel source, says the size; further tensors with these H and W as their last two axes
                (images, masks) are read tile by tile as well, all other tensors (metadata) whole. Python values are
                part of the recording.
                A list of pixel sources or tensors, (C, H, W) or (N, C, H, W), in the place of an only argument is a
                batch. Images of unequal sizes are taken one after the other and their outputs concatenated; with
                BatchNorm in training mode side by side, for its statistics are those of all pixels of all images, and
                its running statistics are updated once.
            kwargs: likewise, by name.

        Returns:
            What the network returns for the whole images.
        """
        if len(args) == 1 and not kwargs and not isinstance(args[0], dict):
            batches = as_batches(args[0])
            return self._one_size(batches[0]) if len(batches) == 1 else self._several_sizes(batches)
        given = Arguments.of(self._network, args, kwargs)
        form = Form(given.key, given.call, given.inputs, given.vectors)
        return self._one_size(given.image, form, given.maps, given.others)

    def _one_size(
        self,
        x: Tensor | PixelBatch,
        form: Form | None = None,
        given: Sequence[Tensor | Pixels] = (),
        vectors: Sequence[Tensor] = (),
    ) -> Any:
        forward = self._open(x, form, given, vectors)
        run([forward])
        return forward.finish()

    def _several_sizes(self, batches: Sequence[Tensor | PixelBatch]) -> Any:
        """The outputs of image batches of several sizes, concatenated."""
        images = [self._images(x) for x in batches]
        (first,) = self._program(images[:1])
        if any(isinstance(step, VectorOp) and step.share is not None for step in first.staged.steps):
            if self.split is not None:
                raise GigamorphError(
                    "images of several sizes that are split over processes cannot share the statistics of a BatchNorm "
                    'in training mode; give images of one size, or accelerate(..., batch_norm="frozen")'
                )
            forwards = self._ready(images, self._program(images))
            run(forwards)
            outputs = [forwards[0].finish(), *(forward.output() for forward in forwards[1:])]
        else:
            outputs = [self._one_size(x) for x in batches]
        return tree_map(lambda *parts: torch.cat(parts), *outputs)

    def _open(
        self,
        x: Tensor | PixelBatch,
        form: Form | None = None,
        given: Sequence[Tensor | Pixels] = (),
        vectors: Sequence[Tensor] = (),
    ) -> Forward:
        """The forward of an image batch, nothing of it computed yet.

        Args:
            form: what is computed instead of the network's call.
            given: the further maps that it takes.
            vectors: the further tensors without image axes.
        """
        images = [self._images(x, (*given, *vectors))]
        (forward,) = self._ready(images, self._program(images, form), given, vectors)
        return forward

    def _images(self, x: Tensor | PixelBatch, further: Sequence[Any] = ()) -> _Images:
        if isinstance(x, Tensor):
            if x.dim() != 4 or not x.is_floating_point():
                raise GigamorphError(
                    f"the image batch must be a float tensor (N, C, H, W), not {x.dtype} of shape {tuple(x.shape)}"
                )
            pixels, image, dtype, device = ImageTensor(x), x, x.dtype, self._device()
        else:
            parameter = next(self.parameters(), torch.empty(0))
            pixels, image, dtype, device = x, None, parameter.dtype, parameter.device
        image_grad = torch.is_grad_enabled() and image is not None and image.requires_grad
        wanting = (*further, *self.parameters())
        training = torch.is_grad_enabled() and (image_grad or any(getattr(t, "requires_grad", False) for t in wanting))
        return _Images(pixels, image, dtype, device, training, image_grad)

    def _ready(
        self,
        images: Sequence[_Images],
        prepared: Sequence[Prepared],
        given: Sequence[Tensor | Pixels] = (),
        vectors: Sequence[Tensor] = (),
    ) -> list[Forward]:
        """A forward for each image batch, on the parameters and buffers as they are now."""
        for others in chain.from_iterable(self._programs.values()):
            for other in others:
                if all(other is not one for one in prepared):
                    other.let_go()  # the plan has room for those of one program
        first = prepared[0]
        if images[0].training:
            groups = dict.fromkeys(op.group for op in first.staged.program.ops if op.group is not None)
            check_same_steps(groups, first.order, images[0].device)
        forwards = []
        for one, ready in zip(images, prepared, strict=True):
            program, image, pixels = ready.staged.program, one.image, one.pixels
            inputs = dict(zip(program.inputs, given, strict=True))
            tensors = {v: t for v, t in inputs.items() if isinstance(t, Tensor)}
            tensors.update(zip(program.vectors, vectors, strict=True))
            kept = {**self._bind_state(program), **tensors}
            state = {v: _for_backward(t) for v, t in kept.items()}
            regions = {v: t for v, t in inputs.items() if not isinstance(t, Tensor)}
            written = {v for v, _ in program.updates}
            targets = {v: kept[v] for v in written if v in kept}
            # What is written to at the end of the call may be read in its backward.
            state.update((v, state[v].clone()) for v in written & ready.kept_for_backward if v in state)
            if program.image in written and image is not None:
                targets[program.image], image = image, image.clone()
                pixels = ImageTensor(image)
            forwards.append(Forward(ready, image, pixels, one.device, one.dtype, state, self.on_tile, regions, targets))
            forwards[-1].keep_to_plan(self._page_pool)
        return forwards

    def evidence(self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource], output: int = 0) -> Tensor:
        """Where in the image an output comes from: the class activation map, exact at any image size.

        For the last map before the global pooling, the sum over channels of d output / d channel times the map (Zhou et
        al., 2016; Selvaraju et al., 2017: for average pooling the two agree). It takes two inference passes.

        Args:
            x: an image batch as for `forward`, all of one size.
            output: index of the output (column of the network's first output tensor).

        Returns:
            (N, h, w) float32 (of a float64 network float64) on the network's device, at the stride of that map. Where
            its cells lie in the image: `evidence_map`.

        Raises:
            GigamorphError: if the network has no global pooling, or images are split over processes.
        """
        return self.evidence_map(x, lambda outputs: _column(outputs, output)).values

    @entrance
    def evidence_map(self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource], score: Score) -> Evidence:
        """`evidence` of any score of the outputs, with the outputs and the place of its cells in the image.

        Args:
            x: an image batch as for `forward`, all of one size.
            score: (N, outputs) -> (N,), differentiable; of the network's first output tensor.

        Raises:
            GigamorphError: if the network has no global pooling, or images are split over processes.
        """
        self.need_all_rows("evidence")
        with torch.inference_mode(False), torch.no_grad():
            with torch.enable_grad():  # recorded without gradients, what is written in place would have none
                images = [replace(self._images(as_batch(x)), training=False, image_grad=False)]
                prepared = self._program(images)
            (forward,) = self._ready(images, prepared)
            return find_evidence(forward, score)

    def need_all_rows(self, name: str) -> None:
        """Refuse, by the caller's name, what one process cannot give if images are split over several."""
        if self.split is not None:
            raise GigamorphError(f"{name} needs all rows of a map; accelerate the model again, without split")

    def _bind_state(self, program: Program) -> dict[int, Tensor]:
        """The parameters, buffers and constants of the program as they are now."""
        state = dict(self._network.named_buffers(remove_duplicate=False))
        state.update(self._network.named_parameters(remove_duplicate=False))
        env = {}
        for number, value in enumerate(program.values):
            if value.name is not None:
                env[number] = state[value.name]
            elif value.constant is not None:
                env[number] = value.constant if value.find is None else value.find()
        return env


class AcceleratedContainer(Container, Accelerated):
    """An accelerated `nn.Sequential` or other container: it has a length and items, too."""


def _for_backward(tensor: Tensor) -> Tensor:
    """The tensor; one that was made in inference mode cannot be kept for a backward, but its copy can."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _column(outputs: Tensor, output: int) -> Tensor:
    if not -outputs.shape[1] <= output < outputs.shape[1]:
        raise GigamorphError(f"output {output} does not exist; the network has {outputs.shape[1]}")
    return outputs[:, output]


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
    halos: str = "auto",
    fallback: str | None = None,
    split: dist.ProcessGroup | bool | None = None,
    verify: bool = False,
) -> Accelerated:
    """Make a ConvNet train and run on images of any size within a memory budget, exactly.

    The result has the same parameters and `state_dict` keys as `model` (it shares them), and works with
    `loss.backward()`, autocast, gradient accumulation, DDP and Lightning as the network itself would.

    Args:
        model: any network whose layers are local (convolutions, pooling, pointwise, frozen norms) up to a reduction
            over the image (global pooling), after which anything may follow.
        memory_budget: bytes for one step (``"4GiB"``), parameters and gradients included. It is used to the full:
            tiles whose graph still fits are not recomputed in the backward. None takes the least that the preferred
            tile needs on the CPU, and on a GPU what is free; it refuses only what exceeds that.
        tile: side, or (height, width), of a tile in image pixels; None lets the plan choose.
        batch_norm: ``"frozen"`` keeps every BatchNorm in evaluation mode, also after `train()`.
        halos: where the halos between tiles are kept for the backward: ``"device"``, ``"host"``, ``"disk"``, or
            ``"auto"``, the first of these that the budget allows.
        fallback: ``"whole"`` lets ops that cannot be computed tile by tile (a mirrored map, causal attention) have
            their maps whole, in the memory that this takes; None refuses such networks.
        split: compute each image on several processes, each a band of its rows: those of a group of
            `torch.distributed`, or with True all. Every process gives the same images, reads the rows that it needs of
            them, and has the outputs and gradients of the whole; the budget is that of one process.
        verify: compare two steps of copies of the network in float64 with those of ordinary PyTorch, on small images:
            outputs, gradients, buffers, attributes and the image itself. Now, if the first convolution tells the
            image's channels, else at the first image; and again in each mode (`train()`, `eval()`) at its first image.

    Raises:
        GigamorphError: for arguments that are not understood, or if `verify` finds a difference. Networks that cannot
            be computed exactly are refused with an `UnsupportedError` at the first image, before any work.
    """
    if isinstance(model, Accelerated):
        raise GigamorphError("the model is accelerated already")
    check_network(model)
    check_choice("batch_norm", batch_norm, ("frozen", None))
    check_choice("halos", halos, HALO_PLACES)
    check_choice("fallback", fallback, ("whole", None))
    # Fake tensors import it at their first use, and it keeps the frames of its importer until the garbage collector
    # runs: those of a step have its graph among their locals.
    importlib.import_module("torch._dynamo")
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    kind = AcceleratedContainer if is_container(model) else Accelerated
    net = kind(model, budget, tile_sides(tile), batch_norm, halos, fallback, split or None)
    if verify:
        net._checked = set()
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None:
            with contextlib.suppress(CannotVerify):  # it may stand after a reshape of the image
                net._check(first.in_channels, net._device())
    return net
