"""Losses and outputs of networks that return a map, without the whole map in memory.

A loss is recorded together with the network, and the labels are a further source of the stage: each tile reads its
labels, computes its logits, and adds to the sums of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from .accelerate import Accelerated
from .capture.dynamo import stand_in
from .errors import GigamorphError
from .execution.forward import Forward
from .execution.image_batch import ImageTensor
from .execution.run import run
from .images.batches import Criterion, LabelSource, PixelBatch, as_batch, with_loss
from .images.pixels import PixelSource
from .module.preconditions import with_preconditions
from .tiling.map_files import sink
from .torch_private import tree_flatten, tree_leaves

Images = Tensor | PixelSource | PixelBatch | Sequence[PixelSource]


@with_preconditions
def dense_loss(net: Accelerated, x: Images, labels: Any, criterion: Criterion) -> Any:
    """Compute `criterion(net(x), labels)` with all gradients, for a network that returns maps.

    The whole maps are never in memory, nor are the whole labels unless they are tensors. Under DDP, call this function
    in the forward of the module that DDP wraps.

    Args:
        net: the network; its output may be a map or any tree of maps and vectors.
        x: an image batch as for the network, all of one size.
        labels: a tensor, array, memory map or zarr array, or any object with a `shape` and `read(top, bottom, left,
            right)`, whose last two axes are the image's; or a tuple, list or dict of those. The criterion gets them
            in their own shape, and integers as int64 unless they are tensors. A `PixelSource` counts as (1, C, H, W).
            Another thread reads regions in advance.
        criterion: a function or module in plain PyTorch, made of ops per pixel and sums, means or maxima over the
            image: cross-entropy, focal and Dice losses, regression. Its Python values (weights of terms) may change
            from call to call.

    Returns:
        The result of the criterion.

    Raises:
        GigamorphError: for invalid labels, or labels that do not fit the criterion; an `UnsupportedError` for a
            criterion that needs the whole map.
    """
    batch = as_batch(x)
    leaves, structure = tree_flatten(labels)
    given = [LabelSource(leaf) for leaf in leaves]
    call = net._call(batch)
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
    return net._compute(with_loss, call, criterion, structure)


@with_preconditions
def map_shape(net: Accelerated, x: Images) -> tuple[int, ...]:
    """The shape of the single map that a network returns for images, without computing it.

    Args:
        net: the network; its output is a single tensor.
        x: an image batch as for the network, all of one size.
    """
    opened = net._open(as_batch(x))
    program = opened.program
    shapes = [tuple(program.values[v].shape) for v in program.given_away()]
    if len(shapes) != 1:
        raise GigamorphError(f"the network must return a single map, but it returns {len(shapes)} tensors")
    return shapes[0]


@with_preconditions
def write_map(net: Accelerated, x: Images, out: Any, output: int = 0) -> None:
    """Compute a map that a network returns, equal to its ordinary output, and write it block by block.

    Args:
        net: the network.
        x: an image batch as for the network, all of one size.
        out: a tensor, numpy array, memory map or zarr array of the map's shape, which receives the values in its own
            dtype; or a path that ends in `.npy`, `.zarr` or (for one image) `.tif`, for a new file in the map's dtype.
            A TIFF stores (H, W, channels) in tiles.
        output: index of the tensor among those that the network returns.

    Raises:
        GigamorphError: if that output is not a map, `out` does not fit it, or images are split over processes.
    """
    net._need_all_rows("write_map")
    batch = as_batch(x)

    def compute_written(forward: Forward) -> list[Any]:
        network = forward.prepared.staged
        value = next(op for op in network.program.ops if op.name == "written").inputs[0]
        if value not in network.maps:
            raise GigamorphError(f"output {output} of the network is not a map; call the network itself")
        info, axes = network.program.values[value], network.maps.axes[value]
        with sink(out, tuple(info.shape), axes, info.dtype) as forward.observers[value]:
            run([forward])
        return forward.finish()

    with torch.no_grad():
        call = net._call(batch)
        call.finish = compute_written
        try:
            net._compute(_with_output_written, call, output)
        except IndexError as error:
            raise GigamorphError(f"output {output} does not exist; {error}") from error


def _with_output_written(network: nn.Module, output: int, image: Tensor) -> Tensor:
    found = [t for t in tree_leaves(network(image)) if isinstance(t, Tensor)]
    if not -len(found) <= output < len(found):
        raise IndexError("the network has no such output")
    return written(found[output])


def written(x: Tensor) -> Tensor:
    """Marks a map in a recording: its blocks are written as they are computed; see the rule of this name."""
    if has_torch_function_unary(x):
        return handle_torch_function(written, (x,), x)
    return x.new_empty(0, dtype=torch.float32)


torch.compiler.allow_in_graph(written)
