"""Every recipe at the size of seconds, on one table that all of them can be run on; in one process or in several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gigamorph.engine.datasets.tables import Finding, Record, write_table
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography.recipes import get_recipe
from gigamorph.engine.mammography.recipes.cae import CaeConfig
from gigamorph.engine.mammography.recipes.dvme import DvmeConfig, ExtractorConfig
from gigamorph.engine.mammography.recipes.end2end.config import End2EndConfig, Model, Sampling, TopBlock
from gigamorph.engine.mammography.recipes.morphhr.config import MorphHRConfig
from gigamorph.engine.mammography.recipes.siamese import SiameseConfig
from gigamorph.engine.parallel.process_group import ProcessGroup
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage

_NET, _IMAGES = "lesionnet?stages=1", {"channels": 1, "mean": (0.5,), "std": (0.25,)}
_SPLITS = ("train", "train", "train", "train", "val", "val", "test", "test")


def configs(accumulate: int) -> dict[str, Any]:
    """Of every recipe; optimizer steps are of as many batches."""
    several = {"batch_size": 2, "accumulate": accumulate}
    stage = Stage("all", 1, 1e-3, **several)
    return {
        "cae": CaeConfig(
            **_IMAGES,
            **several,
            model=_NET,
            weights="random",
            layer="stages",
            resize=(32, 24),
            code_channels=(6,),
            epochs=2,
            plateau=None,
            folds=2,
            finetune=(stage,),
        ),
        "dvme": DvmeConfig(
            **_IMAGES,
            **several,
            extractors=(ExtractorConfig("a", _NET), ExtractorConfig("b", _NET)),
            protocols=("linear", "dvme", "finetune_dvme"),
            resize=(32, 24),
            crop=0,
            subsets=(0,),
            folds=1,
            p=4,
            hidden=8,
            epochs=1,
        ),
        "end2end": End2EndConfig(
            **_IMAGES,
            resize=(48, 40),
            augment="flip",
            sampling=Sampling(16, 2, 2),
            models=(
                Model(
                    "a",
                    "gigamorph.engine.mammography.recipes.end2end.synthetic:SmallNet",
                    "random",
                    blocks=(TopBlock("vgg", 4),),
                    heatmap=True,
                    heatmap_pool=(2, 1),
                ),
            ),
            patch=(stage,),
            whole=(replace(stage, name="live"), replace(stage, batch_norm="eval")),
        ),
        "morphhr": MorphHRConfig(
            **_IMAGES,
            model=_NET,
            weights="random",
            factor=2,
            filters=4,
            augment="flip",
            arms=("finetune", "morph"),
            low=(stage,),
            high=(stage,),
        ),
        "siamese": SiameseConfig(
            **_IMAGES,
            **several,
            model=_NET,
            layer="stages",
            mirror="table",
            registration="none",
            patch=16,
            stride=16,
            dim=4,
            warm_up=1,
            epochs=2,
            hidden=8,
            starts=("siamese", "byol"),
            labelled=(1.0,),
            probe_epochs=1,
        ),
    }


def write(folder: Path, splits: Sequence[str] = _SPLITS) -> Path:
    """A table of two breasts of patients; every second one has a mass in the left one."""
    records = []
    for number, split in enumerate(splits):
        for side in "LR":
            rng = np.random.default_rng([number, side == "L"])
            image, ill = rng.integers(20000, 30000, (48, 40), dtype=np.uint16), number % 2 == 1 and side == "L"
            image[:, 36:] = 0
            if ill:
                image[16:28, 14:26] += 25000
            path = folder / f"{number}{side}.npy"
            np.save(path, image if side == "L" else image[:, ::-1])
            findings = (Finding("mass", (16, 28, 14, 26), pathology="malignant"),) if ill else ()
            records.append(Record(path, int(ill), f"p{number}", split, laterality=side, view="CC", findings=findings))
    return write_table(folder / "table.csv", records, ["0", "1"])


def run_recipe(name: str, table: Path, out: Path, accumulate: int, precision: Any = "fp32") -> Any:
    """The metrics of a recipe that the processes of the group train together, or what it ended with."""
    run = Run(out, seed=3, precision=precision, group=ProcessGroup.here(False))
    try:
        return get_recipe(name).train(table, configs(accumulate)[name], run)
    except GigamorphError as error:
        return repr(error)
