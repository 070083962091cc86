"""lightstream 1.0.7 (StreamingCNN; Pinckaers, van Ginneken, Litjens 2022) as a peer: used as it is, if installed.

Its constructor assumes CUDA and three channels; the statistics of a tile are therefore made where the network lies, by
its own class with the tile's true shape. Its norms are frozen and their affine parameters do not learn, as it asks for.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..capture.recording import record_call
from ..errors import BudgetError, UnsupportedError
from ..models.compat import make_torchvision_importable
from ..planning.simulate import stock_peak
from .ordinary import Prepared, autocast, first_tensor, loss_of
from .results import Task

# Pixels by which tiles overlap in the backward, both sides together: lightstream's own statistics. The best tile is the
# one with which the backward goes through the fewest pixels.
OVERLAPS = {"resnet18": 977, "resnet34": 1873, "resnet50": 881, "timm:vgg16": 372}
_MOST_WORK = 8  # times the image's pixels; where tiles that fit do more, the whole image is one tile
_LARGER = 1.12  # from one tile that is tried to the next
_LOW, _HIGH = 128, 256  # sides from which the memory of larger ones follows
_SMALL = 64  # side of the image on which a split is checked
_STEP = 32  # of the tiles that are tried: their sides must be multiples of the network's total stride


def trunk_names(network: nn.Module) -> list[str]:
    """The children that can be streamed: `features`, or all up to the last one with a convolution."""
    names = [name for name, _ in network.named_children()]
    if "features" in names:
        return ["features"]
    last = max(
        (n for n, child in enumerate(network.children()) if any(isinstance(m, nn.Conv2d) for m in child.modules())),
        default=-1,
    )
    return names[: last + 1]


def tiles_to_try(network: nn.Module, task: Task, budget: int) -> list[int]:
    """Tiles: the best that fits the budget; without one that does anything, larger ones until one does."""
    sides, fitting = _tiles(network, task, budget)
    overlap = _overlap(task)
    useful = [side for side in fitting if side >= overlap + _STEP]
    if overlap and useful:
        return [_best(useful, task) or sides[-1]]
    tries = [max(useful or fitting or sides[:1])]
    while tries[-1] < sides[-1]:
        tries.append(next((side for side in sides if side >= _LARGER * tries[-1]), sides[-1]))
    return [side for side in tries if side >= overlap + _STEP] or sides[-1:]


def tile_within(network: nn.Module, task: Task, budget: int) -> int:
    """The best tile that keeps to the budget.

    Raises:
        BudgetError: where all that fit leave nothing of the overlap, or do more than eight times the work.
    """
    _, fitting = _tiles(network, task, budget)
    overlap = _overlap(task)
    best = _best(fitting, task) if overlap else max(fitting, default=None)
    if best is None:
        raise BudgetError(
            f"no tile of lightstream's that fits {budget / 1e9:.2f} GB does less than {_MOST_WORK} times the work "
            f"(its overlap is {overlap} pixels); give it more memory"
        )
    return best


def _tiles(network: nn.Module, task: Task, budget: int) -> tuple[list[int], list[int]]:
    """All sides that leave no rest (lightstream's results are wrong otherwise), and those of them that fit.

    A tile's memory is counted as that of a step of stock PyTorch on an image of its size, beside the parameters.
    """
    n, channels, height, width = task.image
    sides = [
        side
        for side in range(_STEP, min(height, width) + 1, _STEP)
        if (height - side) % _STEP == 0 and (width - side) % _STEP == 0
    ]
    if not sides:
        raise UnsupportedError(f"no tile of whole strides ({_STEP}) divides {height} x {width} without a rest")
    parameters = sum(t.nbytes for t in network.state_dict().values())
    device = torch.device("cpu")
    with torch.set_grad_enabled(task.training):
        given = [record_call(network, (n, channels, side, side), torch.float32, device) for side in (_LOW, _HIGH)]
    low, high = (stock_peak(recording, device, task.training) for recording in given)
    pixel = (high - low) / (_HIGH**2 - _LOW**2)  # gradients of the parameters do not grow with the image
    return sides, [side for side in sides if parameters + high + pixel * (side**2 - _HIGH**2) <= budget]


def _overlap(task: Task) -> int:
    """0: not known, or none."""
    return OVERLAPS.get(task.model, 0) if task.training else 0


def _best(sides: list[int], task: Task) -> int | None:
    """The tile that goes through the fewest pixels; None if that is too many."""
    size, overlap = task.image[2:], _overlap(task)
    useful = [side for side in sides if side >= overlap + _STEP or side >= max(size)]
    best = min(useful, key=lambda side: work(side, overlap, size), default=None)
    return best if best is not None and work(best, overlap, size) <= _MOST_WORK * math.prod(size) else None


def work(side: int, overlap: int, size: tuple[int, ...]) -> int:
    """Pixels that the backward goes through in tiles of a side; an image no larger than a tile has no overlap."""
    own = (side - overlap) // _STEP * _STEP
    return math.prod(side if n <= side else -(-(n - overlap) // own) * side for n in size)


def norm_parameters(network: nn.Module) -> list[str]:
    """The parameters that lightstream does not train."""
    return [
        f"{name}.{parameter}"
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter, _ in module.named_parameters()
    ]


def streaming_step(network: nn.Module, task: Task, tile: int) -> Prepared:
    """A step by lightstream with square tiles of a side.

    Raises:
        UnsupportedError: if lightstream cannot be built for this network and tile.
    """
    make_torchvision_importable()  # lightning, which lightstream imports, imports it
    from lightstream.core.constructor import StreamingConstructor  # pyright: ignore[reportMissingImports]
    from lightstream.core.scnn.scnn import StreamingCNN  # pyright: ignore[reportMissingImports]

    channels = task.image[1]
    names = trunk_names(network)
    trunk = nn.Sequential(OrderedDict((name, network.get_submodule(name)) for name in names))
    for module in trunk.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)
    head = copy.copy(network)
    head._modules = {name: nn.Identity() if name in names else m for name, m in network._modules.items()}
    _check_split(network, trunk, head, channels)
    device = next(network.parameters()).device
    with contextlib.redirect_stdout(io.StringIO()):
        constructor = StreamingConstructor(
            trunk,
            tile,
            verbose=False,
            copy_to_gpu=False,
            statistics_on_cpu=True,
            normalize_on_gpu=False,
            add_keep_modules=[nn.BatchNorm2d],
        )
        constructor.create_streaming_model = lambda: StreamingCNN(
            constructor.model, tile_shape=(1, channels, tile, tile), copy_to_gpu=False, statistics_on_cpu=False
        )
        streaming = constructor.prepare_streaming_model()
    assert isinstance(streaming, StreamingCNN)
    streaming.device = device
    streaming.dtype = torch.bfloat16 if task.precision == "bf16" else next(trunk.parameters()).dtype
    lost = streaming.tile_gradient_lost
    if tile < max(task.image[2:]) and tile - lost.top - lost.bottom < int(streaming.output_stride[1]):
        raise UnsupportedError(
            f"a tile of {tile} leaves nothing of lightstream's overlap of {lost.top + lost.bottom} pixels"
        )
    # The caller's network: its parameters are those that learn.
    for name in names:
        network._modules[name] = streaming.stream_module.get_submodule(name)

    def infer(image: Tensor) -> Tensor:
        with torch.no_grad(), autocast(task):
            return first_tensor(head(streaming(image)))

    def train(image: Tensor) -> Tensor:
        if not task.accumulate:
            network.zero_grad(set_to_none=True)
        with autocast(task):
            middle = streaming(image).requires_grad_()
            output = first_tensor(head(middle))
        loss_of(output).backward()
        streaming.backward(image, middle.grad)
        return output.detach()

    return streaming, train if task.training else infer


def _check_split(network: nn.Module, trunk: nn.Module, head: nn.Module, channels: int) -> None:
    """Refuse a network whose forward does more than go through its children."""
    parameter = next(network.parameters())
    image = torch.rand(1, channels, _SMALL, _SMALL, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        if not torch.equal(first_tensor(head(trunk(image))), first_tensor(network(image))):
            raise UnsupportedError("the network is no sequence of a streamed part and a head")
