"""`accelerate`: makes a network process images of any size, with the outputs and gradients of the whole image."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .capture.arguments import is_bag, takes_a_list
from .capture.program import Given, takes_single_images
from .capture.recording import capture, load_recorder, refuse_unready
from .errors import GigamorphError
from .execution.class_activation import Evidence, Score, column_of, evidence_of_call
from .execution.image_sizes import outputs_of_sizes
from .execution.programs import PlanSettings, check_alike
from .execution.runner import Call, ProgramKnown, Runner
from .images.batches import PixelBatch, as_batch, as_batches, is_batch
from .images.pixels import PixelSource
from .module.arguments import check_choice, check_network, check_storage, image_shape, refuse_wrapped, tile_sides
from .module.delegation import Container, Delegate, ExtraState, has_extra_state, is_container
from .module.preconditions import with_preconditions
from .planning.plan import Plan
from .planning.search import arrange
from .tiling.memory import parse_bytes
from .tiling.scan import TileEvent
from .torch_private import BatchNorm
from .verify import CannotVerify
from .verify import verify as verify_network
from .versions import warn_of_newer

log = logging.getLogger("gigamorph")
_NAMES = "plan_for evidence evidence_map memory_budget tile batch_norm halos fallback split on_tile".split()
"""Attributes of an accelerated network that are not its network's."""


