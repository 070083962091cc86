"""The training loop: stages one after another on Lightning, resumable at any moment, bit for bit on the CPU.

Every random number of a step follows from (seed, epoch, step), the order of the examples from (seed, epoch), so that a
run that was killed goes on from ``last.ckpt`` to the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DataError, GigamorphError
from ..models.compat import make_torchvision_importable
from ..models.weights import first_line
from ..parallel.lock import hold
from ..parallel.process_group import ProcessGroup
from .callbacks import Epochs
from .checkpoint import AtomicCheckpointIO, load_checkpoint
from .interrupt import Interrupt
from .loggers import logged, make_callbacks, make_loggers
from .module import StageModule
from .optimizers import find_optimizer, make_optimizer
from .precision import LIGHTNING
from .progress import Meter
from .run import Run
from .schedules import factor_of
from .stages import Stage, freeze, require_deal, restored, trainable_names
from .state import State
from .stored import REMEDY, stored_state
from .task import Task

make_torchvision_importable()

import lightning.pytorch as pl  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402


@dataclass(frozen=True)
class Trained:
    """The end of the stages; the module has the parameters of the best epoch, or of the last without scores."""

    rows: list[dict[str, Any]]
    """As in ``log.csv``: stage, epoch, train_loss, score (or the columns of a `Score`), lr, seconds, peak_bytes, and
    megapixels_per_second where the task counts pixels."""
    best_epoch: int
    """Counted from 1, through the stages."""
    best_score: float | None


def run_stages(task: Task, stages: Sequence[Stage], run: Run) -> Trained:
    """Train through stages; each goes on from the weights that the one before has left.

    Writes ``last.ckpt``, ``best.ckpt`` and ``log.csv`` into ``run.out``. With ``run.resume`` it goes on where the
    folder's run stopped, from the start if it had not begun, and returns at once if it was complete. The last stage may
    have more epochs than before.

    The processes of ``run.group`` train together when each of them calls this: if they split each image, all of them
    compute every batch; else the batches of an optimizer step are dealt to them, whole, and the gradients are averaged,
    so that a step is that of one process, and so are BatchNorm's running statistics; its statistics in training are
    those of each batch, in one process as in several. The first of them reports and writes. Sums over processes may be
    rounded otherwise in a run that was resumed.

    Raises:
        GigamorphError: a loss or gradient that is not finite (the last checkpoint is kept), a pattern that names no
            parameter, batches that cannot be dealt to the processes, a folder that holds another run or that another
            process trains in, or a file that cannot be written.
        KeyboardInterrupt: at Ctrl-C, after ``last.ckpt`` was written.
    """
    check_stages(stages, run.group, task.module)
    with _alone(run):
        return _run_stages(task, stages, run)


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Inside, no other run writes to the folder; the process that leads sees to it."""
    if not run.group.leads:
        yield
        return
    lock = run.out / "_lock"
    with hold(lock, run.out, needed=False):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _run_stages(task: Task, stages: Sequence[Stage], run: Run) -> Trained:
    group, last, best = run.group, run.out / "last.ckpt", run.out / "best.ckpt"
    record = {**task.record, "settings": _settings(stages, run, group.at_once)}
    task.group, task.meter = group, Meter(run.report if group.leads else None, group.at_once)
    task.module.to(run.device)
    if run.precision == "fp16" and not run.device.startswith("cuda"):
        task.meter.note("fp16 is a GPU's; bf16 is taken on the CPU")  # by Lightning
    state, goes_on, stored = State(), run.resume and last.exists(), dict[str, Any]()
    if goes_on:
        stored = load_checkpoint(last)
        state = _resumed(task, stored, record, str(last))
    elif last.exists():
        raise GigamorphError(f"{run.out}: already holds a run; continue it with --resume or name another folder")
    group.wait()  # all have seen the folder as it was
    interrupt = Interrupt()
    watchers = _Watchers(make_loggers(run.log, run.out) if group.leads else [], make_callbacks(run.callbacks))
    left = state.stage < len(stages) - 1 or not state.is_over(stages[-1])
    loggers = watchers.loggers if left else ()
    with logged(loggers, record.get("options", record["settings"]), state.rows):
        run.begun()
        with interrupt.awaited():
            while state.stage < len(stages):
                stage = stages[state.stage]
                if not state.is_over(stage):
                    _fit(task, stage, state, run, record, goes_on, interrupt, watchers)
                elif goes_on:
                    task.meter.note(f"{stage.name}: nothing is left to do, {state.ending(stage)}")
                    _give_back(watchers.callbacks, stored)  # else Lightning does, where the stage goes on
                state.next_stage()
                goes_on = False
    if state.best_epoch != state.epoch or stages[-1].average is not None:
        _take(task, load_checkpoint(best), str(best))
    task.module.eval()
    return Trained(state.rows, state.best_epoch, None if state.best is None else state.best[0])


