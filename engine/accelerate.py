"""`accelerate`: a network that takes images of any size, with the outputs and gradients of the whole image."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map

from .capture.arguments import Arguments, is_bag, takes_a_list, write_back
from .capture.program import Program, takes_single_images
from .errors import GigamorphError
from .execution.begin import begin
from .execution.branches import following
from .execution.evidence import Evidence, Score, find_evidence
from .execution.forward import Forward
from .execution.image_batch import ImageBatch
from .execution.prepared import Prepared
from .execution.programs import Form, Programs, Settings
from .execution.rows import check_rows
from .execution.run import compute, run
from .images.batches import PixelBatch, as_batch, as_batches, is_batch
from .images.pixels import PixelSource
from .lowering.ops import VectorOp
from .module.arguments import HALO_PLACES, check_choice, check_network, image_shape, tile_sides
from .module.delegation import Container, Delegate, ExtraState, has_extra_state, is_container
from .module.entrance import entrance
from .module.once import refuse_checkpoint
from .planning.plan import Plan
from .tiling.memory import parse_bytes
from .tiling.memory_limit import MemoryLimit
from .tiling.page_pool import PagePool
from .tiling.scan import Pixels, TileEvent
from .verify import CannotVerify
from .verify import verify as verify_network


class Accelerated(Delegate):
    """What `accelerate` returns: the network it was made from, with a forward by tiles.

    It shares the network's parameters, buffers and children. Whatever a module is asked for (`train`, `to`,
    `state_dict`, `load_state_dict`, extra state, hooks on those) the network does, with its own methods where its class
    overrides some, also as the child of another module. Attributes that are read or set are the network's, but for
    those that `accelerate` was given. Methods of the network run as they are, on the network: what they compute by
    calling `self(x)` or parts of it is right, but ordinary PyTorch on the whole image; only calls of `net` itself, and
    `evidence`, go by tiles. One that returns the network returns `net`. Hooks on `net` see its input and output, hooks
    on modules in it are recorded.

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
        self._programs = Programs()
        self._page_pool = PagePool()
        self._checked: set[Any] | None = None  # with verify=True: the modes that were compared with ordinary PyTorch
        self.seal()
        self._keep_frozen()

    def __getstate__(self) -> dict[str, Any]:
        # Recorded programs hold functions and fake shapes; they are made again in a moment.
        return {**super().__getstate__(), "_programs": Programs(), "_page_pool": PagePool(), "on_tile": None}

    def train(self, mode: bool = True) -> Accelerated:
        super().train(mode)
        self._keep_frozen()
        return self

    def eval(self) -> Accelerated:
        super().eval()
        return self

    def extra_repr(self) -> str:
        return f"accelerated: memory_budget={self.memory_budget}, tile={self.tile}"

    def plan_for(self, shape: Sequence[int], dtype: torch.dtype | None = None, device: Any = None) -> Plan:
        """The plan that an image batch of this shape (N, C, H, W), or bags (B, V, C, H, W), will run with.

        Args:
            dtype: of the image; None takes that of the parameters.
            device: where it would run; None takes that of the parameters, or the CPU for those on the meta device.
        """
        self._keep_frozen()
        device = torch.device(self._device() if device is None else device)
        device = torch.device("cpu") if device.type == "meta" else device
        dtype = dtype or next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        shape, form = image_shape(shape), None
        if len(shape) == 5:
            given = Arguments.of(self._network, (torch.empty(shape, dtype=dtype, device="meta"),), {})
            shape, form = given.image.shape, Form(given.key, given.call, given.inputs)
        return self._settings.plan_for(self._network, shape, dtype, device, form)

    @property
    def _settings(self) -> Settings:
        return Settings(self.memory_budget, self.tile, self.halos, self.fallback, self.split)

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _state(self) -> tuple[Any, ...]:
        """What a recorded program depends on besides the image: modes, and the hooks that users have registered."""
        return tuple(
            (id(m), m.training, *m._forward_pre_hooks, *m._forward_hooks, *m._backward_pre_hooks, *m._backward_hooks)
            for m in self._network.modules()
        )

    def _keep_frozen(self) -> None:
        if self.batch_norm == "frozen":  # the network itself may have been put in training mode, or got new layers
            freeze_batch_norm(self._network)

    def _prepare(
        self, images: Sequence[ImageBatch], form: Form | None = None, branches: tuple[bool, ...] = ()
    ) -> tuple[Prepared, ...]:
        self._keep_frozen()
        check = None if self._checked is None else self._check
        return self._programs.prepare(self._network, images, self._settings, form, check, branches)

    def _check(self, axes: tuple[int, ...], device: torch.device) -> None:
        """Compare with ordinary PyTorch on a small image, once for each mode of the network; see `verify.verify`."""
        checked, state = self._checked if self._checked is not None else set(), self._state()
        if state not in checked:
            make = lambda twin, tile: Accelerated(twin, None, tile, None, "device", self.fallback)  # noqa: E731
            verify_network(self._network, make, axes, device)
            checked.add(state)

    @entrance
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output for an image batch.

        Args:
            args: what the network's own forward takes. The first image among them, a tensor (N, C, H, W) on any
                device or a pixel source, says the size, or larger bags of images (B, V, C, H, W), as of the views of an
                exam. Further tensors with these H and W as their last two axes (images, masks) are read tile by tile as
                well, all other tensors (metadata) whole. Python values are part of the recording.
                A list of pixel sources or tensors, (C, H, W) or (N, C, H, W), in the place of an only argument is a
                batch, unless the network's forward is annotated to take a list or tuple. Images of unequal sizes are
                taken one after the other and their outputs concatenated; with BatchNorm in training mode side by side,
                for its statistics are those of all pixels of all images, and its running statistics are updated once.
                Dicts and lists that the forward changes are changed.
            kwargs: likewise, by name.

        Returns:
            What the network returns for the whole images.
        """
        only = len(args) == 1 and not kwargs
        listed = only and isinstance(args[0], list | tuple)
        if only and is_batch(args[0]) and not is_bag(args[0]) and not (listed and takes_a_list(self._network)):
            batches = as_batches(args[0])
            if listed:
                self._refuse_views(batches[0])
            return self._one_size(batches[0]) if len(batches) == 1 else self._several_sizes(batches)
        given = Arguments.of(self._network, args, kwargs)
        form = Form(given.key, given.call, given.inputs, given.vectors)
        result, changes = self._one_size(given.image, form, given.maps, given.others)
        write_back(args, kwargs, changes)
        return result

    def _refuse_views(self, batch: Tensor | PixelBatch) -> None:
        """Refuse a list of images where the network's forward seems to take a list itself."""
        remedy = (
            "annotate its argument (`def forward(self, views: list[Tensor])`) if it takes a list; else give a tensor"
        )
        try:
            (prepared,) = self._prepare([ImageBatch.of(self._network, batch)])
        except Exception as error:
            error.add_note(f"A list of images is one batch to an accelerated network; {remedy}.")
            raise
        if takes_single_images(prepared.staged.program):
            raise GigamorphError(
                "a list of images is one batch to an accelerated network, whose forward takes single images out of it; "
                + remedy
            )

    def _one_size(
        self,
        x: Tensor | PixelBatch,
        form: Form | None = None,
        given: Sequence[Tensor | Pixels] = (),
        vectors: Sequence[Tensor] = (),
    ) -> Any:
        return following(lambda branches: compute(self._open(x, form, given, vectors, branches=branches)))

    def _several_sizes(self, batches: Sequence[Tensor | PixelBatch]) -> Any:
        """The outputs of image batches of several sizes, concatenated."""
        images = [ImageBatch.of(self._network, x) for x in batches]
        (first,) = self._prepare(images[:1])
        if any(isinstance(step, VectorOp) and step.share is not None for step in first.staged.steps):
            if self.split is not None:
                raise GigamorphError(
                    "images of several sizes that are split over processes cannot share the statistics of a BatchNorm "
                    'in training mode; give images of one size, or accelerate(..., batch_norm="frozen")'
                )
            prepared = self._prepare(images)
            for one in prepared:
                check_rows(one.staged.program, first.staged.program)
            forwards = self._begin(images, prepared)
            run(forwards)
            outputs = [forwards[0].finish(), *(forward.output() for forward in forwards[1:])]
        else:
            outputs, together, like = [], None, None
            for x in batches:
                output, together, like = following(partial(self._alone, x, together, like))
                outputs.append(output)
        return tree_map(lambda *parts: torch.cat(parts), *outputs)

    def _alone(
        self, x: Tensor | PixelBatch, together: MemoryLimit | None, like: Program | None, branches: tuple[bool, ...]
    ) -> tuple[Any, MemoryLimit | None, Program]:
        """The output of one image batch of several, the limit that the next one shares, and the program for it."""
        forward = self._open(x, together=together, branches=branches)
        program = forward.prepared.staged.program
        check_rows(program, like or program)
        run([forward])
        return forward.finish(), forward.memory_limit, program

    def _open(
        self,
        x: Tensor | PixelBatch,
        form: Form | None = None,
        given: Sequence[Tensor | Pixels] = (),
        vectors: Sequence[Tensor] = (),
        together: MemoryLimit | None = None,
        branches: tuple[bool, ...] = (),
    ) -> Forward:
        """The forward of an image batch, nothing of it computed yet.

        Args:
            form: what is computed instead of the network's call.
            given: the further maps that it takes.
            vectors: the further tensors without image axes.
            together: see `Forward.keep_to_plan`.
            branches: those that the image is known to take.
        """
        images = [ImageBatch.of(self._network, x, (*given, *vectors))]
        (forward,) = self._begin(images, self._prepare(images, form, branches), given, vectors, together)
        return forward

    def _begin(
        self,
        images: Sequence[ImageBatch],
        prepared: Sequence[Prepared],
        given: Sequence[Tensor | Pixels] = (),
        vectors: Sequence[Tensor] = (),
        together: MemoryLimit | None = None,
    ) -> list[Forward]:
        """A forward for each image batch, on the parameters and buffers as they are now."""
        program = prepared[0].staged.program
        if program.updates or program.effects or program.hooks:
            refuse_checkpoint()
        self._programs.keep_captures_of(prepared)
        return begin(self._network, images, prepared, self._page_pool, self.on_tile, given, vectors, together)

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
            with torch.enable_grad():
                batch = ImageBatch.of(self._network, as_batch(x))
            images = [replace(batch, training=False, image_grad=False)]

            def found(branches: tuple[bool, ...]) -> Evidence:
                with torch.enable_grad():  # recorded without gradients, what is written in place would have none
                    prepared = self._prepare(images, branches=branches)
                (forward,) = self._begin(images, prepared)
                return find_evidence(forward, score)

            return following(found)

    def need_all_rows(self, name: str) -> None:
        """Refuse, by the caller's name, what one process cannot give if images are split over several."""
        if self.split is not None:
            raise GigamorphError(f"{name} needs all rows of a map; accelerate the model again, without split")