class Accelerated(Delegate):
    """A network whose forward and backward run tile by tile; `accelerate` returns it.

    It shares the network's parameters, buffers and children. Calls of module methods (`train`, `to`, `state_dict`,
    `load_state_dict`, extra state, hooks on those) are delegated to the network, including methods that its class
    overrides. This also holds if `net` is the child of another module. Attributes are read from and set on the
    network, except for the arguments of `accelerate`. Other methods of the network run unchanged: where they call
    `self(x)` or parts of it, the result is right, but ordinary PyTorch computes it on the whole image. Only calls of
    `net` itself and `evidence` run by tiles. A method that returns the network returns `net`. Hooks on `net` see its
    input and output; hooks on submodules are recorded.

    A lock serialises threads that use the same `net`. `torch.compile` does not trace into it.

    Attributes:
        on_tile: called with a `TileEvent` after each tile, to report progress; None for no calls. Of a step that a GPU
            replays as a whole, it gets one event, after the forward.
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
        self._runner = Runner(self._settings)
        self._checked: set[Any] | None = None  # with verify=True: the modes already compared with ordinary PyTorch
        self._seal()
        self._freeze_again()

    def __getstate__(self) -> dict[str, Any]:
        # Recorded programs hold functions and fake shapes, which cannot be pickled; the copy records again.
        return {**super().__getstate__(), "_runner": Runner(self._settings), "on_tile": None}

    def train(self, mode: bool = True) -> Accelerated:
        super().train(mode)
        self._freeze_again()
        return self

    def eval(self) -> Accelerated:
        super().eval()
        return self

    def extra_repr(self) -> str:
        return f"accelerated: memory_budget={self.memory_budget}, tile={self.tile}"

    def plan_for(
        self, shape: Sequence[int], dtype: torch.dtype | None = None, device: Any = None, by_region: bool = False
    ) -> Plan:
        """The plan for an image batch of this shape (N, C, H, W), or for bags (B, V, C, H, W).

        Args:
            shape: the shape of the input.
            dtype: dtype of the image; defaults to the dtype of the parameters.
            device: device of the run; defaults to the device of the parameters, or the CPU if that is meta.
            by_region: whether the pixels are read by region from a source; otherwise the image is a tensor.
        """
        self._freeze_again()
        device = torch.device(self._device() if device is None else device)
        device = torch.device("cpu") if device.type == "meta" else device
        dtype = dtype or next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        shape = image_shape(shape)
        inputs = [Given(shape, dtype)] if len(shape) == 5 else []
        if inputs:
            call = lambda _image, bags: self._network(bags)  # noqa: E731
            program = capture(self._network, (1, 1, *shape[-2:]), dtype, device, call, inputs)
        else:
            program = capture(self._network, shape, dtype, device)
        settings = self._settings
        request = replace(settings.request(torch.is_grad_enabled()), in_memory=not by_region)
        return arrange(program, request, shard=settings.shard(program))[1]

    @property
    def _settings(self) -> PlanSettings:
        return PlanSettings(self.memory_budget, self.tile, self.halos, self.fallback, self.split)

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _state(self) -> tuple[Any, ...]:
        """The state that a recorded program depends on, in addition to the image: modes and registered hooks."""
        return tuple(
            (id(m), m.training, *m._forward_pre_hooks, *m._forward_hooks, *m._backward_pre_hooks, *m._backward_hooks)
            for m in self._network.modules()
        )

    def _freeze_again(self) -> None:
        if self.batch_norm == "frozen":  # the caller may have changed the network's mode or added layers
            freeze_batch_norm(self._network)

    def _check(self, axes: tuple[int, ...], device: torch.device) -> None:
        """Compare with ordinary PyTorch on small images, once for each mode of the network; see `verify.verify`."""
        checked, state = self._checked if self._checked is not None else set(), self._state()
        if state not in checked:
            make = lambda twin, tile: Accelerated(twin, None, tile, None, "device", self.fallback)  # noqa: E731
            verify_network(self._network, make, axes, device)
            checked.add(state)

    @with_preconditions
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output for an image batch.

        Args:
            args: the arguments of the network's own forward. The first image among them, a tensor (N, C, H, W) on any
                device or a pixel source, determines the image size. Larger bags of images (B, V, C, H, W), such as the
                views of an exam, take precedence. Further tensors with these H and W as their last two axes (images,
                masks) are also read tile by tile; all other tensors (metadata) are read whole. Python values become
                part of the recording.
                A list of pixel sources or tensors, (C, H, W) or (N, C, H, W), as the only argument is a batch, unless
                the annotation of the network's forward is a list or tuple. Images of unequal sizes are computed one
                after the other, and their outputs are concatenated. With BatchNorm in training mode they are computed
                together: the statistics cover all pixels of all images, and running statistics are updated once.
                Dicts and lists that the forward changes in place are changed.
            kwargs: keyword arguments, treated like `args`.

        Returns:
            The output of the network for the whole images.
        """
        only = len(args) == 1 and not kwargs
        listed = only and isinstance(args[0], list | tuple)
        if only and is_batch(args[0]) and not is_bag(args[0]) and not (listed and takes_a_list(self._network)):
            batches = as_batches(args[0])
            if listed:
                self._refuse_views(batches[0])
            if len(batches) > 1:
                return outputs_of_sizes(self, batches)
            return self._compute(_forward, self._call(batches[0]))
        return self._compute(_forward, Call.of(self._network, args, kwargs))

    def _refuse_views(self, batch: Tensor | PixelBatch) -> None:
        """Raise an error for a list of images if the network's forward seems to take a list itself."""
        remedy = (
            "annotate its argument (`def forward(self, views: list[Tensor])`) if it takes a list; else pass a tensor"
        )
        try:
            opened = self._open(batch)
        except Exception as error:
            error.add_note(f"An accelerated network treats a list of images as one batch; {remedy}.")
            raise
        if takes_single_images(opened.program):
            raise GigamorphError(
                "an accelerated network treats a list of images as one batch, but its forward indexes single images; "
                + remedy
            )

    def _open(self, x: Tensor | PixelBatch, function: Any = None) -> ProgramKnown:
        """Record the program of the network's call on an image batch, without running it.

        Args:
            x: the image batch, (N, C, H, W).
            function: see `_compute`; defaults to the network's forward.
        """
        call = self._call(x)
        self._make_ready(call)
        return self._runner.open(function or _forward, call, self._network)

    def _compute(self, function: Any, call: Call, *args: Any) -> Any:
        """Evaluate a function of the network by tiles.

        Args:
            function: a function at module level; called with the network, `args` and the arguments of the call.
            call: the tensors, and how their graph is computed.
            args: Python values and modules for the function.
        """
        self._make_ready(call)
        return self._runner.compute(function, call, self._network, *args)

    def _call(self, batch: Tensor | PixelBatch) -> Call:
        """A call of the network with an image batch, for `_compute`."""
        return Call.of(self._network, (batch,), {}, batch)

    def _make_ready(self, call: Call) -> None:
        self._freeze_again()
        refuse_wrapped(self._network)
        refuse_unready(self._network)
        runner = self._runner
        runner.settings, runner.on_tile = self._settings, self.on_tile
        if self._checked is not None:
            shape = next((one.shape for one in call.further if is_bag(one)), call.batch.shape)
            self._check(tuple(shape[1:-2]), call.batch.device)
        if self.split is not None:
            check_alike(self._network, call.batch, runner.settings)

    def evidence(self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource], output: int = 0) -> Tensor:
        """The class activation map of an output, exact at any image size.

        For the last map before the global pooling, it is the sum over channels of d output / d channel times the map
        (Zhou et al., 2016; Selvaraju et al., 2017: for average pooling the two agree). It takes two inference passes.

        Args:
            x: an image batch as for `forward`, all of one size.
            output: index of the output (column of the network's first output tensor).

        Returns:
            (N, h, w), for volumes (N, d, h, w), float32 (float64 for a float64 network) on the network's device, at
            the stride of that map.
            `evidence_map` also returns the position of its cells in the image.

        Raises:
            GigamorphError: if the network has no global pooling, or images are split over processes.
        """
        return self.evidence_map(x, lambda outputs: column_of(outputs, output)).values

    @with_preconditions
    def evidence_map(self, x: Tensor | PixelSource | PixelBatch | Sequence[PixelSource], score: Score) -> Evidence:
        """`evidence` for any score of the outputs, with the outputs and the position of its cells in the image.

        Args:
            x: an image batch as for `forward`, all of one size.
            score: differentiable function (N, outputs) -> (N,) of the network's first output tensor.

        Raises:
            GigamorphError: if the network has no global pooling, or images are split over processes.
        """
        self._need_all_rows("evidence")
        # In a recording without gradients, tensors written in place would not get a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            call = self._call(as_batch(x))
            return evidence_of_call(call, score, lambda: self._compute(_forward, call))

    def _need_all_rows(self, name: str) -> None:
        """Raise an error that names the caller if images are split over several processes."""
        if self.split is not None:
            raise GigamorphError(f"{name} needs all rows of a map; accelerate the model again without split")


