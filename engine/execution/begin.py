"""Forwards on the parameters and buffers as they are now, nothing of them computed yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..capture.trace import Program
from ..errors import UnsupportedError
from ..parallel.processes import check_same_steps
from ..tiling.memory_limit import MemoryLimit
from ..tiling.page_pool import PagePool
from ..tiling.scan import Pixels, TileEvent
from .forward import Forward
from .image_batch import ImageBatch, ImageTensor
from .prepared import Prepared


def begin(
    network: nn.Module,
    images: Sequence[ImageBatch],
    prepared: Sequence[Prepared],
    page_pool: PagePool,
    on_tile: Callable[[TileEvent], None] | None,
    given: Sequence[Tensor | Pixels] = (),
    vectors: Sequence[Tensor] = (),
    together: MemoryLimit | None = None,
) -> list[Forward]:
    """A forward for each image batch.

    Args:
        network: whose parameters and buffers they read.
        prepared: its program for each batch.
        page_pool: pages of maps that are gone.
        on_tile: called after each tile.
        given: the further maps that the call takes.
        vectors: the further tensors without image axes.
        together: see `Forward.keep_to_plan`.
    """
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
        kept = {**_bind_state(network, program), **tensors}
        written = {v for v, _ in program.updates}
        _refuse_shared(written, tensors if image is None else {**tensors, program.image: image}, kept)
        state = {v: _for_backward(t) for v, t in kept.items()}
        regions = {v: t for v, t in inputs.items() if not isinstance(t, Tensor)}
        targets = {v: kept[v] for v in written if v in kept}
        # What is written to at the end of the call may be read in its backward.
        state.update((v, state[v].clone()) for v in written & ready.kept_for_backward if v in state)
        if program.image in written and image is not None:
            targets[program.image], image = image, image.clone()
            pixels = ImageTensor(image)
        forwards.append(Forward(ready, image, pixels, one.device, one.dtype, state, on_tile, regions, targets))
        forwards[-1].passed.update((v, t) for v, t in kept.items() if state[v] is not t and v not in written)
        forwards[-1].keep_to_plan(page_pool, together)
        together = forwards[-1].memory_limit
    return forwards


def _refuse_shared(written: set[int], arguments: Mapping[int, Tensor], kept: Mapping[int, Tensor]) -> None:
    """Refuse to write to an argument in whose memory another tensor of the call lies: a recording has them apart.

    Raises:
        UnsupportedError: with the shape of the argument.
    """
    for value in written & arguments.keys():
        one = arguments[value]
        for other in (*arguments.values(), *kept.values()):
            if other is not one and _share(one, other):
                raise UnsupportedError(
                    f"the forward writes to an argument of shape {list(one.shape)} that shares memory with another "
                    f"tensor of the call, of shape {list(other.shape)}; give a clone of one of them"
                )


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether the memory from a tensor's first to its last element is in part another's."""
    if one.device != other.device or other.layout is not torch.strided or not one.numel() or not other.numel():
        return False

    def ends(tensor: Tensor) -> tuple[int, int]:
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize

    (first, end), (start, last) = ends(one), ends(other)
    return first < last and start < end


def _bind_state(network: nn.Module, program: Program) -> dict[int, Tensor]:
    """The parameters, buffers and constants of the program as they are now."""
    if program.places is None:
        program.places = _places(network, program)
    env = {number: getattr(module, kind)[key] for number, module, kind, key in program.places}
    for number, value in enumerate(program.values):
        if value.constant is not None and value.name is None:
            env[number] = value.constant if value.find is None else value.find()
    return env


def _places(network: nn.Module, program: Program) -> list[tuple[int, nn.Module, str, str]]:
    """The number of each parameter and buffer, and where it is; the guard sees to it that the modules stay the same."""
    modules, found = dict(network.named_modules(remove_duplicate=False)), []
    for number, value in enumerate(program.values):
        if value.name is not None:
            path, _, key = value.name.rpartition(".")
            module = modules[path]
            found.append((number, module, "_parameters" if key in module._parameters else "_buffers", key))
    return found


def _for_backward(tensor: Tensor) -> Tensor:
    """The tensor; one that was made in inference mode cannot be kept for a backward, but its copy can."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
