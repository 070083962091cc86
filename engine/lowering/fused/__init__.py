"""Fuses neighbouring ops of a stage into single ops that `gigamorph.kernels` computes."""

from __future__ import annotations

from ..stages import ProgramStage
from .conv import fuse_convolutions
from .layer_norm import fuse_layer_norms
from .masks import pass_masks
from .normalize import fuse_norms
from .pool import take_pools
from .stem import fuse_stem


def fuse(stage: ProgramStage, training: bool, image_grad: bool) -> None:
    """Replace convolutions and norms, with the ops after them, and max-pooling by kernels.

    Args:
        training: whether there will be a backward.
        image_grad: whether the image needs a gradient.
    """
    convs, pools = fuse_convolutions(stage), take_pools(stage)
    fuse_layer_norms(stage, convs)
    norms = fuse_norms(stage, convs)
    if not image_grad:
        fuse_stem(stage, convs, pools)
    if training:
        pass_masks(stage, convs, pools, norms)
