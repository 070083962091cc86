"""The method from table to metrics: parent, morph, check of equality on images, child; and the ablation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....accelerate import accelerate
from ....config import from_plain
from ....datasets.tables import Record
from ....errors import GigamorphError, MorphError
from ....evaluate.cases import Cases
from ....evaluate.roc import delong_interval
from ....models import build_model
from ....morph.files import Grown, save_network
from ....morph.recipe import Recipe, apply
from ....train.loop import RunResult, run_stages
from ....train.option_checks import check_stages
from ....train.run import Run
from ....train.stages import Stage
from ....train.target import Target
from ...data_sets.chestxray14 import FINDINGS
from ..classify import ClassifierTask, auc_of, classifier_record, mirrorings, read_target, results
from ..recipe import begin, finish
from ..weights import build_pretrained, find_weights
from .config import MorphHRConfig
from .grow import grow, without_decay
from .images import child_images, parent_images

_ARM_NAMES = {"direct": "the parent", "scratch": "the child with a new front", "morph": "the morphed child"}
_TOLERANCE = 1e-3  # of float32 logits, relative to the largest: sums over r² pixels have another order


@dataclass(frozen=True)
class _Data:
    parts: dict[str, list[Record]]
    target: Target
    config: MorphHRConfig
    run: Run

    def task(self, net: Grown, images: Any, stages: Sequence[Stage]) -> ClassifierTask:
        """Build the training of a network on `parent_images` or `child_images`."""
        config, known = self.config, {"morphs": net.recipe.to_json(), "full": images is child_images}
        train = images(self.parts["train"], config, augment=config.augment, seed=self.run.seed)
        val, record = images(self.parts["val"], config), classifier_record("morphhr", config, self.target, **known)
        balanced = config.balanced
        return ClassifierTask(net.network, train, val, self.target, self.run, stages, record, balanced=balanced)


def restore(record: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """Return the network of a checkpoint's record, and an opener of its images."""
    config, recipe = from_plain(record["config"], MorphHRConfig, "checkpoint"), Recipe.from_json(record["morphs"])
    network = build_model(config.model, len(record["classes"]), config.channels)
    images = child_images if record["full"] else parent_images
    return apply(recipe, network), lambda records: images(records, config)


def train(table: Path, config: MorphHRConfig, run: Run) -> dict[str, Any]:
    """Run MorphHR on a table of images; ``docs/recipes/morphhr.md`` lists the written files.

    Args:
        table: a csv or folder for `read_table`, with high-resolution images.

    Returns:
        The content of ``metrics.json``: for each arm its area under the ROC curve per image (the mean over the labels,
        and each) and its epochs; and the difference of parent and morphed child on validation images.

    Raises:
        DataError: the table or an image is wrong.
        MorphError: no exact front exists for the network.
        GigamorphError: a loss is not finite, or the folder contains another run.
    """
    parts, target = read_target(table, config.task, config.labels, config, run)
    if set(target.names) & set(FINDINGS) and any(up_down for _, up_down in mirrorings(config.augment)):
        raise GigamorphError(
            "the labels are those of chest radiographs, which are never upside down; set flip=left-right in augment"
        )
    weights = find_weights(config.weights, config.mean, config.std, run)
    torch.manual_seed(run.seed)
    network = build_pretrained(config.model, len(target.names), config.channels, weights)
    parent = Grown(network, channels=config.channels)
    _check_config(parent, config, run)
    begin(run, "morphhr", config, [record for part in parts.values() for record in part])
    data = _Data(parts, target, config, run)
    run.say(f"fine-tuning {config.model} at 1/{config.factor} of the resolution")
    task = data.task(parent, parent_images, config.low)
    trained = run_stages(task, config.low, run.part("parent"))
    metrics: dict[str, Any] = {}
    if "finetune" in config.arms:
        metrics["finetune"] = _results(data, task, parent_images, trained, "parent")
    for arm in ("direct", "scratch", "morph"):
        if arm not in config.arms:
            continue
        torch.manual_seed(run.seed)
        child, stages = copy.deepcopy(parent), (arm == "direct" and config.direct) or config.high
        if arm != "direct":
            child, reports = grow(child, config, run.seed, renew=arm == "scratch")
        if arm == "morph":
            for line in reports[-1].changes if not config.widen else reports[0].changes:
                run.say(line)
            metrics["difference"] = _compare(data, parent, child)
        run.say(f"training {_ARM_NAMES[arm]} at full resolution")
        task = data.task(child, child_images, stages)
        trained = run_stages(task, without_decay(stages, child.network), run.part(arm))
        save_network(run.out / arm / "model.safetensors", child)
        metrics[arm] = _results(data, task, child_images, trained, arm)
    last = next(arm for arm in ("morph", "scratch", "direct", "finetune") if arm in config.arms)
    return finish(run, {"auc": metrics[last]["auc"], **metrics})


def _check_config(parent: Grown, config: MorphHRConfig, run: Run) -> None:
    """Refuse invalid stages and fronts before the parent is trained."""
    check_stages(config.low, run.group.at_once, parent.network)
    if "direct" in config.arms:
        try:
            check_stages(config.direct or config.high, run.group.at_once, parent.network)
        except GigamorphError as error:
            if config.direct:
                raise
            raise GigamorphError(f"{error}; for the arm direct, on the parent itself, add stages [[direct]]") from error
    if {"scratch", "morph"} & set(config.arms):
        child, _ = grow(copy.deepcopy(parent), config, run.seed)
        check_stages(config.high, run.group.at_once, child.network)


def _compare(data: _Data, parent: Grown, child: Grown) -> float:
    """Return the largest difference of parent and child on validation images before training.

    Raises:
        MorphError: it exceeds rounding, although the functions were equal in float64.
    """
    records, config, budget = data.parts["val"][:4], data.config, data.run.memory_budget
    nets = [accelerate(g.network.eval().to(data.run.device), memory_budget=budget) for g in (parent, child)]
    worst, largest = 0.0, 1.0
    with torch.no_grad():
        small, large = parent_images(records, config), child_images(records, config)
        for i in range(len(records)):
            first, second = nets[0](small[i]["image"]).double(), nets[1](large[i]["image"]).double()
            worst = max(worst, (first - second).abs().max().item())
            largest = max(largest, first.abs().max().item())
    if not worst <= _TOLERANCE * largest:
        raise MorphError(f"parent and child differ by {worst:g} on validation images; report this as an issue")
    data.run.say(f"parent and morphed child agree to {worst:.1e} on {len(records)} validation images")
    return worst


def _results(data: _Data, task: ClassifierTask, images: Any, trained: RunResult, folder: str) -> dict[str, Any]:
    test, own = images(data.parts["test"], data.config), data.run.part(folder)
    found, cases = results("morphhr", data.config, task, trained, data.parts, test, own, evidence=True)
    return found | _scores(cases) if len(cases) else found


def _scores(cases: Cases) -> dict[str, Any]:
    mean, each = auc_of(cases)
    if len(each) > 1:
        return {"auc": mean, "labelwise": each}
    known = ~np.isnan(cases.truth[:, 0])
    interval = delong_interval(cases.truth[known, 0], cases.scores[known, 0]) if mean is not None else None
    return {"auc": mean, "interval": interval and list(interval)}
