"""Training of the recipe on images: embeddings of all extractors, then the protocols on every subset and repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....config import from_plain
from ....datasets.tables import SPLITS, Record, read_table
from ....errors import DataError
from ....evaluate.class_names import in_order
from ....evaluate.read import write_cases
from ....train.loop import run_stages
from ....train.option_checks import check_stages
from ....train.run import Run, seed_of
from ....train.target import Target
from ..classify import ClassifierTask, classifier_record
from ..features import frozen_features
from ..recipe import begin, finish, recipe_card
from ..sized import Size, open_images
from ..splits import split_records
from ..tensors import log_odds_of
from ..weights import find_weights
from .compare import check_parts, compare_heads, folder, make_head, make_stage, measure, summarise, trainings
from .config import DvmeConfig
from .network import Fused, make_extractor


def train(table: Path, config: DvmeConfig, run: Run) -> dict[str, Any]:
    """Run the protocols on a table's images: train on its train split, select on val, measure on test.

    Writes the embeddings, the checkpoints of every training in a separate folder, and ``metrics.json``: rows (one per
    training), summary (mean and deviation over the folds) and attention (how much each extractor attends to each, over
    the test images, for the DVME head of the first fold of the largest subset). That head's folder also has a model
    card and ``test.csv`` (for `gigamorph eval`).
    Raises:
        DataError: a patient is in two splits, a class has no training images, val or test has only one class, weights
            do not fit, or images cannot be read.
    """
    read = read_table(table)
    records = split_records(read.records, config, run, table=table)
    parts = {name: [r for r in records if r.split == name] for name in SPLITS}
    labels = {name: [r.label for r in own] for name, own in parts.items()}
    classes = len(read.classes)
    if config.metric == "kappa" and classes > 2 and not in_order(read.classes)[1]:
        names = ", ".join(read.classes)
        raise DataError(
            f"{table}: metric kappa needs an order, which the names {names} do not show; number them from 0"
        )
    check_parts(labels, classes)
    for number, own in enumerate(config.extractors):
        run.say(f"extractor {own.name}")
        find_weights(own.weights, config.mean, config.std, run)
        _extractor(config, number, run)  # refuse it before any work
    check_stages(
        [make_stage(name, config) for name in config.protocols if name.startswith("finetune")], run.group.at_once
    )
    begin(run, "dvme", config, records)
    embeddings = _embeddings(config, parts, run)
    known = {name: (embeddings[name], torch.tensor(labels[name])) for name in SPLITS}
    rows, heads = compare_heads(known, classes, config, run)
    rows += _finetune(config, parts, known["train"][0], Target(tuple(read.classes)), run)
    metrics: dict[str, Any] = {
        "classes": read.classes,
        "images": {name: len(own) for name, own in parts.items()},
        "metric": config.metric,
        "rows": rows,
        "summary": summarise(rows),
    }
    if heads:
        largest = next(size for size in sorted(config.subsets, key=lambda size: -(size or len(parts["train"]))))
        fused = [extractor.name for extractor in config.extractors if extractor.fused]
        test = [embeddings["test"][name].to(run.device) for name in fused]
        metrics["attention"] = {
            "extractors": fused,
            "rows_attend_to_columns": heads[largest, 0].head.attention_map(test).tolist(),  # pyright: ignore
        }
        log_odds = log_odds_of(heads[largest, 0], torch.cat([embeddings["test"][name] for name in fused], 1))
        cases = Target(tuple(read.classes)).cases(parts["test"], log_odds)
        own = run.part(folder("dvme", "all", largest, 0))
        write_cases(own.out / "test.csv", cases)
        recipe_card(
            own,
            "dvme",
            config,
            parameters=sum(p.numel() for p in heads[largest, 0].parameters()),
            records=parts,
            classes=read.classes,
            predictions={"test": cases},
        )
    return finish(run, metrics)


def _embeddings(config: DvmeConfig, parts: dict[str, list[Record]], run: Run) -> dict[str, dict[str, Tensor]]:
    """Return (images, dim) of each split and extractor."""
    embeddings: dict[str, dict[str, Tensor]] = {name: {} for name in SPLITS}
    for number, extractor in enumerate(config.extractors):
        network = _extractor(config, number, run)
        for name, own in parts.items():
            found = frozen_features(
                network,
                open_images(own, config),
                run.out / "embeddings",
                size=Size(config.resize, config.crop),
                batch_size=config.batch_size,
                run=run,
                stage=extractor.name,
            )
            embeddings[name][extractor.name] = torch.from_numpy(np.stack(list(found)))
    return embeddings


def restore(record: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Return the fine-tuned network of a checkpoint's record, and an opener of its images."""
    config = from_plain(record["config"], DvmeConfig, "checkpoint")
    chosen = [e for e in config.extractors if e.name in record["extractors"]]
    extractors = [make_extractor(e.model, config.channels, blocks=e.blocks) for e in chosen]
    head = make_head(record["protocol"], record["dims"], len(record["classes"]), config)
    view = Size(config.resize, config.crop).view
    return Fused(extractors, head), lambda records: open_images(records, config, view=view)


def _finetune(
    config: DvmeConfig, parts: dict[str, list[Record]], embeddings: dict[str, Tensor], target: Target, run: Run
) -> list[dict[str, Any]]:
    """Return a row for each training of all layers of one extractor, or of all that are fused with the head."""
    rows, classes = [], len(target.names)
    score, view = measure(config.metric, classes), Size(config.resize, config.crop).view
    test, val = (open_images(parts[name], config, view=view) for name in ("test", "val"))
    truth = [record.label for record in parts["test"]]
    every = [extractor.name for extractor in config.extractors]
    for own in trainings([r.label for r in parts["train"]], classes, config, run, "images"):
        protocol, group = own.row["protocol"], own.names
        networks: list[nn.Module] = [_extractor(config, every.index(name), run) for name in group]
        dims = [embeddings[name].shape[1] for name in group]
        record = classifier_record("dvme", config, target, protocol=protocol, extractors=group, dims=dims)
        records = [parts["train"][i] for i in own.images]
        images = open_images(records, config, view=view, augment=config.augment, seed=own.run.seed)
        torch.manual_seed(seed_of(own.run.seed, 1))
        module = Fused(networks, make_head(protocol, dims, classes, config))
        stage = make_stage(protocol, config, transformer=bool(set(group) & set(config.transformers)))
        task = ClassifierTask(module, images, val, target, run, [stage], record, measure=score, fallback="untiled")
        run_stages(task, [stage], own.run)
        rows.append({**own.row, "test": score(truth, task.log_odds(test))})
    return rows


def _extractor(config: DvmeConfig, number: int, run: Run) -> nn.Module:
    own = config.extractors[number]
    torch.manual_seed(seed_of(run.seed, 0, number))  # random weights if there is no file
    weights = find_weights(own.weights, config.mean, config.std)
    return make_extractor(own.model, config.channels, weights, own.blocks)
