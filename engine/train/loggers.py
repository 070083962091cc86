"""Lightning's loggers and callbacks by name, in addition to ``log.csv``."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from ..models.compat import make_torchvision_importable
from ..models.own_code import imported, working_directory_on_path
from ..models.weights import first_line
from ..trust import require_trusted

make_torchvision_importable()

from lightning.pytorch import loggers as of_lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402

log = logging.getLogger("gigamorph")


def _wandb(out: Path) -> Logger:
    project = os.environ.get("WANDB_PROJECT", "gigamorph")
    return of_lightning.WandbLogger(save_dir=out, name=out.name, project=project)


_DATABASES: set[str] = set()
"""Tracking addresses of this process's runs."""


def _mlflow(out: Path) -> Logger:
    """A logger to the server in MLFLOW_TRACKING_URI, else to a database in the run's folder.

    MLflow no longer supports plain files. It writes its address into that variable, so the next fold ignores
    addresses of this process.
    """
    server, own = os.environ.get("MLFLOW_TRACKING_URI"), out.absolute()
    if server in _DATABASES:
        server = None
    out.mkdir(parents=True, exist_ok=True)
    _DATABASES.add(f"sqlite:///{own}/mlflow.db")
    return of_lightning.MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", "gigamorph"),
        run_name=out.name,
        tracking_uri=server or f"sqlite:///{own}/mlflow.db",
        artifact_location=None if server else (own / "mlartifacts").as_uri(),
    )


_LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda out: of_lightning.CSVLogger(out, name="csv", version=""),
    "tensorboard": lambda out: of_lightning.TensorBoardLogger(
        out, name="tensorboard", version="", default_hp_metric=False
    ),
    "wandb": _wandb,
    "mlflow": _mlflow,
}


_LIBRARIES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


def require_loggers(names: Sequence[str]) -> None:
    """Check that `make_loggers` can find the loggers, without making them.

    Raises:
        GigamorphError: see `make_loggers`.
    """
    for name in names:
        if ":" in name:
            _import_name(name, "logger")
        elif name not in _LOGGERS:
            raise GigamorphError(f"unknown log {name!r}; use {', '.join(_LOGGERS)}, or module:name of your own logger")
        elif name in _LIBRARIES and not any(map(importlib.util.find_spec, _LIBRARIES[name])):
            raise GigamorphError(f"log {name!r} needs a library that is not installed: pip install {name}")
        elif name == "wandb":
            _require_account()


def _require_account() -> None:
    """Check that Weights & Biases accepts a run; with its older versions, the start of the run checks it."""
    wandb = importlib.import_module("wandb")
    if wandb.setup().settings.mode != "online" or "prompt" not in inspect.signature(wandb.login).parameters:
        return
    try:
        reason = "" if wandb.login(prompt=False) else "no account is configured"
    except Exception as error:  # any error of the library: a server that does not answer
        reason = first_line(error)
    if reason:
        raise GigamorphError(f"cannot start log 'wandb': {reason}; run wandb login, or set WANDB_MODE=offline")


def require_callbacks(names: Sequence[str]) -> None:
    """Check that `make_callbacks` can find the callbacks, without making them.

    Raises:
        GigamorphError: see `make_callbacks`.
    """
    for name in names:
        _import_name(name, "callback")


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Loggers that write into a run's folder: csv, tensorboard, wandb, mlflow, or ``module:name`` of a user's logger.

    A user's logger is a Lightning `Logger`, or a class or function that makes one and may take the folder.

    Raises:
        GigamorphError: for an unknown logger, or one whose library is not installed.
    """
    require_loggers(names)
    found = []
    for name in names:
        if ":" in name:
            found.append(_make_own(name, Logger, "logger", out))
            continue
        try:
            found.append(_LOGGERS[name](out))
        except (ImportError, ModuleNotFoundError) as error:
            raise GigamorphError(f"log {name!r} needs a library that is not installed: pip install {name}") from error
        except Exception as error:  # any error of the library: a server that does not answer
            raise GigamorphError(f"cannot start log {name!r}: {first_line(error)}") from error
    for logger in found:
        logger.finalize = _warns_on_error(logger.finalize)  # type: ignore[method-assign]
    return found


def _warns_on_error(finalize: Callable[[str], None]) -> Callable[[str], None]:
    """`finalize`, which Lightning calls after each stage, with a warning instead of an error."""

    def guarded(status: str) -> None:
        try:
            finalize(status)
        except Exception as error:  # any error of the library: a server that does not respond
            log.warning("cannot close a log: %s", first_line(error))

    return guarded


@contextlib.contextmanager
def logged(loggers: Sequence[Logger], settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Context that starts and ends the loggers of a run; they get its settings and the epochs before a resume.

    TensorBoard's folder still holds those epochs; the other loggers start a new record.

    Raises:
        GigamorphError: if a logger cannot start, such as without an account or a server.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(_plain(settings))
            for row in () if isinstance(logger, of_lightning.TensorBoardLogger) else rows:
                log_row(logger, row)
        except Exception as error:  # any error of the library
            name = type(logger).__name__
            raise GigamorphError(f"{name} cannot log this run: {first_line(error)}") from error
    try:
        yield
    finally:
        for logger in loggers:
            if isinstance(logger, of_lightning.WandbLogger):  # else the next run of this process (a fold) continues it
                try:
                    logger.experiment.finish()
                except Exception as error:  # any error of the library; the training is complete
                    log.warning("wandb: %s", first_line(error))


def _plain(value: Any) -> Any:
    """The value with lists instead of tuples, which other YAML readers cannot read."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def log_row(logger: Logger, row: Mapping[str, Any]) -> None:
    """Log the numbers of an epoch's row in ``log.csv``."""
    logger.log_metrics(numbers_of(row), step=row["epoch"])
    logger.save()


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's row in ``log.csv``, by name."""
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}


def make_callbacks(names: Sequence[str]) -> list[Callback]:
    """Callbacks by ``module:name``: a Lightning `Callback`, or a class or function that makes one.

    Raises:
        GigamorphError: if one cannot be imported or made.
    """
    return [_make_own(name, Callback, "callback") for name in names]


def _import_name(name: str, what: str) -> Any:
    module, _, attribute = name.partition(":")
    require_trusted(f"{what} {name!r}", module)
    with working_directory_on_path():
        return imported(f"{what} {name!r}", module, attribute)


def _make_own(name: str, kind: type, what: str, *arguments: Any) -> Any:
    found = _import_name(name, what)
    with working_directory_on_path():
        if isinstance(found, kind):
            return found
        try:
            made = _call(found, arguments)
        except Exception as error:  # the code is the user's
            raise GigamorphError(f"cannot make {what} {name!r}: {first_line(error)}") from error
    if not isinstance(made, kind):
        raise GigamorphError(f"{what} {name!r} is a {type(made).__name__}; it must be a Lightning {kind.__name__}")
    return made


def _call(found: Any, arguments: Sequence[Any]) -> Any:
    """The result of a user's class or function, called with as many arguments as it requires."""
    wanted = [p for p in inspect.signature(found).parameters.values() if p.default is p.empty]
    return found(*arguments[: len(wanted)])
