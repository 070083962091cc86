"""Builds the network that a checkpoint's record describes, with new or trained parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..accelerate import Accelerated, accelerate
from ..errors import DataError, GigamorphError, MorphError
from ..models import build_model
from ..models.bounded import bounded
from ..models.outputs import Outputs, set_outputs
from .head_rows import start_from
from .mask_target import MaskTarget
from .target import Target


def target_of(record: Mapping[str, Any]) -> Target:
    """The target of a checkpoint's network."""
    if "target" in record and record["target"]["kind"] == "masks":
        return MaskTarget.from_plain(record["target"])
    return Target.from_plain(record["target"]) if "target" in record else Target(tuple(record["classes"]))


def outputs_of_record(record: Mapping[str, Any]) -> Outputs:
    """The outputs of a checkpoint's network, for a folder that describes it.

    Raises:
        GigamorphError: if the network combines views, which a folder cannot describe, or returns maps.
    """
    target = target_of(record)
    if target.views is not None:
        raise GigamorphError(
            f"cannot export a network of exams with several views (views {target.views!r}), because other programs "
            "would treat them as single images; predict with its checkpoint"
        )
    if target.kind == "masks":
        raise GigamorphError("cannot export a network of --task masks because it returns maps, not image classes")
    return target.outputs or Outputs.of("softmax", len(target.names), target.names)


def build_network(
    record: dict[str, Any],
    weights: str | Path | None = None,
    split: Any = False,
    trained: Mapping[str, Tensor] | None = None,
) -> Accelerated:
    """The accelerated network that a checkpoint's record describes, on its device, without trained parameters.

    Args:
        record: of a checkpoint.
        weights: initial weights.
        split: see `accelerate`.
        trained: the parameters that will be loaded; a much larger network is refused before it allocates memory.
    """
    options, target = record["options"], target_of(record)
    with contextlib.nullcontext() if trained is None else bounded(trained):
        if "grown" in record:
            from ..morph.files import Origin  # imports all morphs

            model = Origin.from_record(record["grown"]).build(options["model"], target.width)
        else:
            model = build_model(options["model"], target.width, record["channels"])
    if weights is not None:
        start_from(model, weights, target)
    model = model.to(options["device"])
    net = accelerate(model, memory_budget=options["memory_budget"], batch_norm=options.get("batch_norm"), split=split)
    if target.outputs is not None:
        set_outputs(net, target.outputs)
    return net


def restore_network(
    checkpoint: dict[str, Any], path: str | Path, *, memory_budget: int | None, device: str
) -> Accelerated:
    """The trained network of a checkpoint (`load_checkpoint`), with the given memory budget and device.

    Raises:
        DataError: naming the file, if the network cannot be built or the parameters do not fit.
    """
    record = checkpoint["gigamorph"]
    here = {**record["options"], "memory_budget": memory_budget, "device": device}
    trained = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
    try:
        net = build_network({**record, "options": here}, trained=trained)
        net.load_state_dict(trained)
    except GigamorphError as error:
        if type(error) not in (DataError, GigamorphError, MorphError):
            raise  # about the device, or about untrusted code
        raise DataError(f"{path}: {error}") from error
    except RuntimeError as error:
        raise DataError(
            f"{path}: the checkpoint's weights do not fit {here['model']!r} as it is built now: "
            f"{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    return net
