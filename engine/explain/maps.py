"""Maps of where an output comes from, computed by tiles, equal to those of the whole image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..accelerate import Accelerated
from ..images.pixels import PixelSource
from ..models.outputs import outputs_of
from ..train.explanation import Explanation, class_of, explain_class, log_odds_of

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


def explain_gradient(net: Accelerated, source: PixelSource, which: int | None) -> tuple[Explanation, Tensor, int]:
    """`gradient_map` of a class, with the logits (classes,) and the class; None takes it as `explain_class` does."""
    net.eval()
    _, height, width = source.shape
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    image = source.read(0, height, 0, width)[None].to(dtype).requires_grad_()
    with _frozen(net), torch.enable_grad():
        found = next(t for t in tree_leaves(net(image)) if isinstance(t, Tensor)).reshape(1, -1)
        heads = outputs_of(net)
        number = class_of(found, which, heads)
        (gradient,) = torch.autograd.grad(log_odds_of(found, number, heads)[0], image)
    return Explanation(source, gradient[0].abs().amax(0)), found[0].detach(), number


@contextlib.contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """No gradients of parameters, which would cost time and memory."""
    wanted = [p for p in net.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
