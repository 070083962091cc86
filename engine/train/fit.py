"""Trains a network at native resolution, for `gigamorph train`; before, lines on the plan and the number of steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import kernels
from ...kernels import winograd
from ..accelerate import Accelerated, accelerate
from ..errors import BudgetError, DataError
from ..files import write_json
from ..models.classifier import check_classifier, check_segmenter, format_shape
from ..parallel.process_group import ProcessGroup
from ..planning import constants
from ..planning.plan import Plan
from ..tiling.memory import available_bytes, format_bytes
from ..torch_private import BatchNorm
from .card import Card, write_card
from .checkpoint import load_checkpoint
from .classify import Classification
from .data import Data, samples_of
from .loop import RunResult, run_stages
from .mask_target import MaskTarget, Overlap, Segmentation, WithLoss, scored_lines
from .metrics import Prediction, as_cases
from .network import build_network
from .options import TrainOptions
from .progress import Report
from .record import make_record, require_same, scale_warning
from .run import Run

log = logging.getLogger("gigamorph")


@dataclass(frozen=True)
class Fitted:
    """The result of a run: the content of ``metrics.json``, predictions ("val", "test"), and the best network.

    A run on masks has ``overlaps`` instead of predictions.
    """

    metrics: dict[str, Any]
    predictions: dict[str, list[Prediction]]
    net: Accelerated
    overlaps: dict[str, list[Overlap]] = field(default_factory=dict)


@dataclass(frozen=True)
class FitWatch:
    """The callbacks and loggers of a run.

    Attributes:
        say: called before the run with a few lines on the memory and steps that it will take.
        warn: called with a warning about an image, such as that all its pixels are equal.
        begun: called after all checks, before the first step.
        loggers, callbacks: names of Lightning loggers and callbacks; see `loggers`.
    """

    say: Callable[[str], object] | None = None
    warn: Callable[[str], object] = log.warning
    begun: Callable[[], object] = lambda: None
    loggers: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()


def fit(
    data: Data,
    options: TrainOptions,
    out: str | Path,
    *,
    resume: bool = False,
    report: Report | None = None,
    watch: FitWatch | None = None,
) -> Fitted:
    """Train, and write ``last.ckpt``, ``best.ckpt``, ``log.csv``, ``curves.png``, ``metrics.json`` and
    ``model_card.md`` into ``out``.

    A resumed run ends with the same parameters, bit for bit on the CPU, as an uninterrupted one. A larger number of
    epochs extends a run, even a complete one; from there on the learning rate follows the schedule of the new number.
    With ``resume`` and without ``last.ckpt`` the run starts, so job schedulers can always pass ``resume``.

    All processes of a `torch.distributed` group must call this to train together, see `run_stages`: with
    ``split_image`` they share each image, else each has its own image. `gigamorph.engine.parallel.launch` starts such
    processes; in other groups a process uses its current device.

    Args:
        data: the images of each split.
        options: all settings of the training.
        out: folder of the run.
        resume: continue the run in ``out``.
        report: called with the progress.
        watch: callbacks and loggers.

    Returns:
        The best checkpoint's scores on the validation and test images, with the hash of the split, the seconds of all
        epochs, peak memory and versions, as in ``metrics.json``; its predictions; and the network with its parameters.

    Raises:
        DataError: if the split leaks a patient or a checkpoint belongs to another split.
        GigamorphError: if the network does not accept the images or does not return a logit per class, ``out`` already
            holds a run, a file cannot be written, or ``accumulate`` is not a multiple of the number of images that are
            computed at a time.
        KeyboardInterrupt: at Ctrl-C or SIGTERM, after ``last.ckpt`` was written.
    """
    out = Path(out)
    data.require_fit()
    group = ProcessGroup.here(options.split_image)
    last, watch = out / "last.ckpt", watch or FitWatch()
    if resume and not last.exists():
        resume = False
        if watch.say is not None:
            watch.say(f"{last}: not found, so the run starts from the beginning")
    record = _with_origin(make_record(data, options, group), data, options, last if resume else None)
    net = _network(record, data, options, None if resume else options.weights, group)
    if options.batch_norm == "frozen" and not any(isinstance(m, BatchNorm) for m in net.modules()):
        log.warning("batch_norm has no effect: %s has no BatchNorm", options.model)
    if not len(data.val):
        log.warning("there are no validation images: the last epoch is saved as the best")
        if options.patience is not None:
            log.warning("patience has no effect without validation images: all epochs are trained")
        if options.schedule.plateau is not None:
            log.warning("schedule.plateau has no effect without validation images")
    if not resume and options.weights and (text := scale_warning(options.weights, data.preprocessing)):
        watch.warn(text)
    log.debug("kernels: %s", _kernels(options.device))
    if watch.say is not None:
        for line in preview_lines(net, data, options):
            watch.say(line)
    task = _task(net, data, options, record, watch.warn)
    own = (out, options.seed, options.device, options.budget, resume, options.precision, report)
    run = Run(*own, log=watch.loggers, callbacks=watch.callbacks, begun=watch.begun, group=group)
    trained = run_stages(task, options.made_stages(validated=bool(len(data.val))), run)
    metrics, found = _measure(task, data, record, trained)
    if group.leads:
        write_json(out / "metrics.json", metrics, "metrics")
        write_card(out / "model_card.md", _card(data, options, net, metrics, found))
    return Fitted(metrics, {}, net, found) if isinstance(task, Segmentation) else Fitted(metrics, found, net)


def _network(
    record: dict[str, Any], data: Data, options: TrainOptions, weights: str | Path | None, group: ProcessGroup
) -> Accelerated:
    """The initial network, after a check that it accepts the images."""
    torch.manual_seed(options.seed)
    net = build_network(record, weights, group.split)
    shape = (1, *data.train[0]["image"].shape)
    check = check_segmenter if isinstance(data.target, MaskTarget) else check_classifier
    check(net._network, options.model, shape, data.target.width, options.device)
    return net


def _kernels(device: str) -> str:
    """The convolution kernels that a run uses, for the log."""
    if device.startswith("cuda"):
        reason = kernels.missing()
        return "Triton's where they are faster" if reason is None else f"PyTorch's ({reason})"
    reason = winograd.missing()
    return "Winograd's filtering for 3 x 3, else oneDNN's" if reason is None else f"oneDNN's ({reason})"


def _with_origin(record: dict[str, Any], data: Data, options: TrainOptions, last: Path | None) -> dict[str, Any]:
    """The record of a run with its origin: that of the checkpoint ``last``, or of the initial weights."""
    if last is not None:
        stored = load_checkpoint(last)["gigamorph"]
        if "options" not in stored:
            raise DataError(f"{last}: is a checkpoint of a recipe; resume it with --recipe, or name another folder")
        require_same(stored, record, last)
        grown = {"grown": stored["grown"]} if "grown" in stored else {}
        # The code may be newer than the run, so the versions at the start are recorded too.
        return {**record, **grown, "versions_at_start": stored.get("versions_at_start", stored["versions"])}
    if options.weights:
        from ..morph.files import Origin  # imports all morphs

        if origin := Origin.of_file(options.model, options.weights, data.channels):
            return record | {"grown": origin.record()}
    return record


def _task(
    net: Accelerated, data: Data, options: TrainOptions, record: dict[str, Any], warn: Callable[[str], object]
) -> Classification | Segmentation:
    target, records = data.target, samples_of(data.train)
    made: Any = Segmentation if isinstance(target, MaskTarget) else Classification
    return made(
        net,
        data.train,
        data.val,
        record,
        target,
        options.loss,
        weights=target.weights(records) if options.loss.class_weights else None,
        drawn=target.rarity(records) if options.sampling == "balanced" else None,
        warn=warn,
    )


def _measure(
    task: Classification | Segmentation, data: Data, record: dict[str, Any], trained: RunResult
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The scores of the best epoch with the facts needed to repeat the run, and the predictions or overlaps."""
    metrics: dict[str, Any] = {"best_epoch": trained.best_epoch}
    found: dict[str, list[Any]] = {}
    for name, stage in (("val", "validate"), ("test", "test")):
        if not len(data.parts[name]):
            continue
        found[name] = task.predict(data.parts[name], stage)
        metrics[name] = task.measures(found[name])
    metrics |= {
        "seconds": round(sum(row["seconds"] for row in trained.rows), 2),  # including epochs before a resume
        "peak_bytes": max(row["peak_bytes"] for row in trained.rows),
        "split_sha256": record["split"]["sha256"],
        "truth_sha256": record["split"]["truth_sha256"],
        "preprocessing": data.preprocessing,
        "seed": record["options"]["seed"],
        "versions": record["versions"],
    }
    return metrics, found


