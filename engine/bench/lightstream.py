"""lightstream 1.0.7 (StreamingCNN; Pinckaers, van Ginneken, Litjens 2022) as a peer, if installed.

Its constructor assumes CUDA and three channels. Therefore its own class computes the statistics of a tile on the
network's device with the tile's true shape. As it requires, norms are frozen and their affine parameters not trained.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..capture.recording import capture
from ..errors import BudgetError, UnsupportedError
from ..models.compat import make_torchvision_importable
from ..planning.simulate import stock_peak
from ..torch_private import BatchNorm
from .ordinary import Prepared, autocast, first_tensor, loss_of
from .results import BenchTask

# Pixels by which tiles overlap in the backward, both sides together, from lightstream's own statistics. The best tile
# processes the fewest pixels in the backward.
OVERLAPS = {"resnet18": 977, "resnet34": 1873, "resnet50": 881, "timm:vgg16": 372}
_MAX_WORK = 8  # times the image's pixels; above it, the whole image is one tile
_GROWTH = 1.12  # ratio of two candidate tiles
_LOW, _HIGH = 128, 256  # sides from which the memory of larger tiles is extrapolated
_SMALL = 64  # side of the image that checks the split
_STEP = 32  # between candidate tiles: multiples of the network's total stride


def trunk_names(network: nn.Module) -> list[str]:
    """Return the children that can be streamed: `features`, or all up to the last one with a convolution."""
    names = [name for name, _ in network.named_children()]
    if "features" in names:
        return ["features"]
    last = max(
        (n for n, child in enumerate(network.children()) if any(isinstance(m, nn.Conv2d) for m in child.modules())),
        default=-1,
    )
    return names[: last + 1]


def tiles_to_try(network: nn.Module, task: BenchTask, budget: int) -> list[int]:
    """Return the best tile within the budget; if none has useful pixels, larger candidates in ascending order."""
    sides, fitting = _tiles(network, task, budget)
    overlap = _overlap(task)
    useful = [side for side in fitting if side >= overlap + _STEP]
    if overlap and useful:
        return [_best(useful, task) or sides[-1]]
    tries = [max(useful or fitting or sides[:1])]
    while tries[-1] < sides[-1]:
        tries.append(next((side for side in sides if side >= _GROWTH * tries[-1]), sides[-1]))
    return [side for side in tries if side >= overlap + _STEP] or sides[-1:]


def tile_within(network: nn.Module, task: BenchTask, budget: int) -> int:
    """Return the best tile within the budget.

    Raises:
        BudgetError: tiles that fit consist of overlap only, or do more than eight times the work.
    """
    _, fitting = _tiles(network, task, budget)
    overlap = _overlap(task)
    best = _best(fitting, task) if overlap else max(fitting, default=None)
    if best is None:
        raise BudgetError(
            f"no lightstream tile within {budget / 1e9:.2f} GB does less than {_MAX_WORK} times the work "
            f"(its overlap is {overlap} pixels); increase the memory"
        )
    return best


def _tiles(network: nn.Module, task: BenchTask, budget: int) -> tuple[list[int], list[int]]:
    """Return all sides that tile the image without remainder (other results are wrong), and those within the budget.

    A tile's memory is that of a stock PyTorch step on an image of its size, plus the parameters.
    """
    n, channels, height, width = task.image
    sides = [
        side
        for side in range(_STEP, min(height, width) + 1, _STEP)
        if (height - side) % _STEP == 0 and (width - side) % _STEP == 0
    ]
    if not sides:
        raise UnsupportedError(f"no tile of whole strides ({_STEP}) divides {height} x {width} without remainder")
    parameters = sum(t.nbytes for t in network.state_dict().values())
    with torch.set_grad_enabled(task.training):
        programs = [capture(network, (n, channels, side, side), torch.float32, "cpu") for side in (_LOW, _HIGH)]
    low, high = (stock_peak(program, task.training) for program in programs)
    pixel = (high - low) / (_HIGH**2 - _LOW**2)  # gradients of the parameters do not grow with the image
    return sides, [side for side in sides if parameters + high + pixel * (side**2 - _HIGH**2) <= budget]


def _overlap(task: BenchTask) -> int:
    """Return the overlap of tiles; 0 if it is unknown or zero."""
    return OVERLAPS.get(task.model, 0) if task.training else 0


def _best(sides: list[int], task: BenchTask) -> int | None:
    """Return the tile that processes the fewest pixels; None if it exceeds the limit on work."""
    size, overlap = task.image[2:], _overlap(task)
    useful = [side for side in sides if side >= overlap + _STEP or side >= max(size)]
    best = min(useful, key=lambda side: work(side, overlap, size), default=None)
    return best if best is not None and work(best, overlap, size) <= _MAX_WORK * math.prod(size) else None


def work(side: int, overlap: int, size: tuple[int, ...]) -> int:
    """Return the pixels that the backward processes with tiles of a side; a single tile has no overlap."""
    own = (side - overlap) // _STEP * _STEP
    return math.prod(side if n <= side else -(-(n - overlap) // own) * side for n in size)


def norm_parameters(network: nn.Module) -> list[str]:
    """Return the names of the parameters that lightstream does not train."""
    return [
        f"{name}.{parameter}"
        for name, module in network.named_modules()
        if isinstance(module, BatchNorm)
        for parameter, _ in module.named_parameters()
    ]


def streaming_step(network: nn.Module, task: BenchTask, tile: int) -> Prepared:
    """Build a lightstream step with square tiles of a side.

    Raises:
        UnsupportedError: lightstream cannot be built for this network and tile.
    """
    make_torchvision_importable()  # lightstream imports lightning, which imports torchvision
    from lightstream.core.constructor import StreamingConstructor  # pyright: ignore[reportMissingImports]
    from lightstream.core.scnn.scnn import StreamingCNN  # pyright: ignore[reportMissingImports]

    channels = task.image[1]
    names = trunk_names(network)
    trunk = nn.Sequential(OrderedDict((name, network.get_submodule(name)) for name in names))
    for module in trunk.modules():
        if isinstance(module, BatchNorm):
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
            f"a tile of {tile} has no pixels beyond lightstream's overlap of {lost.top + lost.bottom} pixels"
        )
    # Use the caller's network: its parameters are trained.
    for name in names:
        network._modules[name] = streaming.stream_module.get_submodule(name)

    def infer(image: Tensor) -> Tensor:
        with torch.no_grad(), autocast(task):
            return first_tensor(head(streaming(image)))

    def train(image: Tensor) -> Tensor:
        network.zero_grad(set_to_none=True)
        with autocast(task):
            middle = streaming(image).requires_grad_()
            output = first_tensor(head(middle))
        loss_of(output).backward()
        streaming.backward(image, middle.grad)
        return output.detach()

    return streaming, train if task.training else infer


def _check_split(network: nn.Module, trunk: nn.Module, head: nn.Module, channels: int) -> None:
    """Refuse a network whose forward is not the composition of its children."""
    parameter = next(network.parameters())
    image = torch.rand(1, channels, _SMALL, _SMALL, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        if not torch.equal(first_tensor(head(trunk(image))), first_tensor(network(image))):
            raise UnsupportedError("the network is not a sequence of a streamed part and a head")
