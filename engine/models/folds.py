"""The folder of a cross-validation (`gigamorph train --folds`), whose networks are used as one."""

from __future__ import annotations

from pathlib import Path

from ..config import read_values
from ..errors import DataError

CONFIG = "config.toml"


def fold_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoint of each fold; empty if the folder is not that of a cross-validation.

    Raises:
        DataError: a fold is not finished; the message names it.
    """
    folder = Path(folder)
    config = folder / CONFIG
    if not config.is_file():  # it has the number of folds
        return []
    if (folder / "last.ckpt").is_file():  # the folder of a single fold, which has the same config.toml
        return []
    count = read_values(config).get("data", {}).get("folds")
    if count is None:
        return []
    folds = [folder / f"fold{number}" for number in range(1, count + 1)]
    # A fold with another config.toml is not finished for this run: with more epochs, say, the folds resume in order.
    finished = [
        fold
        for fold in folds
        if all((fold / name).is_file() for name in ("best.ckpt", "metrics.json", CONFIG))
        and (fold / CONFIG).read_bytes() == config.read_bytes()
    ]
    if left := [number for number, fold in enumerate(folds, 1) if fold not in finished]:
        one = f"; or use the checkpoint of a finished one, {finished[0] / 'best.ckpt'}" if finished else ""
        raise DataError(
            f"{folder}: fold {left[0]} of {count} is not finished; run gigamorph train --resume --out {folder}{one}"
        )
    return [fold / "best.ckpt" for fold in folds]
