"""Maps of where an output comes from, computed by tiles, equal to those of the whole image."""

from __future__ import annotations

from ..accelerate import Accelerated
from ..images.pixels import PixelSource
from ..train.explanation import Explanation, explain_class, explain_gradient

__all__ = ["Explanation", "activation_map", "explain_gradient", "gradient_map"]


def activation_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Class activation: what each place of the last map before the global pooling adds to the log-odds of a class.

    See `explain_class`. Two inference passes by tiles.

    Args:
        net: its output is (1, classes).
        output: index of the class.

    Raises:
        GigamorphError: as `Accelerated.evidence`.
    """
    net.eval()
    return explain_class(net, source, output)[0]


def gradient_map(net: Accelerated, source: PixelSource, output: int) -> Explanation:
    """Saliency of every pixel: the largest absolute gradient of the log-odds of a class over the channels.

    Simonyan et al., 2014, who take the logit; the log-odds are what of it counts. A forward and a backward by tiles.
    The image and its gradient are held whole in host memory, 8 bytes a value in float32 together; no map of the network
    is.

    Args:
        net: its output is (1, classes).
        output: index of the class.

    Raises:
        GigamorphError: if the output does not exist.
    """
    return explain_gradient(net, source, output)[0]
