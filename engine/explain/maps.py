"""Explanation maps of an output, computed by tiles and equal to untiled maps."""

from __future__ import annotations

from ..accelerate import Accelerated
from ..images.pixels import PixelSource
from ..train.explanation import Explanation, explain_class, explain_gradient

__all__ = ["Explanation", "activation_map", "explain_gradient", "gradient_map"]


def activation_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Class activation map: the contribution of each cell of the last map before pooling to the log-odds of a class.

    See `explain_class`. It takes two tiled inference passes.

    Args:
        net: its output is (1, classes).
        source: the image.
        output: index of the class.

    Raises:
        GigamorphError: see `Accelerated.evidence`.
    """
    net.eval()
    return explain_class(net, source, output)[0]


def gradient_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Saliency of every pixel: the maximum over channels of the absolute gradient of the log-odds of a class.

    It follows Simonyan et al., 2014, with log-odds instead of the logit. It takes a tiled forward and backward. The
    image and its gradient are in host memory, together 8 bytes per value in float32; maps of the network are not.

    Args:
        net: its output is (1, classes).
        source: the image.
        output: index of the class.

    Raises:
        GigamorphError: if the output does not exist.
    """
    return explain_gradient(net, source, output)[0]
