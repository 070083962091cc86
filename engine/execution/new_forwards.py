"""Creates forwards from the current parameters and buffers; nothing is computed yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..parallel.processes import check_same_steps
from ..tiling.memory_limit import MemoryLimit
from ..tiling.scan import Pixels, TileEvent
from .forward import Forward
from .image_batch import ImageTensor
from .prepared import Prepared
from .programs import GraphInputs


def begin(
    inputs: Sequence[GraphInputs],
    prepared: Sequence[Prepared],
    on_tile: Callable[[TileEvent], None] | None,
    regions: Mapping[int, Pixels] | None = None,
    together: MemoryLimit | None = None,
) -> list[Forward]:
    """Create a forward for each image batch.

    Args:
        inputs: the inputs of the graph for each batch.
        prepared: the prepared program for each batch.
        on_tile: called after each tile.
        regions: by the index of an input, the source that is read by region instead of its tensor.
        together: see `Forward.keep_to_plan`.
    """
    first, regions = prepared[0], regions or {}
    if inputs[0].image.training:
        groups = dict.fromkeys(op.group for op in first.staged.program.ops if op.group is not None)
        check_same_steps(groups, first.order, inputs[0].image.device)
    forwards = []
    for each, ready in zip(inputs, prepared, strict=True):
        one, program = each.image, ready.staged.program
        image, pixels = one.image, one.pixels
        read = {v: regions[place] for v, place in program.bound.items() if place in regions and v in program.inputs}
        kept = {v: each.flat[place] for v, place in program.bound.items() if v not in read and v != program.image}
        tensors = {v: kept[v] for v in (*program.inputs, *program.vectors) if v in kept}
        kept.update((v, value.constant) for v, value in enumerate(program.values) if value.constant is not None)
        written = {v for v, _ in program.updates}
        _refuse_shared(written, tensors if image is None else {**tensors, program.image: image}, kept)
        state = {v: _for_backward(t) for v, t in kept.items()}
        targets = {v: kept[v] for v in written if v in kept}
        # Tensors that are written at the end of the call may be read in its backward.
        state.update((v, state[v].clone()) for v in written & ready.kept_for_backward if v in state)
        if program.image in written and image is not None:
            targets[program.image], image = image, image.clone()
            pixels = ImageTensor(image)
        forwards.append(Forward(ready, image, pixels, one.device, one.dtype, state, on_tile, read, targets))
        forwards[-1].passed.update((v, t) for v, t in kept.items() if state[v] is not t and v not in written)
        forwards[-1].keep_to_plan(together)
        together = forwards[-1].memory_limit
    return forwards


def _refuse_shared(written: set[int], arguments: Mapping[int, Tensor], kept: Mapping[int, Tensor]) -> None:
    """Raise an error if a written argument shares memory with another tensor, because recordings separate them.

    Raises:
        UnsupportedError: with the shape of the argument.
    """
    for value in written & arguments.keys():
        one = arguments[value]
        for other in (*arguments.values(), *kept.values()):
            if other is not one and _share(one, other):
                raise UnsupportedError(
                    f"the forward writes to an argument of shape {list(one.shape)} that shares memory with another "
                    f"tensor of the call, of shape {list(other.shape)}; pass a clone of one of them"
                )


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether the memory ranges of two tensors, from the first to the last element, overlap."""
    if one.device != other.device or other.layout is not torch.strided or not one.numel() or not other.numel():
        return False

    def ends(tensor: Tensor) -> tuple[int, int]:
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize

    (first, end), (start, last) = ends(one), ends(other)
    return first < last and start < end


def _for_backward(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of an inference tensor, because autograd cannot save those."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