def _forward(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return network(*args, **kwargs)


class AcceleratedContainer(Container, Accelerated):
    """An accelerated `nn.Sequential` or other container, which also has a length and items."""


class AcceleratedWithState(ExtraState, Accelerated):
    """An accelerated network with `get_extra_state`."""


class AcceleratedContainerWithState(ExtraState, AcceleratedContainer):
    """An accelerated container with `get_extra_state`."""


def _class_for(model: nn.Module) -> type[Accelerated]:
    if is_container(model):
        return AcceleratedContainerWithState if has_extra_state(model) else AcceleratedContainer
    return AcceleratedWithState if has_extra_state(model) else Accelerated


def freeze_batch_norm(model: nn.Module) -> None:
    """Put every BatchNorm in evaluation mode, with fixed statistics; its affine parameters still learn."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
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

    The result shares the parameters of `model` and has the same `state_dict` keys. It works with `loss.backward()`,
    autocast, gradient accumulation, DDP and Lightning like the network itself.

    Args:
        model: any network whose layers are local (convolutions, pooling, pointwise, frozen norms) up to a reduction
            over the image (global pooling). Any layers may follow the reduction.
        memory_budget: bytes for one step (``"4GiB"``), including parameters and gradients. The budget is used fully:
            tiles whose graph still fits are not recomputed in the backward. None uses the free memory of a GPU. On the
            CPU, a training step is computed on the whole image if the image is channels-last or small, and stock
            PyTorch's step needs at most a fifth of the free memory, or five sixths of the budget. Otherwise, and in
            inference, None uses what the preferred tile needs. It raises an error only if the free memory is exceeded.
        tile: side, or (height, width), of a tile in image pixels; None lets the plan choose.
        batch_norm: ``"frozen"`` holds every BatchNorm in evaluation mode, also after `train()`.
        halos: where the halos between tiles are stored for the backward: ``"device"``, ``"host"``, ``"disk"``, or
            ``"auto"``, the first of these that the budget allows.
        fallback: ``"untiled"`` computes ops that cannot run tile by tile (a mirrored map, causal attention) on their
            whole maps, with the memory that this takes; None refuses these networks.
        split: compute each image on several processes, each of which computes a band of rows. Pass a process group of
            `torch.distributed`, or True for all processes. Every process has the same weights, gets the same images
            and reads the rows that it needs; it returns the outputs and gradients of the whole image. The budget is
            per process.
        verify: compare two steps with ordinary PyTorch, on copies of the network in float64 and small images: outputs,
            gradients, buffers, attributes and the image itself. This happens now if the first convolution determines
            the image's channels, else at the first image; and again at the first image in each mode (`train()`,
            `eval()`).

    Raises:
        GigamorphError: for invalid arguments, or if `verify` finds a difference. Networks that cannot be computed
            exactly raise an `UnsupportedError` at the first image, before any work.
    """
    if isinstance(model, Accelerated):
        raise GigamorphError("the model is already accelerated; call accelerate once")
    check_network(model)
    check_choice("batch_norm", batch_norm, ("frozen", None))
    fallback = check_storage(halos, fallback)
    if not isinstance(verify, bool):
        raise GigamorphError(f"verify must be True or False, not {verify!r}")
    warn_of_newer()
    load_recorder()
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    if hidden := [name for name in _NAMES if hasattr(model, name)]:
        log.warning(
            "%s has an attribute %s too, which the accelerated network hides; read and set it on the network itself",
            type(model).__name__,
            ", ".join(hidden),
        )
    net = _class_for(model)(model, budget, tile_sides(tile), batch_norm, halos, fallback, split or None)
    if verify:
        net._checked = set()
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None:
            with contextlib.suppress(CannotVerify):  # the convolution may follow a reshape of the image
                net._check((first.in_channels,), net._device())
    return net
