"""Callbacks around the batches of a stage: scores and log rows of epochs, checkpoints, Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from ..errors import GigamorphError
from ..evaluate.checks import NotANumber
from ..files import write_rows
from ..models.compat import make_torchvision_importable
from ..models.weights import first_line
from ..tiling.memory import peak_bytes, reset_peak
from .loggers import log_row, numbers_of
from .module import StageModule, remedy, resume_hint
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
"""Minimum seconds between plots of a run: a plot takes as long as many steps of small images."""


class Epochs(Callback):
    """Scores each epoch, and writes the rows of ``log.csv`` and the checkpoints.

    ``last.ckpt`` is written after each epoch (`EndOfEpoch`), every `SAVE_EVERY` seconds inside it, and at Ctrl-C.
    ``best.ckpt`` is written before ``last.ckpt`` whenever the score is the best so far: if the run is killed between
    the two, it repeats the epoch and writes the same best state again. Lightning's `ModelCheckpoint` does not record
    the position inside an epoch.

    At Ctrl-C or SIGTERM the current batch (or the scoring) finishes, then ``last.ckpt`` is written and
    `InterruptedTraining` is raised. If any process of a group gets Ctrl-C, all of them stop at the same batch.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self.began = False  # the checkpoint has been restored, and batches follow
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
        _in_evaluation(trainer, module, 0, lambda: module.task.begin_epoch(module.state.epoch))
        train_mode(module.net, module.stage)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _stage_of(pl_module)
        group = module.task.group
        module.state.batch = group.done(batch_idx + 1, module.batches.total)
        for _ in batch:
            module.task.meter.image_done()
        # After the last batch the epoch is not scored yet: a stop here would skip the score when the run is resumed.
        if batch_idx + 1 == trainer.num_training_batches:
            return
        requests = group.all((self._interrupt.asked, time.monotonic() - self._saved > SAVE_EVERY))
        if any(stop or save for stop, save in requests):
            self._save(trainer, module, "last.ckpt")
        if any(stop for stop, _ in requests):
            raise InterruptedTraining

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _stage_of(pl_module)
        task, stage, state, group = module.task, module.stage, module.state, module.task.group
        pixels = task.meter.pixels
        trainer.optimizers[0].zero_grad()
        if group.at_once > 1:  # buffers that a forward changed; BatchNorm's already agree
            for buffer in module.net.buffers():
                dist.broadcast(buffer, 0)
        with module.averaged():
            score = self._score(trainer, module)
            row = self._row(trainer, module, score, pixels)
            ranked = Score(-row["train_loss"]) if score is None and task.best_by_loss else score
            if state.end_epoch(stage, row, ranked):
                self._save(trainer, module, "best.ckpt")
        pl_module.log_dict(numbers_of(row), logger=False)  # for users' callbacks (trainer.callback_metrics)
        if group.leads:
            write_rows(module.run.out / "log.csv", state.rows, "log")
            _log(trainer, state.rows[-1])
            if time.monotonic() - self._drawn > DRAW_EVERY:
                self._draw(module)
        scores = {} if score is None else score.shown or {"score": score.value}
        values = {"loss": state.rows[-1]["train_loss"], **scores}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        task.meter.note(f"{stage.name} {state.within}/{stage.epochs}  {shown}")
        trainer.should_stop |= state.is_over(stage)

    def save_epoch(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Write ``last.ckpt`` at the end of an epoch, and stop if a callback or Ctrl-C requests it."""
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
        with contextlib.suppress(GigamorphError):  # report what ended the run, not a plot that cannot be written
            self._draw(_stage_of(pl_module))

    def _draw(self, module: StageModule) -> None:
        if module.task.group.leads and module.state.rows:
            module.task.draw(module.run.out, module.state.rows)
            self._drawn = time.monotonic()

    def _score(self, trainer: pl.Trainer, module: StageModule) -> Score | None:
        try:
            found = _in_evaluation(trainer, module, 1, module.task.score)
        except NotANumber:  # among the predictions
            found = math.nan
        score = found if found is None or isinstance(found, Score) else Score(found)
        if score is not None and not math.isfinite(score.value):
            where = f"stage '{module.stage.name}', epoch {module.state.within + 1}"
            raise GigamorphError(f"{where}: the score is {score.value}; {remedy(module.run)}")
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
        shares = [count / group.at_once for count in group.all(pixels)[:: group.size // group.at_once]]
        if any(shares):
            row["megapixels_per_second"] = round(sum(shares) / 1e6 / max(seconds, 1e-9), 3)
        return {**row, "peak_bytes": max(group.all(peak_bytes(module.device)))}

    def _save(self, trainer: pl.Trainer, module: StageModule, name: str) -> None:
        try:
            trainer.save_checkpoint(module.run.out / name, weights_only=name == "best.ckpt")
        except GigamorphError as error:
            raise GigamorphError(f"{error}; {resume_hint(module.run)}") from error
        module.task.group.wait()
        self._saved = time.monotonic()


class EndOfEpoch(Checkpoint):
    """Saves ``last.ckpt`` after all other callbacks have processed the end of the epoch, with their states.

    It is a `Checkpoint` because Lightning calls these last.
    """

    def __init__(self, epochs: Epochs) -> None:
        self._epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epochs.save_epoch(trainer, _stage_of(pl_module))


def _log(trainer: pl.Trainer, row: Mapping[str, Any]) -> None:
    """Pass an epoch's row to Lightning's loggers; an error of a logger only prints a warning."""
    for logger in trainer.loggers:
        try:
            log_row(logger, row)
        except Exception as error:  # any error of the library: a server that does not respond
            log.warning("epoch %s not logged by %s: %s", row["epoch"], type(logger).__name__, first_line(error))


def _stage_of(module: pl.LightningModule) -> StageModule:
    assert isinstance(module, StageModule)
    return module


def _in_evaluation(trainer: pl.Trainer, module: StageModule, number: int, call: Callable[[], Any]) -> Any:
    """The result of `call` in evaluation mode without gradients, with random numbers seeded by the epoch."""
    module.net.eval()
    torch.manual_seed(seed_of(module.run.seed, module.state.epoch, 2**31 + number))
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return call()


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedTraining(Exception):
    """Training was stopped by Ctrl-C, after the checkpoint was written."""


class Interrupt:
    """Whether Ctrl-C or SIGTERM has been received; only the main thread can handle them."""

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[int, Any] = {}

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Context in which a first Ctrl-C only sets `asked`.

        Raises:
            KeyboardInterrupt: instead of `InterruptedTraining`, or of Lightning's `SystemExit` at a second Ctrl-C.
        """
        if threading.current_thread() is threading.main_thread():
            self._former = {one: signal.getsignal(one) or signal.SIG_DFL for one in _SIGNALS}
        for one in self._former:
            signal.signal(one, self._ask)
        try:
            yield
        except (InterruptedTraining, SystemExit) as error:
            raise KeyboardInterrupt from error
        finally:  # Lightning leaves Ctrl-C ignored after an interruption
            self._restore_handlers()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for one, handler in self._former.items():
            signal.signal(one, handler)
