"""Networks whose output is a map: losses on it, and the map itself, without holding it whole.

A loss is recorded together with the network, the labels being one more source of the stage: each tile reads its own
labels, computes its own logits, and adds to the sums that the loss is made of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from .accelerate import Accelerated
from .capture.program import Given
from .capture.trace import Program, Ref, capture
from .capture.trees import realize
from .errors import GigamorphError
from .execution.branches import following
from .execution.programs import Form
from .execution.run import compute, run
from .images.batches import PixelBatch, as_batch
from .images.labels import Criterion, Labels, loss_of, with_loss
from .images.pixels import PixelSource
from .module.entrance import entrance
from .tiling.map_files import sink

_REMEMBERED = 16
_OUTPUTS: WeakKeyDictionary[nn.Module, OrderedDict[Any, Any]] = WeakKeyDictionary()
Images = Tensor | PixelSource | PixelBatch | Sequence[PixelSource]


@entrance
def dense_loss(net: Accelerated, x: Images, labels: Any, criterion: Criterion) -> Any:
    """A loss of a network's maps: equal, with all gradients, to `criterion(net(x), labels)`.

    Neither the maps nor (unless they are tensors) the labels are ever whole. To use it under DDP, call it in the
    forward of the module that DDP wraps.

    Args:
        net: the network; its output may be a map or any tree of maps and vectors.
        x: an image batch as for the network, all of one size.
        labels: a tensor, array, memory map or zarr array, or anything with a `shape` and `read(top, bottom, left,
            right)`, whose last two axes are the image's; or a tuple, list or dict of those. The criterion gets them
            in their own shape; integers that are not in a tensor as int64. A `PixelSource` counts as (1, C, H, W).
            Regions are read ahead, in another thread.
        criterion: a function or module in plain PyTorch, made of ops per pixel and sums, means or maxima over the
            image: cross-entropy, focal and Dice losses, regression. What it takes as Python values (weights of terms)
            may change from call to call.

    Returns:
        What the criterion returns.

    Raises:
        GigamorphError: for labels that are not understood or do not fit the criterion; an `UnsupportedError` for a
            criterion that needs the whole map.
    """
    batch = as_batch(x)
    leaves, structure = tree_flatten(labels)
    given = [Labels(leaf) for leaf in leaves]
    specs = tuple(Given(each.shape, each.dtype) for each in given)
    device = net._device()
    dtype = batch.dtype if isinstance(batch, Tensor) else next((p.dtype for p in net.parameters()), torch.float32)
    shapes = _outputs(net, tuple(batch.shape), dtype, device)

    key = ("loss", specs, str(structure), _fingerprint(shapes, specs, device, criterion, structure))
    call = partial(with_loss, net._network, criterion, structure)
    values = [each.values if isinstance(each.values, Tensor) else each for each in given]
    return following(lambda branches: compute(net._open(batch, Form(key, call, specs), values, branches=branches)))


@entrance
def map_shape(net: Accelerated, x: Images) -> tuple[int, ...]:
    """The shape of the one map that a network gives of images; nothing is computed.

    Args:
        net: the network; its output is a single tensor.
        x: an image batch as for the network, all of one size.
    """
    batch = as_batch(x)
    dtype = batch.dtype if isinstance(batch, Tensor) else next((p.dtype for p in net.parameters()), torch.float32)
    return _outputs(net, tuple(batch.shape), dtype, net._device()).shape


@entrance
def write_map(net: Accelerated, x: Images, out: Any, output: int = 0) -> None:
    """Compute a map that a network returns, equal to its ordinary output, and write it block by block.

    Args:
        net: the network.
        x: an image batch as for the network, all of one size.
        out: a tensor, numpy array or memory map, or zarr array of the map's shape, which gets the map's values in its
            own dtype; or a path that ends in `.npy`, `.zarr` or (of one image) `.tif`, for a new file in the map's
            dtype. A TIFF has (H, W, channels) in tiles.
        output: which of the tensors that the network returns.

    Raises:
        GigamorphError: if that output is no map, or `out` does not fit it, or images are split over processes.
    """
    net.need_all_rows("write_map")
    batch = as_batch(x)

    def with_output_written(image: Tensor) -> Tensor:
        found = [t for t in tree_leaves(net._network(image)) if isinstance(t, Tensor)]
        if not -len(found) <= output < len(found):
            raise GigamorphError(f"output {output} does not exist; the network has {len(found)}")
        return written(found[output])

    def attempt(branches: tuple[bool, ...]) -> None:
        forward = net._open(batch, Form(("written", output), with_output_written), branches=branches)
        network = forward.prepared.staged
        value = next(op for op in network.program.ops if op.name == "written").inputs[0]
        if value not in network.maps:
            raise GigamorphError(f"output {output} of the network is no map, but a small tensor; call the network")
        info, axes = network.program.values[value], network.maps.axes[value]
        with sink(out, tuple(info.shape), axes, info.dtype) as forward.observers[value]:
            run([forward])
            forward.supposed.check(forward.env)  # else what was written is taken back
        forward.finish()

    with torch.no_grad():
        following(attempt)


def written(x: Tensor) -> Tensor:
    """Recorded where a map's blocks shall be written as they are made; see the rule of this name."""
    if has_torch_function_unary(x):
        return handle_torch_function(written, (x,), x)
    return x.new_empty(0, dtype=torch.float32)