_LEARNT = {
    "classes": "one of the classes",
    "ordinal": "classes in their order",
    "labels": "any of the labels",
    "numbers": "numbers",
    "masks": "a class for each pixel",
}
_SHOWN = ("epochs", "accumulate", "precision", "patience", "average", "sampling", "freeze", "seed", "device")


def _card_settings(options: TrainOptions) -> dict[str, Any]:
    """The settings of a model card by name; those of optimizer, schedule and loss in one line each."""
    parts = {}
    for name in ("optimizer", "schedule", "loss"):
        values = {key: value for key, value in asdict(getattr(options, name)).items() if value not in (None, {})}
        parts[name] = ", ".join(f"{key} {value}" for key, value in values.items())
    stages = ", ".join(f"{stage.epochs} epochs {stage.name}".strip() for stage in options.stages)
    plain = {name: getattr(options, name) for name in _SHOWN}
    return {name: value for name, value in {**plain, **parts, "stages": stages}.items() if value not in (None, (), "")}


def _card(
    data: Data,
    options: TrainOptions,
    net: Accelerated,
    metrics: dict[str, Any],
    found: dict[str, list[Any]],
) -> Card:
    masks = isinstance(data.target, MaskTarget)
    budget = "the free memory" if options.budget is None else format_bytes(options.budget)
    return Card(
        title=f"{options.model} for {' and '.join(data.classes)}",
        model={
            "architecture": options.model,
            "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
            "input": f"images of any size, every pixel, channels: {data.channels}",
            "output": f"{'a map with ' if masks else ''}log-odds of {', '.join(data.classes)}",
            "batch norm": options.batch_norm or "statistics of the whole image while training",
            "preprocessing": ", ".join(f"{name} {value}" for name, value in data.preprocessing.items()),
        },
        training={
            "recipe": "gigamorph train",
            "learnt": _LEARNT[data.target.kind],
            "initial weights": "given weights" if options.weights else "random",
            **_card_settings(options),
            "best epoch": metrics["best_epoch"],
            "memory budget of a step": budget,
            "largest memory of the process": format_bytes(metrics["peak_bytes"]),
            "seconds of all epochs": metrics["seconds"],
            "hash of the split": metrics["split_sha256"],
            f"hash of the {'masks' if masks else 'labels'}": metrics["truth_sha256"],
        },
        records={name: images.records for name, images in data.parts.items()},
        classes=data.classes,
        predictions={} if masks else {name: as_cases(one, data.classes) for name, one in found.items()},
        measured=scored_lines(metrics) if masks else (),
        labelled=not masks,
    )


