"""The training of a recipe: stages one after another, resumable at any moment, bit for bit on the CPU.

Every random number of a step follows from (seed, epoch, step), the order of the examples from (seed, epoch), so that a
run that was killed goes on from ``last.ckpt`` to the same weights as one that was not. ``best.ckpt`` is written before
``last.ckpt``: a kill between the two repeats the epoch and writes the same best state again.
"""

from __future__ import annotations

import contextlib
import csv
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import GigamorphError
from ..files import write_atomically
from ..models.compat import make_torchvision_importable
from ..tiling.memory import peak_bytes, reset_peak
from ..train.checkpoint import load_checkpoint
from ..train.module import cosine_with_warmup
from ..train.progress import Meter
from .recipe import Run
from .stages import Stage, freeze, make_optimizer, restored, train_mode, trainable_names

make_torchvision_importable()

from lightning.fabric import Fabric  # noqa: E402

_SAVE_EVERY = 600.0  # seconds between checkpoints inside an epoch
_KEY = "gigamorph_recipe"


class Task:
    """What is trained: a network with its examples, its loss and its score. A recipe derives one.

    Attributes:
        module: all parameters and buffers. What `accelerate` makes of its parts shares them.
        meter: counts images and pixels; `run_stages` sets it before the first example.
    """

    module: nn.Module
    meter = Meter(None)

    def examples(self, epoch: int) -> Sequence[Any]:
        """The examples of an epoch, counted on through the stages; taken in an order that is drawn anew each time."""
        raise NotImplementedError

    def loss(self, batch: Sequence[Any]) -> Tensor:
        """The mean loss of a batch, a scalar."""
        raise NotImplementedError

    def score(self) -> float | None:
        """On validation data, in evaluation mode without gradients; larger is better. None where there are none."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Work between epochs, in evaluation mode without gradients. What it leaves behind belongs into `state`."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the module: plain containers, numbers, texts and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


@dataclass(frozen=True)
class Trained:
    """The end of the stages; the module has the parameters of the best epoch, or of the last without scores."""

    rows: list[dict[str, Any]]
    """As in ``log.csv``: stage, epoch, train_loss, score, lr, seconds, peak_bytes."""
    best_epoch: int
    """Counted from 1, through the stages."""
    best_score: float | None


def run_stages(task: Task, stages: Sequence[Stage], run: Run) -> Trained:
    """Train through stages; each goes on from the weights that the one before has left.

    Writes ``last.ckpt``, ``best.ckpt`` and ``log.csv`` into ``run.out``. With ``run.resume`` it goes on where the
    folder's run stopped, from the start if it had not begun, and returns at once if it was complete.

    Raises:
        GigamorphError: a loss or gradient that is not finite (the last checkpoint is kept), a pattern that names no
            parameter, a folder that holds another run, or a file that cannot be written.
        KeyboardInterrupt: at Ctrl-C, after ``last.ckpt`` was written.
    """
    for stage in stages:
        trainable_names(task.module, stage)
    loop = _Loop(task, stages, run)
    if run.resume and loop.last.exists():
        loop.load()
    elif loop.last.exists():
        raise GigamorphError(f"{run.out}: already holds a run; continue it with --resume or name another folder")
    with loop.interruptible():
        loop.go()
    loop.take_best()
    task.module.eval()
    return Trained(loop.rows, loop.best_epoch, loop.best)


def seed_of(*numbers: int) -> int:
    """A seed for random numbers that belong to these."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class _Loop:
    def __init__(self, task: Task, stages: Sequence[Stage], run: Run) -> None:
        self.task, self.stages, self.run = task, list(stages), run
        self.last, self.best_path = run.out / "last.ckpt", run.out / "best.ckpt"
        self.rows: list[dict[str, Any]] = []
        self.best: float | None = None
        self.best_epoch = 0
        # Where it is: stage, epoch within it, epoch of all, optimizer steps of this epoch that are done.
        self.stage, self.within, self.epoch, self.step = 0, 0, 0, 0
        self.losses: list[float] = []
        self.decay, self.stage_best, self.stale = 1.0, -math.inf, 0
        self.fabric = Fabric(
            accelerator="gpu" if run.device.startswith("cuda") else "cpu",
            devices=[torch.cuda.current_device()] if run.device.startswith("cuda") else 1,
            precision="bf16-mixed" if run.precision == "bf16" else "32-true",
        )
        task.module.to(run.device)
        task.meter = Meter(run.report)
        self._loaded: dict[str, Any] | None = None
        self._asked, self._former = False, None
        self._saved = time.monotonic()

    # ---------------------------------------------------------------------------------------------------- training

    def go(self) -> None:
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            with restored(self.task.module):
                freeze(self.task.module, stage)
                optimizer: Any = self.fabric.setup_optimizers(make_optimizer(self.task.module, stage))
                if self._loaded is not None:
                    optimizer.optimizer.load_state_dict(self._loaded)
                    self._loaded = None
                while self.within < stage.epochs and not self._is_over(stage):
                    self._one_epoch(stage, optimizer)
            self.stage, self.within = self.stage + 1, 0
            self.decay, self.stage_best, self.stale = 1.0, -math.inf, 0
            self._save(None)

    def _is_over(self, stage: Stage) -> bool:
        return stage.patience is not None and self.stale >= stage.patience

    def _one_epoch(self, stage: Stage, optimizer: Any) -> None:
        began = time.monotonic()
        reset_peak(self.run.device)
        task, module = self.task, self.task.module
        if self.step == 0:
            self._evaluating("begin", lambda: task.begin_epoch(self.epoch))
        examples = task.examples(self.epoch)
        if not len(examples):
            raise GigamorphError(f"stage '{stage.name}': there are no training examples in epoch {self.epoch + 1}")
        order = np.random.default_rng([self.run.seed, self.epoch]).permutation(len(examples)).tolist()
        batches = [order[i : i + stage.batch_size] for i in range(0, len(order), stage.batch_size)]
        steps = [batches[i : i + stage.accumulate] for i in range(0, len(batches), stage.accumulate)]
        done = sum(len(batch) for step in steps[: self.step] for batch in step)
        task.meter.start(stage.name, len(order), self.within, stage.epochs, done)
        train_mode(module, stage)
        for number in range(self.step, len(steps)):
            rate = stage.lr * self.decay
            if stage.schedule == "cosine":
                rate *= cosine_with_warmup(stage.epochs * len(steps))(self.within * len(steps) + number)
            for group in optimizer.param_groups:
                group["lr"] = rate
            self._one_step(stage, optimizer, [[examples[i] for i in batch] for batch in steps[number]], number)
            self.step = number + 1
            if self.step < len(steps) and (self._asked or time.monotonic() - self._saved > _SAVE_EVERY):
                self._save(optimizer)
                self._stop_if_asked()
        score = self._evaluating("score", task.score)
        if score is not None and not math.isfinite(score):
            raise GigamorphError(f"{self._place(stage)}: the score is {score}; {self._kept()}")
        loss = float(np.mean(self.losses))
        self.rows.append(
            {
                "stage": stage.name,
                "epoch": self.epoch + 1,
                "train_loss": loss,
                "score": score,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(time.monotonic() - began, 3),
                "peak_bytes": peak_bytes(self.run.device),
            }
        )
        self._count(stage, -loss if score is None else score)
        self.epoch, self.within, self.step, self.losses = self.epoch + 1, self.within + 1, 0, []
        # Without a score the latest state is the best known.
        if score is None or self.best is None or score > self.best:
            self.best, self.best_epoch = score, self.epoch
            self._save(optimizer, self.best_path)
        self._save(optimizer)
        self._log()
        shown = f"{stage.name} {self.within}/{stage.epochs}  loss {loss:.4f}"
        task.meter.note(shown if score is None else f"{shown}  score {score:.4f}")
        self._stop_if_asked()

    def _one_step(self, stage: Stage, optimizer: Any, batches: list[list[Any]], number: int) -> None:
        losses = []
        for part, batch in enumerate(batches):
            torch.manual_seed(seed_of(self.run.seed, self.epoch, number, part))
            with self.fabric.autocast():
                loss = self.task.loss(batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise GigamorphError(f"{self._place(stage, number)}: the loss is {losses[-1]}; {self._kept()}")
            self.fabric.backward(loss / len(batches))
            for _ in batch:
                self.task.meter.image_done()
        learning = [p for p in self.task.module.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(learning, math.inf if stage.clip is None else stage.clip))
        if not math.isfinite(norm):
            raise GigamorphError(f"{self._place(stage, number)}: the gradient is {norm}; {self._kept()}")
        optimizer.step()
        optimizer.zero_grad()
        self.losses += losses

    def _evaluating(self, what: str, call: Any) -> Any:
        self.task.module.eval()
        torch.manual_seed(seed_of(self.run.seed, self.epoch, 2**31 + (what == "score")))
        with torch.no_grad(), self.fabric.autocast():
            return call()

    def _count(self, stage: Stage, value: float) -> None:
        """Epochs without a better value, for the end of the stage and the learning rate."""
        self.stale = 0 if value > self.stage_best else self.stale + 1
        self.stage_best = max(self.stage_best, value)
        if stage.plateau is not None and self.stale and self.stale % stage.plateau == 0:
            self.decay *= 0.1

    def _place(self, stage: Stage, number: int | None = None) -> str:
        step = "" if number is None else f", step {number + 1}"
        return f"stage '{stage.name}', epoch {self.within + 1}{step}"

    def _kept(self) -> str:
        remedy = "lower lr, or look at the images and labels"
        if not self.last.exists():
            return remedy
        return f"{self.last} has the state of the last checkpoint before it; {remedy}"

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _settings(self) -> dict[str, Any]:
        stages = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(s).items()} for s in self.stages]
        return {"seed": self.run.seed, "precision": self.run.precision, "stages": stages}

    def _save(self, optimizer: Any, path: Path | None = None) -> None:
        payload = {
            _KEY: self._settings(),
            "position": [self.stage, self.within, self.epoch, self.step],
            "rows": self.rows,
            "best": [self.best, self.best_epoch],
            "progress": [self.losses, self.decay, self.stage_best, self.stale],
            "state_dict": self.task.module.state_dict(),
            "task": self.task.state(),
        }
        if path is None:
            payload["optimizer"] = optimizer and optimizer.optimizer.state_dict()
        write_atomically(path or self.last, lambda p: torch.save(payload, p), "checkpoint")
        self._saved = time.monotonic()

    def load(self) -> None:
        stored = load_checkpoint(self.last, _KEY)
        for name, value in self._settings().items():
            if stored[_KEY].get(name) != value:
                raise GigamorphError(f"{self.last}: was begun with other {name}; resume with the same")
        self._take(stored)
        self.stage, self.within, self.epoch, self.step = stored["position"]
        self.losses, self.decay, self.stage_best, self.stale = stored["progress"]
        self.rows, (self.best, self.best_epoch) = stored["rows"], stored["best"]
        self._loaded = stored["optimizer"]

    def take_best(self) -> None:
        if self.best_epoch != self.epoch:
            self._take(load_checkpoint(self.best_path, _KEY))

    def _take(self, stored: dict[str, Any]) -> None:
        try:
            self.task.module.load_state_dict(stored["state_dict"])
        except RuntimeError as error:
            raise GigamorphError(f"{self.last}: belongs to another network; resume with the same") from error
        self.task.load_state(stored["task"])

    def _log(self) -> None:
        def table(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)

        write_atomically(self.run.out / "log.csv", table, "log")

    # -------------------------------------------------------------------------------------------------------- Ctrl-C

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C lets the step under way finish and writes ``last.ckpt``; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: Any) -> None:
            self._asked = True
            signal.signal(signal.SIGINT, former)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, former)

    def _stop_if_asked(self) -> None:
        if self._asked:
            raise KeyboardInterrupt
