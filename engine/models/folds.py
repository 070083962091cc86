"""The folder of a cross-validation (`gigamorph train --folds`), whose networks stand together for one."""

from __future__ import annotations

from pathlib import Path

from ..config import read_values
from ..errors import DataError

CONFIG = "config.toml"


def fold_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint of each fold; none where the folder is of something else.

    Raises:
        DataError: a fold is not finished, which is named.
    """
    folder = Path(folder)
    config = folder / CONFIG
    if not config.is_file():  # it says how many there are
        return []
    if (folder / "last.ckpt").is_file():  # of a single fold, whose own config.toml says the same
        return []
    count = read_values(config).get("data", {}).get("folds")
    if count is None:
        return []
    folds = [folder / f"fold{number}" for number in range(1, count + 1)]
    # A fold that another config.toml is of is not of this run: with more epochs, say, they go on one after the other.
    finished = [
        fold
        for fold in folds
        if all((fold / name).is_file() for name in ("best.ckpt", "metrics.json", CONFIG))
        and (fold / CONFIG).read_bytes() == config.read_bytes()
    ]
    if left := [number for number, fold in enumerate(folds, 1) if fold not in finished]:
        one = f"; or name the checkpoint of one that is, {finished[0] / 'best.ckpt'}" if finished else ""
        raise DataError(
            f"{folder}: fold {left[0]} of {count} is not finished; gigamorph train --resume --out {folder} goes on{one}"
        )
    return [fold / "best.ckpt" for fold in folds]
