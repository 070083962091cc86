"""The training loop: consecutive stages on Lightning, resumable at any time, bit for bit on the CPU.

All random numbers of a step are seeded by (seed, epoch, step), the order of the examples by (seed, epoch). A killed run
therefore continues from ``last.ckpt`` to the same weights as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import DataError, GigamorphError
from ..models.compat import make_torchvision_importable
from ..models.weights import first_line
from ..parallel.lock import hold
from .callbacks import Epochs, Interrupt
from .checkpoint import REMEDY, load_checkpoint, save_torch, stored_state
from .loggers import logged, make_callbacks, make_loggers
from .module import StageModule
from .option_checks import check_stages
from .progress import Meter
from .run import LIGHTNING, Run
from .stages import Stage, freeze, restored
from .state import State
from .task import Task

make_torchvision_importable()

import lightning.pytorch as pl  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically, in the leading process only: all processes have the same state."""

    def __init__(self, leads: bool = True) -> None:
        super().__init__()
        self._leads = leads

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if self._leads:
            save_torch(checkpoint, path, "checkpoint")


@dataclass(frozen=True)
class RunResult:
    """The result of `run_stages`; the module has the parameters of the best epoch, or of the last without scores."""

    rows: list[dict[str, Any]]
    """As in ``log.csv``: stage, epoch, train_loss, score (or the columns of a `Score`), lr, seconds, peak_bytes, and
    megapixels_per_second where the task counts pixels."""
    best_epoch: int
    """Counted from 1, through the stages."""
    best_score: float | None


def run_stages(task: Task, stages: Sequence[Stage], run: Run) -> RunResult:
    """Train through stages; each continues from the weights of the previous one.

    Writes ``last.ckpt``, ``best.ckpt`` and ``log.csv`` into ``run.out``. With ``run.resume`` it continues the folder's
    run, or starts it if there is none, and returns immediately if it is complete. The last stage may have more epochs
    than before.

    All processes of ``run.group`` must call this to train together. If they split each image, all of them compute every
    batch. Otherwise the batches of an optimizer step are distributed to them and the gradients are averaged. A step and
    BatchNorm's running statistics are then those of one process; in training, BatchNorm uses the statistics of each
    batch in either case. The first process reports and writes. A resumed run may round sums over processes differently.

    Args:
        task: what is trained.
        stages: the stages, in order.
        run: folder, device, seed and other settings.

    Raises:
        GigamorphError: if a loss or gradient is not finite (the last checkpoint remains), a pattern matches no
            parameter, batches cannot be distributed to the processes, the folder holds another run or is in use by
            another process, or a file cannot be written.
        KeyboardInterrupt: at Ctrl-C, after ``last.ckpt`` was written.
    """
    check_stages(stages, run.group.at_once, task.module)
    with _locked_folder(run):
        return _run_stages(task, stages, run)


@contextlib.contextmanager
def _locked_folder(run: Run) -> Iterator[None]:
    """Context in which the leading process locks the folder against other runs."""
    if not run.group.leads:
        yield
        return
    lock = run.out / "_lock"
    with hold(lock, run.out, needed=False):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _run_stages(task: Task, stages: Sequence[Stage], run: Run) -> RunResult:
    group, last, best = run.group, run.out / "last.ckpt", run.out / "best.ckpt"
    record = {**task.record, "settings": _settings(stages, run, group.at_once)}
    task.group, task.meter = group, Meter(run.report if group.leads else None, group.at_once)
    task.module.to(run.device)
    if run.precision == "fp16" and not run.device.startswith("cuda"):
        task.meter.note("fp16 needs a GPU; the CPU uses bf16")  # Lightning switches
    state, goes_on, stored = State(), run.resume and last.exists(), dict[str, Any]()
    if goes_on:
        stored = load_checkpoint(last)
        state = _resumed(task, stored, record, str(last))
    elif last.exists():
        raise GigamorphError(f"{run.out}: already holds a run; continue it with --resume or name another folder")
    group.wait()  # until all processes have read the folder
    interrupt = Interrupt()
    hooks = _Hooks(make_loggers(run.log, run.out) if group.leads else [], make_callbacks(run.callbacks))
    left = state.stage < len(stages) - 1 or not state.is_over(stages[-1])
    loggers = hooks.loggers if left else ()
    with logged(loggers, record.get("options", record["settings"]), state.rows):
        run.begun()
        with interrupt.handled():
            while state.stage < len(stages):
                stage = stages[state.stage]
                if not state.is_over(stage):
                    _fit(task, stage, state, run, record, goes_on, interrupt, hooks)
                elif goes_on:
                    task.meter.note(f"{stage.name}: nothing left to do, {state.ending(stage)}")
                    _restore_callbacks(hooks.callbacks, stored)  # if the stage continues, Lightning does
                state.next_stage()
                goes_on = False
    if state.best_epoch != state.epoch or stages[-1].average is not None:
        _load_state(task, load_checkpoint(best), str(best))
    task.module.eval()
    return RunResult(state.rows, state.best_epoch, None if state.best is None else state.best[0])