def check_stages(stages: Sequence[Stage], group: ProcessGroup, module: nn.Module | None = None) -> None:
    """Refuse stages that cannot be trained, before any work.

    Args:
        module: what they train; None leaves their patterns and the optimizer's options to `run_stages`.

    Raises:
        GigamorphError: a pattern that names no parameter of the module, batches that cannot be dealt to the processes,
            or an optimizer or a schedule that there is not.
    """
    for stage in stages:
        if module is not None:
            trainable_names(module, stage)
            make_optimizer(module, stage)
        require_deal(stage, group.at_once)
        find_optimizer(stage.optimizer)
        factor_of(stage, 1)


@dataclass(frozen=True)
class _Watchers:
    """Who looks on besides ourselves, through all stages."""

    loggers: list[Logger]
    callbacks: list[pl.Callback]


def _fit(
    task: Task,
    stage: Stage,
    state: State,
    run: Run,
    record: dict[str, Any],
    goes_on: bool,
    interrupt: Interrupt,
    watchers: _Watchers,
) -> None:
    """One stage in Lightning's loop, which takes up what it needs from ``last.ckpt`` if the stage `goes_on`."""
    on_gpu = run.device.startswith("cuda")
    with restored(task.module), warnings.catch_warnings():
        freeze(task.module, stage)
        # Lightning advises on workers, loggers and folders; none of it concerns sources that are read by tiles.
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        epochs = Epochs(interrupt)
        trainer = pl.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            # Lightning sees one process of its own everywhere; what several have in common is the group's.
            devices=[torch.cuda.current_device()] if on_gpu else 1,
            max_epochs=stage.epochs,
            accumulate_grad_batches=stage.accumulate // task.group.at_once,
            precision=LIGHTNING[run.precision],
            callbacks=[epochs, *watchers.callbacks, epochs.at_end],
            plugins=[AtomicCheckpointIO(task.group.leads)],
            default_root_dir=run.out,
            logger=watchers.loggers or False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        module = StageModule(task, stage, state, run, record)
        try:
            trainer.fit(module, ckpt_path=run.out / "last.ckpt" if goes_on else None, weights_only=True)
        except MisconfigurationException as error:  # of callbacks, as one that logs where there is no logger
            raise GigamorphError(f"{first_line(error)} (callbacks that log need one: --log csv)") from error
        except Exception as error:
            if epochs.began or not goes_on or isinstance(error, GigamorphError):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{run.out / 'last.ckpt'}: the run cannot go on with it ({reason}); {REMEDY}") from error


def _settings(stages: Sequence[Stage], run: Run, at_once: int) -> dict[str, Any]:
    plain = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(stage).items()} for stage in stages]
    return {"seed": run.seed, "precision": run.precision, "processes": at_once, "stages": plain}


def _resumed(task: Task, stored: dict[str, Any], record: dict[str, Any], path: str) -> State:
    state = stored_state(stored, task.module, path)
    for name, value in record["settings"].items():
        before = stored["gigamorph"]["settings"].get(name)
        if name == "stages" and _extends(value, before):
            continue
        if before != value:
            raise GigamorphError(f"{path}: was begun with other {name}; resume with the same")
    _take(task, stored, path)
    state.losses = state.losses[task.group.turn :: task.group.at_once]
    return state


def _extends(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    """Whether stages are those that there were before, but for more epochs of the last one."""
    return [*before[:-1], {**before[-1], "epochs": max(before[-1]["epochs"], now[-1]["epochs"])}] == now


def _give_back(callbacks: Sequence[pl.Callback], stored: dict[str, Any]) -> None:
    """Callbacks go through all stages: what they knew at the end of one, they know at the start of the next."""
    for callback in callbacks:
        if (state := stored.get("callbacks", {}).get(callback.state_key)) is not None:
            callback.load_state_dict(state)


def _take(task: Task, stored: dict[str, Any], path: str) -> None:
    try:
        task.module.load_state_dict({k.removeprefix("net."): v for k, v in stored["state_dict"].items()})
    except RuntimeError as error:
        raise GigamorphError(f"{path}: belongs to another network; resume with the same") from error
    try:
        task.load_state(stored["gigamorph"]["task"])
    except (KeyError, TypeError) as error:  # each recipe reads its own keys
        raise DataError(f"{path}: key 'task': {first_line(error)}; {REMEDY}") from error
