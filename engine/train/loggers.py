"""Lightning's loggers and callbacks by name, beside our own ``log.csv``."""

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
"""Of runs of this process."""


def _mlflow(out: Path) -> Logger:
    """Of the server in MLFLOW_TRACKING_URI, else in a database of the run's folder: MLflow ended its plain files.

    MLflow writes the address that it is given into that variable, where the next fold finds it.
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


_MADE: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda out: of_lightning.CSVLogger(out, name="csv", version=""),
    "tensorboard": lambda out: of_lightning.TensorBoardLogger(
        out, name="tensorboard", version="", default_hp_metric=False
    ),
    "wandb": _wandb,
    "mlflow": _mlflow,
}


_LIBRARIES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


def require_loggers(names: Sequence[str]) -> None:
    """Look whether `make_loggers` will find them, without making any.

    Raises:
        GigamorphError: see there.
    """
    for name in names:
        if ":" in name:
            _found(name, "logger")
        elif name not in _MADE:
            raise GigamorphError(f"log {name!r} is unknown; take {', '.join(_MADE)}, or module:name of your own")
        elif name in _LIBRARIES and not any(map(importlib.util.find_spec, _LIBRARIES[name])):
            raise GigamorphError(f"log {name!r} needs a library that is not installed: pip install {name}")
        elif name == "wandb":
            _require_account()


def _require_account() -> None:
    """That Weights & Biases will take a run; of its older versions that is found when the run begins."""
    wandb = importlib.import_module("wandb")
    if wandb.setup().settings.mode != "online" or "prompt" not in inspect.signature(wandb.login).parameters:
        return
    try:
        told = "" if wandb.login(prompt=False) else "no account is configured"
    except Exception as error:  # the library's own: a server that does not answer
        told = first_line(error)
    if told:
        raise GigamorphError(f"log 'wandb' cannot be begun: {told}; run wandb login, or set WANDB_MODE=offline")


def require_callbacks(names: Sequence[str]) -> None:
    """Look whether `make_callbacks` will find them, without making any.

    Raises:
        GigamorphError: see there.
    """
    for name in names:
        _found(name, "callback")


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Loggers that write into a run's folder: csv, tensorboard, wandb, mlflow, or ``module:name`` of one's own.

    One's own is a `Logger` of Lightning, or a class or function that makes one; it may take the folder.

    Raises:
        GigamorphError: one that is unknown, or whose library is not installed.
    """
    require_loggers(names)
    found = []
    for name in names:
        if ":" in name:
            found.append(_own(name, Logger, "logger", out))
            continue
        try:
            found.append(_MADE[name](out))
        except (ImportError, ModuleNotFoundError) as error:
            raise GigamorphError(f"log {name!r} needs a library that is not installed: pip install {name}") from error
        except Exception as error:  # the library's own: a server that does not answer
            raise GigamorphError(f"log {name!r} cannot be begun: {first_line(error)}") from error
    for logger in found:
        logger.finalize = _guarded(logger.finalize)  # type: ignore[method-assign]
    return found


def _guarded(finalize: Callable[[str], None]) -> Callable[[str], None]:
    """Lightning ends loggers after each stage; what they cannot end ends no run."""

    def guarded(status: str) -> None:
        try:
            finalize(status)
        except Exception as error:  # the library's own: a server that has gone
            log.warning("a log cannot be ended: %s", first_line(error))

    return guarded


@contextlib.contextmanager
def logged(loggers: Sequence[Logger], settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Begin and end loggers around a run: they get its settings, and the epochs that it had before it was resumed.

    TensorBoard's folder has those epochs still; the others begin anew.

    Raises:
        GigamorphError: one that cannot begin: no account, no server.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(_plain(settings))
            for row in () if isinstance(logger, of_lightning.TensorBoardLogger) else rows:
                log_row(logger, row)
        except Exception as error:  # the library's own
            name = type(logger).__name__
            raise GigamorphError(f"{name} cannot log this run: {first_line(error)}") from error
    try:
        yield
    finally:
        for logger in loggers:
            if isinstance(logger, of_lightning.WandbLogger):  # else the next run of this process, a fold, joins it
                try:
                    logger.experiment.finish()
                except Exception as error:  # the library's own; what was trained is there
                    log.warning("wandb: %s", first_line(error))


def _plain(value: Any) -> Any:
    """Lists in the place of tuples, which YAML files have under a name that only Python's own reader knows."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def log_row(logger: Logger, row: Mapping[str, Any]) -> None:
    """The numbers of an epoch's row in ``log.csv``."""
    logger.log_metrics(numbers_of(row), step=row["epoch"])
    logger.save()


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What of an epoch's row in ``log.csv`` is a number, by name."""
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}


def make_callbacks(names: Sequence[str]) -> list[Callback]:
    """Callbacks by ``module:name``: a `Callback` of Lightning, or a class or function that makes one.

    Raises:
        GigamorphError: one that cannot be imported or made.
    """
    return [_own(name, Callback, "callback") for name in names]


def _found(name: str, what: str) -> Any:
    module, _, attribute = name.partition(":")
    require_trusted(f"{what} {name!r}", module)
    with working_directory_on_path():
        return imported(f"{what} {name!r}", module, attribute)


def _own(name: str, kind: type, what: str, *arguments: Any) -> Any:
    found = _found(name, what)
    with working_directory_on_path():
        if isinstance(found, kind):
            return found
        try:
            made = _called(found, arguments)
        except Exception as error:  # the code is the user's
            raise GigamorphError(f"{what} {name!r} cannot be made: {first_line(error)}") from error
    if not isinstance(made, kind):
        raise GigamorphError(f"{what} {name!r} gives a {type(made).__name__}, not a {kind.__name__} of Lightning")
    return made


def _called(found: Any, arguments: Sequence[Any]) -> Any:
    """One's own class or function takes the arguments if it takes any."""
    wanted = [p for p in inspect.signature(found).parameters.values() if p.default is p.empty]
    return found(*arguments[: len(wanted)])
