"""Predicts how a step of a model would run, before any image is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..capture.program import Given, Program
from ..capture.recording import capture
from ..errors import BudgetError, GigamorphError
from ..images.batches import Criterion, LabelSource, with_loss
from ..module.arguments import HALO_STORAGE, check_choice, check_network, is_whole, tile_sides
from ..tiling.memory import format_bytes, parse_bytes
from ..torch_private import tree_flatten
from .largest import largest as find_largest
from .plan import Plan
from .request import Request
from .search import PlanSearch
from .simulate import is_here

ENDLESS = 1 << 60
"""Memory of a GPU that is not installed: unlimited."""


def plan(
    model: nn.Module,
    image_size: tuple[int, ...],
    memory_budget: int | str | None = None,
    *,
    tile: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    training: bool = True,
    halos: str = "auto",
    criterion: Criterion | None = None,
    labels: Any = None,
    largest: Literal["size", "batch"] | None = None,
) -> Plan:
    """Plan a step on images of this size and predict its memory; nothing is allocated or computed.

    Args:
        model: the network, in the mode in which it will run (freeze BatchNorm or set evaluation mode before).
        image_size: (H, W), (C, H, W) or (N, C, H, W); by default N is 1 and C that of the first layer.
        memory_budget: bytes or a string like ``"4GiB"``; None uses the free memory. A GPU that is not installed has no
            limit.
        tile: side or (height, width) of a tile; None chooses it.
        dtype: dtype of the image; None uses that of the parameters.
        device: device of the step, which need not be installed; None uses that of the parameters.
        training: whether the step has a backward.
        halos: "device", "host", "disk" or "auto".
        criterion: for a network that outputs maps, the loss that `dense_loss` computes tile by tile, so that no map is
            stored as a whole. Without it the output is a whole map, and no loss is counted.
        labels: the labels of the criterion, as for `dense_loss`. Only the shape and dtype of tensors are used, as in
            ``torch.empty(1, 4096, 3328, dtype=torch.int64, device="meta")``.
        largest: "size" plans the largest image of about the proportions of `image_size`, "batch" the largest batch, see
            `find_largest`; `Plan.image` is its shape. A GPU that is not installed needs a memory_budget.

    Raises:
        UnsupportedError: if the network or the criterion cannot be computed exactly.
        BudgetError: if no tile fits the budget.
    """
    check_network(model)
    check_choice("halos", halos, HALO_STORAGE)
    limit = None if memory_budget is None else parse_bytes(memory_budget)
    call, given = _with_loss(_network_of(model), criterion, labels)
    request = Request(None, tile_sides(tile), training, halos)
    if largest is not None:
        check_choice("largest", largest, ("size", "batch"))
        _, shape, _, place = _asked(model, image_size, dtype, device)
        if call is not None or halos not in ("auto", "device"):
            raise GigamorphError("largest keeps all halos on the device, and takes no criterion; leave them out")
        if limit is None and not is_here(place):
            raise GigamorphError("largest needs a memory_budget for a GPU that is not installed")
        search = partial(searching, model, request=request, dtype=dtype, device=device)
        found = find_largest(search, shape, [limit or request.limit(place)], largest)[0]
        if found is None:
            raise BudgetError(f"not even a small image fits {format_bytes(limit or request.limit(place))}")
        return found
    with searching(model, image_size, request, dtype, device, call=call, inputs=given) as search:
        return replace(search.plan(limit), stock_bytes=search.stock_bytes, folded_bytes=search.folded_bytes)


@contextlib.contextmanager
def searching(
    model: nn.Module,
    image_size: tuple[int, ...],
    request: Request,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[Given] = (),
    recording: Callable[[tuple[int, ...]], contextlib.AbstractContextManager[Any]] | None = None,
) -> Iterator[PlanSearch]:
    """Context with the search for plans of a step, for any budgets.

    Args:
        model, image_size, dtype, device: see `plan`.
        request: the constraints, except the budget.
        call, inputs: see `capture`.
        recording: makes the context in which the network is recorded for a shape (N, C, H, W), which runs its code.
    """
    check_network(model)
    network, shape, dtype, device = _asked(model, image_size, dtype, device)
    request = replace(request, available=None if is_here(device) else ENDLESS)
    with _autocast_of(device, network):
        with contextlib.nullcontext() if recording is None else recording(shape):
            program = _program(network, shape, dtype, device, request.training, call, inputs)
        yield PlanSearch(program, request)


def _with_loss(
    network: nn.Module, criterion: Criterion | None, labels: Any
) -> tuple[Callable[..., Any] | None, list[Given]]:
    """The network's call with its loss, and its additional input tensors."""
    if criterion is None:
        if labels is not None:
            raise GigamorphError("labels require a criterion; give both or neither")
        return None, []
    if labels is None:
        raise GigamorphError(
            "a criterion needs labels; give those of dense_loss, or meta tensors of the same shape and dtype"
        )
    leaves, structure = tree_flatten(labels)
    given = [Given(one.shape, one.dtype) for one in map(LabelSource, leaves)]
    return partial(with_loss, network, criterion, structure), given


@contextlib.contextmanager
def _autocast_of(device: torch.device, network: nn.Module) -> Iterator[None]:
    """Context that applies the autocast state of a device to its substitutes: the network's device and the CPU."""
    kinds = {"cpu", (_lies(network) or device).type}
    before = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    wanted = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    try:
        for kind in kinds:  # `torch.autocast` ignores GPUs that are not installed
            _set_autocast(kind, *wanted)
        yield
    finally:
        for kind, state in before.items():
            _set_autocast(kind, *state)


def _set_autocast(kind: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, dtype)


def _program(
    network: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[Given] = (),
) -> Program:
    """The program of a call with all values on `device`, which need not be installed."""
    with torch.set_grad_enabled(training):
        lies = _lies(network) or (device if is_here(device) else torch.device("cpu"))
        program = capture(network, shape, dtype, lies, call, inputs)
    for value in program.values:
        value.device = device
    return program


def _network_of(model: nn.Module) -> nn.Module:
    """The network of an accelerated one, or the model itself."""
    return model.__dict__.get("_network", model)


def _asked(
    model: nn.Module, image_size: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[nn.Module, tuple[int, int, int, int], torch.dtype, torch.device]:
    """The network itself, the full image shape (N, C, H, W), the image's dtype, and the device."""
    shape = _full_shape(model, image_size)
    network = _network_of(model)
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    place = device or _lies(network) or "cpu"
    return network, shape, own if dtype is None else dtype, torch.device(place)


def _lies(network: nn.Module) -> torch.device | None:
    """The device of the network's tensors; None if all are meta tensors or there are none."""
    held = (t.device for t in (*network.parameters(), *network.buffers()) if not t.is_meta)
    return next(held, None)


def _full_shape(model: nn.Module, given: Sequence[int]) -> tuple[int, int, int, int]:
    size = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(size) == 2:
        first = next((p for p in model.parameters() if p.dim() == 4), None)
        size = (3 if first is None else first.shape[1], *size)
    if len(size) == 3:
        size = (1, *size)
    if len(size) != 4 or not all(is_whole(side) and side >= 1 for side in size):
        raise GigamorphError(f"image_size must be (H, W), (C, H, W) or (N, C, H, W), not {given!r}")
    return tuple(int(side) for side in size)  # pyright: ignore[reportReturnType]