@dataclass(frozen=True)
class _Hooks:
    """The user's loggers and callbacks, for all stages."""

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
    hooks: _Hooks,
) -> None:
    """Train one stage in Lightning's loop, which restores its state from ``last.ckpt`` if the stage `goes_on`."""
    on_gpu = run.device.startswith("cuda")
    with restored(task.module), warnings.catch_warnings():
        freeze(task.module, stage)
        # Lightning's advice on workers, loggers and folders does not apply to sources that are read by tiles.
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        epochs = Epochs(interrupt)
        trainer = pl.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            # Lightning sees a single process; the process group handles communication.
            devices=[torch.cuda.current_device()] if on_gpu else 1,
            max_epochs=stage.epochs,
            accumulate_grad_batches=stage.accumulate // task.group.at_once,
            precision=LIGHTNING[run.precision],
            callbacks=[epochs, *hooks.callbacks, epochs.at_end],
            plugins=[AtomicCheckpointIO(task.group.leads)],
            default_root_dir=run.out,
            logger=hooks.loggers or False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        module = StageModule(task, stage, state, run, record)
        try:
            trainer.fit(module, ckpt_path=run.out / "last.ckpt" if goes_on else None, weights_only=True)
        except MisconfigurationException as error:  # for example of a callback that logs without a logger
            raise GigamorphError(f"{first_line(error)} (callbacks that log need one: --log csv)") from error
        except Exception as error:
            if epochs.began or not goes_on or isinstance(error, GigamorphError):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{run.out / 'last.ckpt'}: cannot resume the run from it ({reason}); {REMEDY}") from error


def _settings(stages: Sequence[Stage], run: Run, at_once: int) -> dict[str, Any]:
    own = {"seed": run.seed, "precision": run.precision, "processes": at_once}
    return {**own, "stages": [_plain(stage) for stage in stages]}


def _plain(stage: Stage) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(stage).items()}


def _resumed(task: Task, stored: dict[str, Any], record: dict[str, Any], path: str) -> State:
    state = stored_state(stored, task.module, path)
    for name, value in record["settings"].items():
        before = stored["gigamorph"]["settings"].get(name)
        if name == "stages" and _extends(value, before):
            continue
        if before != value:
            raise GigamorphError(f"{path}: was started with different {name}; resume with the same")
    _load_state(task, stored, path)
    state.losses = state.losses[task.group.turn :: task.group.at_once]
    return state


def _extends(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    """Whether the stages equal the earlier ones, except for more epochs of the last one."""
    before = [_plain(Stage("", 1, 0.0)) | stage for stage in before]  # older versions lack newer options
    return [*before[:-1], {**before[-1], "epochs": max(before[-1]["epochs"], now[-1]["epochs"])}] == now


def _restore_callbacks(callbacks: Sequence[pl.Callback], stored: dict[str, Any]) -> None:
    """Restore the callbacks' states, which persist through all stages."""
    for callback in callbacks:
        if (state := stored.get("callbacks", {}).get(callback.state_key)) is not None:
            callback.load_state_dict(state)


def _load_state(task: Task, stored: dict[str, Any], path: str) -> None:
    try:
        task.module.load_state_dict({k.removeprefix("net."): v for k, v in stored["state_dict"].items()})
    except RuntimeError as error:
        raise GigamorphError(f"{path}: belongs to another network; resume with the same network") from error
    try:
        task.load_state(stored["gigamorph"]["task"])
    except (KeyError, TypeError) as error:  # each recipe reads its own keys
        raise DataError(f"{path}: key 'task': {first_line(error)}; {REMEDY}") from error
