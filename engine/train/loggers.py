"""Lightning's loggers and callbacks by name, beside our own ``log.csv``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from ..models.compat import make_torchvision_importable
from ..models.own_code import imported, working_directory_on_path
from ..models.weights import first_line

make_torchvision_importable()

from lightning.pytorch import loggers as of_lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402

_MADE: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda out: of_lightning.CSVLogger(out, name="csv", version=""),
    "tensorboard": lambda out: of_lightning.TensorBoardLogger(out, name="tensorboard", version=""),
    "wandb": lambda out: of_lightning.WandbLogger(save_dir=out, name=out.name),
    "mlflow": lambda out: of_lightning.MLFlowLogger(run_name=out.name, tracking_uri=f"file:{out.absolute()}/mlruns"),
}


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Loggers that write into a run's folder: csv, tensorboard, wandb, mlflow, or ``module:name`` of one's own.

    One's own is a `Logger` of Lightning, or a class or function that makes one; it may take the folder.

    Raises:
        GigamorphError: one that is unknown, or whose library is not installed.
    """
    found = []
    for name in names:
        if ":" in name:
            found.append(_own(name, Logger, "logger", out))
            continue
        if name not in _MADE:
            raise GigamorphError(f"log {name!r} is unknown; take {', '.join(_MADE)}, or module:name of your own")
        try:
            found.append(_MADE[name](out))
        except (ImportError, ModuleNotFoundError) as error:
            raise GigamorphError(f"log {name!r} needs a library that is not installed: pip install {name}") from error
    return found


def make_callbacks(names: Sequence[str]) -> list[Callback]:
    """Callbacks by ``module:name``: a `Callback` of Lightning, or a class or function that makes one.

    Raises:
        GigamorphError: one that cannot be imported or made.
    """
    return [_own(name, Callback, "callback") for name in names]


def _own(name: str, kind: type, what: str, *arguments: Any) -> Any:
    module, _, attribute = name.partition(":")
    with working_directory_on_path():
        found = imported(f"{what} {name!r}", module, attribute)
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