class AcceleratedContainer(Container, Accelerated):
    """An accelerated `nn.Sequential` or other container: it has a length and items, too."""


class AcceleratedWithState(ExtraState, Accelerated):
    """An accelerated network with `get_extra_state`."""


class AcceleratedContainerWithState(ExtraState, AcceleratedContainer):
    """An accelerated container with `get_extra_state`."""


def _kind_of(model: nn.Module) -> type[Accelerated]:
    if is_container(model):
        return AcceleratedContainerWithState if has_extra_state(model) else AcceleratedContainer
    return AcceleratedWithState if has_extra_state(model) else Accelerated


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
            tiles whose graph still fits are not recomputed in the backward. None takes what is free on a GPU; on the
            CPU what the preferred tile needs, with graphs of tiles in up to a fifth of what is free (none where a tile
            is given). It refuses only what exceeds the free memory.
        tile: side, or (height, width), of a tile in image pixels; None lets the plan choose.
        batch_norm: ``"frozen"`` keeps every BatchNorm in evaluation mode, also after `train()`.
        halos: where the halos between tiles are kept for the backward: ``"device"``, ``"host"``, ``"disk"``, or
            ``"auto"``, the first of these that the budget allows.
        fallback: ``"whole"`` lets ops that cannot be computed tile by tile (a mirrored map, causal attention) have
            their maps whole, in the memory that this takes; None refuses such networks.
        split: compute each image on several processes, each a band of its rows: those of a group of
            `torch.distributed`, or with True all. Every process has the same weights and gives the same images, reads
            the rows that it needs, and has the outputs and gradients of the whole; the budget is that of one process.
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
    if not isinstance(verify, bool):
        raise GigamorphError(f"verify={verify!r} is not known; give True or False")
    # Fake tensors import it at their first use, and it keeps the frames of its importer until the garbage collector
    # runs: those of a step have its graph among their locals.
    importlib.import_module("torch._dynamo")
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    net = _kind_of(model)(model, budget, tile_sides(tile), batch_norm, halos, fallback, split or None)
    if verify:
        net._checked = set()
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None:
            with contextlib.suppress(CannotVerify):  # it may stand after a reshape of the image
                net._check((first.in_channels,), net._device())
    return net
