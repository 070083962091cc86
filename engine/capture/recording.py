"""Records the program of a network's call for an image shape, without an image and without running it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..torch_private import FakeTensor
from .dynamo import record, stand_in
from .graph import single
from .program import Given, Program


def capture(
    model: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[Given] = (),
) -> Program:
    """The program of a call of the model on an image batch, in the current gradient mode and autocast.

    Args:
        model: the network, in the training or evaluation mode to record; it may be on the meta device.
        shape: (N, C, H, W) of the image batch; any size, because it is not allocated.
        dtype: dtype of the image.
        device: device of the image; a network on the meta device is recorded as if it were on this device.
        call: function of the image and the `inputs` to record instead of the model's call.
        inputs: further maps, with the image axes last.

    Raises:
        UnsupportedError: the call cannot be recorded.
    """
    refuse_unready(model)
    device = torch.device(device)
    held = [*model.parameters(), *model.buffers()]
    home = next((t.device for t in held if t.device.type != "meta"), held[0].device if held else device)
    fake = next((t.fake_mode for t in held if isinstance(t, FakeTensor)), None)
    with contextlib.nullcontext() if fake is None else fake:
        made = stand_in if fake is None else torch.empty
        image = made(shape, dtype=dtype, device=home)
        maps = [made(one.shape, dtype=one.dtype, device=home).requires_grad_(bool(one.grad)) for one in inputs]
    graph, flat = record(_call, model if call is None else call, image, tuple(maps))
    roles = {id(image): "image", **{id(one): "map" for one in maps}}
    found = {index: roles[id(value)] for index, value in enumerate(flat) if id(value) in roles}
    moved = device if home.type == "meta" else None
    return graph.program(flat, Given(tuple(shape), dtype), found, device, moved)


@functools.cache
def load_recorder() -> None:
    """Record one layer, so that the import of TorchDynamo (about 30 MB) does not count as memory of a step."""
    with contextlib.suppress(Exception):  # an error will occur again with the network
        capture(nn.ReLU(), (1, 1, 4, 4), torch.float32, "cpu")


def _call(call: Callable[..., Any], image: Tensor, further: tuple[Tensor, ...]) -> Any:
    result = call(image, *further)
    return single(result) if isinstance(result, Tensor) else result


def refuse_unready(model: nn.Module) -> None:
    """Refuse modules that cannot be recorded.

    Raises:
        UnsupportedError: for TorchScript, lazy modules and deprecated backward hooks.
    """
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(f"{where} is a TorchScript module, which cannot be recorded; use the eager module")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
            raise UnsupportedError(f"{where} is lazy; run the model once before it is accelerated")
        if torch.is_grad_enabled() and module._backward_hooks and not module._is_full_backward_hook:
            raise UnsupportedError(
                f"{where} has a backward hook of the deprecated register_backward_hook; use register_full_backward_hook"
            )
