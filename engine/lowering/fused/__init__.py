"""What `gigamorph.kernels` computes of a graph: neighbouring ops become one op of the stage."""

from __future__ import annotations

from ..stages import Stage
from .conv import fuse_convolutions
from .layer_norm import fuse_layer_norms
from .masks import pass_masks
from .normalize import fuse_norms
from .pair import fuse_pairs
from .pool import take_pools
from .stem import fuse_stem


def fuse(stage: Stage, training: bool, image_grad: bool) -> None:
    """Give convolutions and norms with what follows them, and max-pooling, to the kernels.

    Args:
        training: whether there will be a backward.
        image_grad: whether the image will want a gradient.
    """
    convs, pools = fuse_convolutions(stage), take_pools(stage)
    fuse_layer_norms(stage, convs)
    norms = fuse_norms(stage, convs)
    if not image_grad:
        fuse_stem(stage, convs, pools)
    if training:
        pass_masks(stage, convs, pools, norms)
    else:
        fuse_pairs(stage, convs)
