"""Networks whose output is a map: losses on it, and the map itself, without holding it whole.

A loss is recorded together with the network, the labels being one more source of the stage: each tile reads its own
labels, computes its own logits, and adds to the sums that the loss is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils._pytree import tree_flatten, tree_leaves

from .accelerate import Accelerated
from .capture.dynamo import stand_in
from .errors import GigamorphError
from .execution.forward import Forward
from .execution.image_batch import ImageTensor
from .execution.run import run
from .images.batches import PixelBatch, as_batch
from .images.labels import Criterion, Labels, with_loss
from .images.pixels import PixelSource
from .module.preconditions import entrance
from .tiling.map_files import sink

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
    call = net.call(batch)
    device = net._device()
    tensors = list[Tensor]()
    for each in given:
        tensor = each.values
        if not isinstance(tensor, Tensor) or tensor.device != device:
            tensor = stand_in(each.shape, each.dtype, device)
            call.regions[id(tensor)] = ImageTensor(each.values) if isinstance(each.values, Tensor) else each
        call.roles[id(tensor)] = "map"
        tensors.append(tensor)
    call.args = (*call.args, *tensors)
    return net.compute(with_loss, call, criterion, structure)


@entrance
def map_shape(net: Accelerated, x: Images) -> tuple[int, ...]:
    """The shape of the one map that a network gives of images; nothing is computed.

    Args:
        net: the network; its output is a single tensor.
        x: an image batch as for the network, all of one size.
    """
    opened = net.open(as_batch(x))
    program = opened.program
    shapes = [tuple(program.values[v].shape) for v in program.given_away()]
    if len(shapes) != 1:
        raise GigamorphError(f"the network returns {len(shapes)} tensors, not one map")
    return shapes[0]


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

    def compute_written(forward: Forward) -> list[Any]:
        network = forward.prepared.staged
        value = next(op for op in network.program.ops if op.name == "written").inputs[0]
        if value not in network.maps:
            raise GigamorphError(f"output {output} of the network is no map, but a small tensor; call the network")
        info, axes = network.program.values[value], network.maps.axes[value]
        with sink(out, tuple(info.shape), axes, info.dtype) as forward.observers[value]:
            run([forward])
        return forward.finish()

    with torch.no_grad():
        call = net.call(batch)
        call.finish = compute_written
        try:
            net.compute(_with_output_written, call, output)
        except IndexError as error:
            raise GigamorphError(f"output {output} does not exist; {error}") from error


def _with_output_written(network: nn.Module, output: int, image: Tensor) -> Tensor:
    found = [t for t in tree_leaves(network(image)) if isinstance(t, Tensor)]
    if not -len(found) <= output < len(found):
        raise IndexError("the network has no such output")
    return written(found[output])


def written(x: Tensor) -> Tensor:
    """Recorded where a map's blocks shall be written as they are made; see the rule of this name."""
    if has_torch_function_unary(x):
        return handle_torch_function(written, (x,), x)
    return x.new_empty(0, dtype=torch.float32)


torch.compiler.allow_in_graph(written)
