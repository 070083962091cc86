"""What `gigamorph.kernels` computes of a graph: neighbouring ops become one op of the sweep."""

from __future__ import annotations

from ..graph import Graph
from .batch_norm import fuse_batch_norms
from .conv import fuse_convolutions
from .layer_norm import fuse_layer_norms
from .masks import pass_masks
from .pair import fuse_pairs
from .pool import take_pools
from .stem import fuse_stem


def fuse(graph: Graph, training: bool, image_grad: bool) -> None:
    """Give convolutions and norms with what follows them, and max-pooling, to the kernels.

    Args:
        training: whether there will be a backward.
        image_grad: whether the image will want a gradient.
    """
    convs, pools = fuse_convolutions(graph), take_pools(graph)
    fuse_layer_norms(graph, convs)
    fuse_batch_norms(graph, convs)
    if not image_grad:
        fuse_stem(graph, convs, pools)
    if training:
        pass_masks(graph, convs, pools)
    else:
        fuse_pairs(graph, convs)