def _outputs(net: Accelerated, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """What the network returns for an image size, with (shape, dtype) in place of tensors."""
    known = _OUTPUTS.setdefault(net, OrderedDict())
    key = (shape, dtype, device, torch.is_grad_enabled())
    if key not in known or not known[key][0].holds():
        program = capture(net._network, shape, dtype, device, branches=())
        values = program.values
        known[key] = (
            program.guard,
            tree_map(
                lambda leaf: (
                    _Shape(tuple(values[leaf.value].shape), values[leaf.value].dtype) if isinstance(leaf, Ref) else leaf
                ),
                program.output,
            ),
        )
        if len(known) > _REMEMBERED:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key][1]


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: torch.dtype


# A partial of a function and not a closure, so that a recording finds what the criterion depends on.
def _loss_alone(criterion: Criterion, structure: TreeSpec, leaves: list[Any], form: TreeSpec, *tensors: Tensor) -> Any:
    """The criterion on the network's outputs, which come before the labels; `leaves` tells where they are."""
    left = iter(tensors)
    result = [next(left) if isinstance(leaf, _Shape) else leaf for leaf in leaves]
    outputs = realize(tree_unflatten(result, form), {})
    return loss_of(criterion, structure, outputs, *left)


def _fingerprint(
    outputs: Any,
    labels: Sequence[Given],
    device: torch.device,
    criterion: Criterion,
    structure: TreeSpec,
) -> str:
    """What a criterion does now: all it calls, with all Python values.

    A function that is made anew for each step, or that looks at values which change, is thus recorded again if and
    only if it does something else. Tensors that it holds are told by their identity: the program keeps them alive; so
    is a criterion that changes something.
    """
    leaves, form = tree_flatten(outputs)
    first, *others = [leaf for leaf in leaves if isinstance(leaf, _Shape)]
    inputs = [Given(each.shape, each.dtype) for each in others] + list(labels)
    call = partial(_loss_alone, criterion, structure, leaves, form)
    try:
        program = capture(nn.Module(), first.shape, first.dtype, device, call, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise GigamorphError(
            f"the criterion does not take an output of shape {first.shape} and labels of "
            f"{', '.join(str(shape) for shape, *_ in labels)}: {str(error).splitlines()[0]}"
        ) from error
    changes = bool(program.effects or program.updates)
    return repr([_described(program), program.output, id(criterion) if changes else None])


def _described(program: Program) -> list[Any]:
    # An array's text is shortened, its bytes are not.
    exact = lambda leaf: leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf  # noqa: E731
    calls = [(op.name, *tree_map(exact, (op.args, op.kwargs)), op.autocast) for op in program.ops]
    constants = [(v, id(value.constant)) for v, value in enumerate(program.values) if value.constant is not None]
    return [calls, constants]
