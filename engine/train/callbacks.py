"""What happens around the batches of a stage: epochs, their scores and rows, checkpoints, Ctrl-C."""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from ..errors import GigamorphError
from ..evaluate.checks import NotANumber
from ..files import write_atomically
from ..models.compat import make_torchvision_importable
from ..models.weights import first_line
from ..tiling.memory import peak_bytes, reset_peak
from .interrupt import Interrupt, InterruptedTraining
from .loggers import log_row, numbers_of
from .module import StageModule, remedy, where_it_goes_on
from .run import seed_of
from .stages import train_mode
from .task import Score

make_torchvision_importable()

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import Callback, Checkpoint  # noqa: E402

log = logging.getLogger("gigamorph")

SAVE_EVERY = 600.0
"""Seconds between checkpoints inside an epoch."""

DRAW_EVERY = 10.0
"""Seconds between pictures of a run that goes on: a picture takes as long as many steps of small images."""


class Epochs(Callback):
    """Scores, rows of ``log.csv`` and checkpoints of the epochs.

    ``last.ckpt`` is written after each epoch (`EndOfEpoch`), at times inside it, and at Ctrl-C; ``best.ckpt`` whenever
    the score is the best so far, before ``last.ckpt``: a kill between the two repeats the epoch and writes the same
    best state again. Lightning's own `ModelCheckpoint` knows no place inside an epoch.

    A Ctrl-C, or SIGTERM, lets the batch under way (or the scoring) finish, writes ``last.ckpt`` and raises
    `InterruptedTraining`.
    All processes of a group stop at the same place, at a Ctrl-C to any of them.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self.began = False  # what a checkpoint holds has been restored, and batches come
        self._began = self._saved = self._drawn = time.monotonic()
        self.at_end = EndOfEpoch(self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_clock(pl_module)
        self.began = True

    def _start_clock(self, module: pl.LightningModule) -> None:
        self._began = time.monotonic()
        reset_peak(module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _stage_of(pl_module)
        _evaluating(trainer, module, 0, lambda: module.task.begin_epoch(module.state.epoch))
        train_mode(module.net, module.stage)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _stage_of(pl_module)
        group = module.task.group
        module.state.batch = group.done(batch_idx + 1, module.batches.total)
        for _ in batch:
            module.task.meter.image_done()
        # After the last batch the epoch still lacks its score: stopping there would skip it on resuming.
        if batch_idx + 1 == trainer.num_training_batches:
            return
        wishes = group.all((self._interrupt.asked, time.monotonic() - self._saved > SAVE_EVERY))
        if any(stop or save for stop, save in wishes):
            self._save(trainer, module, "last.ckpt")
        if any(stop for stop, _ in wishes):
            raise InterruptedTraining

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _stage_of(pl_module)
        task, stage, state, group = module.task, module.stage, module.state, module.task.group
        pixels = task.meter.pixels
        trainer.optimizers[0].zero_grad()
        if group.at_once > 1:  # what a forward has left there (of BatchNorm they agree) is the first one's
            for buffer in module.net.buffers():
                dist.broadcast(buffer, 0)
        with module.averaged():
            score = self._score(trainer, module)
            row = self._row(trainer, module, score, pixels)
            kept = Score(-row["train_loss"]) if score is None and task.best_by_loss else score
            if state.end_epoch(stage, row, kept):
                self._save(trainer, module, "best.ckpt")
        pl_module.log_dict(numbers_of(row), logger=False)  # for callbacks of users (trainer.callback_metrics)
        if group.leads:
            write_log(module.run.out / "log.csv", state.rows)
            _log(trainer, state.rows[-1])
            if time.monotonic() - self._drawn > DRAW_EVERY:
                self._draw(module)
        told = {} if score is None else score.shown or {"score": score.value}
        values = {"loss": state.rows[-1]["train_loss"], **told}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        task.meter.note(f"{stage.name} {state.within}/{stage.epochs}  {shown}")
        trainer.should_stop |= state.is_over(stage)

    def keep_epoch(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Write ``last.ckpt`` at the end of an epoch, and stop where somebody asks for it."""
        stage, state, group = module.stage, module.state, module.task.group
        trainer.should_stop = any(group.all(trainer.should_stop))
        state.stopped = trainer.should_stop and not state.is_over(stage)
        self._save(trainer, module, "last.ckpt")
        if trainer.should_stop and state.within < stage.epochs:
            module.task.meter.note(f"{stage.name}: {state.ending(stage)}")
        self._start_clock(module)
        if any(group.all(self._interrupt.asked)):
            raise InterruptedTraining

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(_stage_of(pl_module))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(GigamorphError):  # what ended the run is told, not a picture that has no room
            self._draw(_stage_of(pl_module))

    def _draw(self, module: StageModule) -> None:
        if module.task.group.leads and module.state.rows:
            module.task.draw(module.run.out, module.state.rows)
            self._drawn = time.monotonic()

    def _score(self, trainer: pl.Trainer, module: StageModule) -> Score | None:
        try:
            found = _evaluating(trainer, module, 1, module.task.score)
        except NotANumber:  # a prediction is
            found = math.nan
        score = found if found is None or isinstance(found, Score) else Score(found)
        if score is not None and not math.isfinite(score.value):
            place = f"stage '{module.stage.name}', epoch {module.state.within + 1}"
            raise GigamorphError(f"{place}: the score is {score.value}; {remedy(module.run)}")
        return score

    def _row(self, trainer: pl.Trainer, module: StageModule, score: Score | None, pixels: float) -> dict[str, Any]:
        group, state = module.task.group, module.state
        seconds = time.monotonic() - self._began
        row = {
            "stage": module.stage.name,
            "epoch": state.epoch + 1,
            "train_loss": float(np.mean(group.in_order(state.losses))),
            **(score.columns if score is not None and score.columns else {"score": score and score.value}),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(seconds, 3),
        }
        own = [found / group.at_once for found in group.all(pixels)[:: group.size // group.at_once]]
        if any(own):
            row["megapixels_per_second"] = round(sum(own) / 1e6 / max(seconds, 1e-9), 3)
        return {**row, "peak_bytes": max(group.all(peak_bytes(module.device)))}

    def _save(self, trainer: pl.Trainer, module: StageModule, name: str) -> None:
        try:
            trainer.save_checkpoint(module.run.out / name, weights_only=name == "best.ckpt")
        except GigamorphError as error:
            raise GigamorphError(f"{error}; {where_it_goes_on(module.run)}") from error
        module.task.group.wait()
        self._saved = time.monotonic()


class EndOfEpoch(Checkpoint):
    """Keeps an epoch when all other callbacks have seen its end, with what they then know and decide.

    Lightning calls `Checkpoint`s last.
    """

    def __init__(self, epochs: Epochs) -> None:
        self._epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epochs.keep_epoch(trainer, _stage_of(pl_module))


def write_log(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per epoch; the file is replaced as a whole."""

    def table(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, table, "log")


def _log(trainer: pl.Trainer, row: Mapping[str, Any]) -> None:
    """Hand an epoch's row to Lightning's loggers, if there are any; what they cannot take ends no run."""
    for logger in trainer.loggers:
        try:
            log_row(logger, row)
        except Exception as error:  # the library's own: a server that has gone
            log.warning("epoch %s is not in %s: %s", row["epoch"], type(logger).__name__, first_line(error))


def _stage_of(module: pl.LightningModule) -> StageModule:
    assert isinstance(module, StageModule)
    return module


def _evaluating(trainer: pl.Trainer, module: StageModule, number: int, call: Callable[[], Any]) -> Any:
    """What a call gives in evaluation mode without gradients, with random numbers that follow from the epoch."""
    module.net.eval()
    torch.manual_seed(seed_of(module.run.seed, module.state.epoch, 2**31 + number))
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return call()
