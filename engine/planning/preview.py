"""What a step of a model would take, asked before there is an image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ..capture.program import Given, Program
from ..capture.recording import Recording, record_call
from ..errors import GigamorphError
from ..images.labels import Criterion, Labels, with_loss
from ..module.arguments import HALO_PLACES, check_choice, check_network, is_whole, tile_sides
from ..tiling.memory import parse_bytes
from .plan import Plan
from .request import Request
from .search import arrange, arrange_each
from .simulate import is_here, stock_peak

ENDLESS = 1 << 60
"""Bytes of a GPU that is not here, and as large as it has to be."""


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
) -> Plan:
    """How a step on images of this size would be computed, and how much it takes; nothing is allocated or computed.

    Args:
        model: the network, in the mode it will run in (freeze BatchNorm before, or put it in evaluation mode).
        image_size: (H, W), (C, H, W) or (N, C, H, W); without them N is 1 and C what the first layer takes.
        memory_budget: bytes (``"4GiB"``); None takes what is free, and of a GPU that is not here whatever is needed.
        tile: side or (height, width); None chooses.
        dtype: dtype of the image; None takes that of the parameters.
        device: device the step would run on; it need not be here. None takes that of the parameters.
        training: with a backward, or inference.
        halos: "device", "host", "disk" or "auto".
        criterion: of a network of maps, the loss that `dense_loss` takes by tiles, so that no map is whole. Without it
            the network's output is, and no loss is counted.
        labels: what the criterion gets, as of `dense_loss`; of tensors shape and dtype are enough, as in
            ``torch.empty(1, 4096, 3328, dtype=torch.int64, device="meta")``.

    Raises:
        UnsupportedError: if the network, or the criterion, cannot be computed exactly.
        BudgetError: if no tile fits the budget.
    """
    check_network(model)
    check_choice("halos", halos, HALO_PLACES)
    network, shape, dtype, device = _asked(model, image_size, dtype, device)
    limit = None if memory_budget is None else parse_bytes(memory_budget)
    call, given = _with_loss(network, criterion, labels)
    request = Request(limit, tile_sides(tile), training, halos, available=None if is_here(device) else ENDLESS)
    with _autocast_of(device, network):
        recording = _recording(network, shape, dtype, device, training, call, given)
        _, chosen = arrange(_program(recording, device, training), request)
        held = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
        stock = held + stock_peak(recording, device, training)
    return replace(chosen, stock_bytes=stock)


def _with_loss(
    network: nn.Module, criterion: Criterion | None, labels: Any
) -> tuple[Callable[..., Any] | None, list[Given]]:
    """The network's call with its loss, and the tensors that it takes in addition."""
    if criterion is None:
        if labels is not None:
            raise GigamorphError("labels are of a criterion; give both, or none")
        return None, []
    if labels is None:
        raise GigamorphError(
            "a criterion needs labels; give those that dense_loss gets, or tensors like them on the meta device"
        )
    leaves, structure = tree_flatten(labels)
    given = [Given(one.shape, one.dtype) for one in map(Labels, leaves)]
    return partial(with_loss, network, criterion, structure), given


def plan_each(
    model: nn.Module,
    image_size: tuple[int, ...],
    memory_budgets: Sequence[int],
    *,
    device: torch.device | str | None = None,
    training: bool = True,
) -> list[Plan | None]:
    """As `plan`, for several budgets in bytes; None where nothing fits. Stock PyTorch is not asked about."""
    check_network(model)
    network, shape, dtype, device = _asked(model, image_size, None, device)
    with _autocast_of(device, network):
        program = _program(_recording(network, shape, dtype, device, training), device, training)
        return arrange_each(program, Request(None, None, training), memory_budgets)


@contextlib.contextmanager
def _autocast_of(device: torch.device, network: nn.Module) -> Iterator[None]:
    """Autocast as it is on a device, also on those that stand for it: where the network lies, and the CPU."""
    kinds = {"cpu", (_lies(network) or device).type}
    before = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    wanted = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    try:
        for kind in kinds:  # `torch.autocast` does nothing for a GPU that is not here
            _set_autocast(kind, *wanted)
        yield
    finally:
        for kind, state in before.items():
            _set_autocast(kind, *state)


def _set_autocast(kind: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, dtype)


def _recording(
    network: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[Given] = (),
) -> Recording:
    """The recorded forward, as on a device that need not be here: it is recorded where the network is."""
    lies = _lies(network) or (device if is_here(device) else torch.device("cpu"))
    with torch.set_grad_enabled(training):
        return record_call(network, shape, dtype, lies, call, inputs)


def _program(recording: Recording, device: torch.device, training: bool) -> Program:
    """Its program, with all values on a device."""
    with torch.set_grad_enabled(training):
        program = recording.program()
    for value in program.values:
        value.device = device
    return program


def _asked(
    model: nn.Module, image_size: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[nn.Module, tuple[int, int, int, int], torch.dtype, torch.device]:
    """The network itself, the full shape, the image's dtype, the device."""
    shape = _full_shape(model, image_size)
    network = model.__dict__.get("_network", model)
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    place = device or _lies(network) or "cpu"
    return network, shape, own if dtype is None else dtype, torch.device(place)


def _lies(network: nn.Module) -> torch.device | None:
    """The device of the network's tensors; None of one without any that has values."""
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
        raise GigamorphError(f"image_size={given!r} is not (H, W), (C, H, W) or (N, C, H, W)")
    return tuple(int(side) for side in size)  # pyright: ignore[reportReturnType]
