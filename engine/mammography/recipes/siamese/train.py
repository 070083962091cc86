"""Training of the recipe on images: pairs, patches, two networks; soft labels, asymmetry maps, and a probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....datasets.tables import SPLITS, read_table
from ....datasets.tables.cells import write_csv
from ....evaluate.read import write_cases
from ....evaluate.roc import auc
from ....train.loop import run_stages
from ....train.option_checks import check_stages
from ....train.run import Run
from ..recipe import begin, finish, recipe_card
from ..splits import split_records
from ..weights import find_weights
from .config import SiameseConfig
from .full_images import centres, classes_of, holds, label_pairs, localisation, localisation_line, write_images
from .mixture import Judge
from .network import Embedding
from .pairs import find_pairs
from .patches import PatchFile, PatchFiles, patch_pairs, single_patches, write_patches
from .probe import fine_tuned, patch_cases, probed
from .starts import make_network, make_starts, write_encoder
from .task import SiameseTask

_LABEL_COLUMNS = ("patient_id", "exam_id", "view", "top", "left", "distance", "soft_label")


def train(table: Path, config: SiameseConfig, run: Run) -> dict[str, Any]:
    """Learn from a table's pairs of contralateral views; labels are used only by the probe.

    Writes the patches, the checkpoints, ``encoder.pt`` (a state_dict of the backbone, for `create_model`),
    ``model_card.md``, ``soft_labels.csv`` (a row per pair of patches: place, distance, label), ``maps/NAME.tif`` (the
    distances over each pair of the test split, at native resolution, on the left breast's grid), ``images.csv`` (scores
    of the test split's full images), ``probe/START_SHARE/test_probe.csv`` and ``test_fine_tuned.csv`` (for `gigamorph
    eval`) and ``metrics.json``.

    Raises:
        DataError: a patient is in two splits, a contralateral view is missing, or an image cannot be read.
    """
    read = read_table(table, labels=False)
    records = split_records(read.records, config, run, table=table, validation=False)
    pairs = {name: [] for name in SPLITS}
    for pair in find_pairs(records, skip_unpaired=config.skip_unpaired, say=run.say):
        pairs[str(pair.left.split)].append(pair)
    if config.weights != "timm":
        find_weights(config.weights, config.mean, config.std, run)
    make_network(config, run, 0, weights=False)  # refuse it before any work
    stage = config.stage("pairs")
    check_stages([stage], run.group.at_once)
    begin(run, "siamese", config, records)
    files = {name: [write_patches(pair, config, run.out / "patches") for pair in own] for name, own in pairs.items()}
    patches = patch_pairs(files["train"])
    patients = [patches.files[number].pair.left.patient_id for number, _ in patches.places]
    networks = [make_network(config, run, number) for number in range(2 if config.dual else 1)]
    task = SiameseTask(networks, patches, patients, config, run.device)
    run_stages(task, [stage], run)
    judges = [Judge.fit(task.distances(network)[0], config) for network in networks]
    _write_labels(run, judges, patches)
    write_encoder(networks[0], run.out)
    metrics: dict[str, Any] = {
        "pairs": {name: len(own) for name, own in pairs.items()},
        "patches": {name: sum(len(file.cells) for file in own) for name, own in files.items()},
        "epochs": task.history,
        "probe": _downstream(files, patches, networks[0], config, run),
    }
    scores = label_pairs(pairs["test"], networks, judges, config, run) if config.maps or config.scores else []
    if config.maps:
        metrics["maps"] = {f"maps/{number}.tif": pair.name for number, pair in enumerate(pairs["test"])}
    if config.scores:
        findings = any(record.findings for record in records)
        metrics["images"] = write_images(pairs["test"], scores, classes_of(table), findings, run)
        metrics["localisation"] = localisation([one["places"] for one in scores])
    recipe_card(
        run,
        "siamese",
        config,
        parameters=sum(p.numel() for p in networks[0].parameters()),
        records={name: [record for record in records if record.split == name] for name in SPLITS},
        output=f"maps of {config.layer}, their projection, and distances of pairs of patches",
        measured=[
            *_probe_lines(metrics["probe"]),
            *_image_lines(metrics.get("images", "not requested")),
            localisation_line(metrics.get("localisation", "not requested")),
        ],
    )
    return finish(run, metrics)


def _probe_lines(probe: Any) -> list[str]:
    """Format the comparison of the starts as lines of the model card."""
    if isinstance(probe, str):
        return [f"- Patches were not classified: {probe}."]
    return [
        f"- Patches with a finding against others, {row['patches']} labelled ones ({row['fraction']:.0%}), start "
        f"{row['start']}: AUC {row['probe']:.3f} by a linear probe, {row['fine_tuned']:.3f} fine-tuned."
        for row in probe
    ]


def _image_lines(images: Any) -> list[str]:
    """Format the scores of full images as lines of the model card."""
    if isinstance(images, str):
        return [f"- Full images were not measured: {images}."]
    return [
        f"- Full images of the test split by the pairs: {row['count']} {row['level']}s, {row['positive']} with a "
        f"{row['truth']}: AUC {row['largest_soft_label']:.3f} by the largest soft label, {row['largest_distance']:.3f} "
        "by the largest distance."
        for row in images
    ]


def _write_labels(run: Run, judges: Sequence[Judge], patches: PatchFiles) -> None:
    distances = np.mean([judge.distances for judge in judges], 0)
    labels = np.mean([judge.labels(judge.distances) for judge in judges], 0)
    rows = []
    for index, measured in enumerate(zip(distances.tolist(), labels.tolist(), strict=True)):
        number, cell = patches.places[index]
        own = patches.files[number]
        first = own.pair.left
        rows.append([first.patient_id, first.exam_id, first.view, *own.cells[cell].tolist(), *measured])
    write_csv(run.out / "soft_labels.csv", _LABEL_COLUMNS, rows)


def _downstream(
    files: dict[str, list[PatchFile]], patches: PatchFiles, network: Embedding, config: SiameseConfig, run: Run
) -> Any:
    """Return the test AUC of classifying patches with a finding, for fractions of the labelled patches."""
    x, y = _labelled(files["train"])
    test, test_y = _labelled(files["test"])
    if min(len(set(part.tolist())) for part in (y, test_y)) < 2:
        return "the table has no findings in patches of both the train and the test split"
    starts = make_starts(network, patches, config, run)
    rows = []
    for fraction in config.labelled:
        chosen = _fraction(y, fraction, run.seed)
        for name, start in starts.items():
            own = run.part(f"probe/{name}_{fraction}")
            scores = {
                "probe": probed(start, x.take(chosen.tolist()), y[chosen], test),
                "fine_tuned": fine_tuned(start, x.take(chosen.tolist()), y[chosen], test, config, own),
            }
            for key, value in scores.items():
                write_cases(own.out / f"test_{key}.csv", patch_cases(test, test_y, value))
            found = {key: auc(test_y.numpy(), value) for key, value in scores.items()}
            rows.append({"fraction": fraction, "patches": len(chosen), "start": name, **found})
    return rows


def _fraction(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Return indices of that share of each class, at least two per class."""
    found = []
    for label in (0, 1):
        own = torch.nonzero(y == label)[:, 0].numpy()
        count = min(len(own), max(2, round(fraction * len(own))))
        found.append(np.random.default_rng([seed, label]).permutation(own)[:count])
    return torch.from_numpy(np.concatenate(found))


def _labelled(files: Sequence[PatchFile]) -> tuple[PatchFiles, Tensor]:
    """Return single patches of both breasts, and whether each contains the centre of a finding."""
    patches = single_patches(files)
    sides = [(centres(file.pair.left), centres(file.pair.right)) for file in files]
    found = [[holds(file.boxes[side], own[side]) for side in range(2)] for file, own in zip(files, sides, strict=True)]
    return patches, torch.tensor([int(found[f][side][cell]) for f, (cell, side) in patches.places])