_SAMPLED_IMAGES = 16
_QUICK_PLAN = 1.0
"""Maximum seconds of a plan after which a second plan, with a larger budget, is made."""
_MIN_SPEEDUP = 1.1
"""Minimum speed-up of a step for which a larger budget is suggested."""


def preview_lines(net: Accelerated, data: Data, options: TrainOptions) -> Iterator[str]:
    """Lines to print: tile, predicted peak and budget of a step on the largest image; steps of an epoch; and a larger
    budget that makes steps faster, if there is one and planning is quick.

    At most 16 training images, spread over the table, are opened; others may be larger.

    Args:
        net: the network.
        data: the images.
        options: of the run.

    Raises:
        BudgetError: naming the image, if none of its tiles fits the budget.
    """
    count = len(data.train)
    chosen = sorted({round(number) for number in np.linspace(0, count - 1, _SAMPLED_IMAGES)})
    looked = [_image_size(data.train[number]) for number in chosen]
    shape, path, _ = max(looked, key=lambda one: one[0][-2] * one[0][-1])
    samples = "images" if data.target.views is None else "exams"
    planned = net
    if isinstance(data.target, MaskTarget):  # a step does not compute the complete map, as a call would
        with_loss = WithLoss(net._network, len(data.target.names), options.loss)
        planned = accelerate(with_loss, options.budget, batch_norm=options.batch_norm)
    planned.train()
    started = time.monotonic()
    try:
        with torch.enable_grad():
            plan = planned.plan_for((1, *shape), by_region=True)
    except BudgetError as error:
        raise BudgetError(f"{path}: {error}", error.needed_bytes) from error
    quick = time.monotonic() - started < _QUICK_PLAN
    log.debug("plan of the largest image\n%s", plan)
    budget = "the free memory" if options.budget is None else format_bytes(options.budget)
    rows, columns = plan.tiles
    tiles = "one tile" if rows * columns == 1 else f"{rows} x {columns} tiles of {plan.tile[0]} x {plan.tile[1]}"
    yield (
        f"largest of {sum(count for _, _, count in looked)} sampled images: {format_shape(shape[1:])}, {tiles}, "
        f"predicted peak {format_bytes(plan.peak_bytes)} of {budget}"
    )
    steps, epochs = -(-count // options.accumulate), sum(s.epochs for s in options.stages) or options.epochs
    yield (
        f"{min(options.accumulate, count)} {samples} per optimizer step (accumulate), {steps} steps per epoch, "
        f"{steps * epochs} in {epochs} epoch{'s' * (epochs != 1)}"
    )
    if quick and not options.split_image:
        yield from larger_budget(planned, (1, *shape), plan)


def larger_budget(planned: Accelerated, shape: tuple[int, ...], plan: Plan) -> Iterator[str]:
    """A line on a budget, at most four times the present one or the free memory, with which a step recomputes less."""
    device, budget = planned._device(), planned.memory_budget
    free = int(constants.FREE_SHARE * available_bytes(device))
    most = free if budget is None else min(4 * budget, free)
    # Without a budget, a GPU already uses all free memory.
    if plan.work < _MIN_SPEEDUP or most <= (budget or 0) or (budget is None and device.type != "cpu"):
        return
    dtype = next((p.dtype for p in planned.parameters() if p.is_floating_point()), torch.float32)
    with torch.enable_grad():
        other = _with_budget(planned, most).plan_for(shape, dtype, device)
    faster = plan.work / other.work
    if faster >= _MIN_SPEEDUP:
        enough = min(most, math.ceil(1.1 * other.peak_bytes / 2**20) * 2**20)
        yield (
            f"--memory-budget {enough // 2**20}MiB would make a step about {faster:.1f} x faster, estimated from "
            "arithmetic and moved bytes; gigamorph plan compares budgets"
        )


def _with_budget(net: Accelerated, memory_budget: int) -> Accelerated:
    """The network, accelerated with the same settings and another budget."""
    return accelerate(net._network, memory_budget, net.tile, net.batch_norm, net.halos, net.fallback, net.split)


def _image_size(item: Mapping[str, Any]) -> tuple[tuple[int, ...], Path, int]:
    """Shape of an image, or of the largest view of an exam; its file; the number of views."""
    return tuple(item["image"].shape), item["record"].path, len(item.get("views", (1,)))
