"""Classification of whole images: targets, loss, score, training, averaged predictions and evidence maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...accelerate import accelerate
from ...config import to_plain
from ...datasets.augment import Augment
from ...datasets.flips import FLIPS
from ...datasets.tables import SPLITS, Record, label_columns, read_table
from ...datasets.views import MirroredSource
from ...errors import DataError, GigamorphError
from ...evaluate import odds
from ...evaluate.cases import Array, Cases
from ...evaluate.read import write_cases
from ...evaluate.roc import labelwise_auc
from ...images.pixels import as_stored
from ...models.outputs import set_outputs
from ...train.classify import logits_of_items
from ...train.data import Images
from ...train.explanation import caption, explain_class, log_odds_of
from ...train.heatmap import overlay_name, write_overlay
from ...train.image_task import ImageTask
from ...train.loop import RunResult
from ...train.run import Run
from ...train.stages import Stage
from ...train.target import Target
from ...train.task import Score
from ..data_sets.chestxray14 import FINDINGS
from .recipe import recipe_card
from .splits import ImagesConfig, split_records
from .tensors import Measure

SHOWN = 4


def select_examples(records: Sequence[Record], target: Target, count: int = SHOWN) -> list[tuple[int, int]]:
    """Return the numbers of at most ``count`` evenly spread images, each with the class or label to show.

    The choice depends only on the truth, so that several networks are shown on the same images: those of the last
    class, or with labels those that have one.
    """
    truth = np.nan_to_num(target.truth(records))
    if target.kind != "labels":
        truth[:, :-1] = 0
    positive = [(number, int(row.argmax())) for number, row in enumerate(truth) if row.any()]
    return (
        [positive[n] for n in sorted({round(n) for n in np.linspace(0, len(positive) - 1, count)})] if positive else []
    )


def draw_evidence(net: Any, images: Images, target: Target, run: Run) -> list[str]:
    """Write ``evidence/NUMBER.png`` into the run's folder, drawn over the stored images; a collective of the group.

    Args:
        net: accelerated, in evaluation mode.
        images: images of the test split.

    Returns:
        A line for each picture, or the reason why there is none.
    """
    wanted, group, lines = select_examples(images.records, target), run.group, []
    if target.outputs is not None:
        set_outputs(net, target.outputs)
    for position in range(group.turn, len(wanted), group.at_once):
        number, which = wanted[position]
        try:
            with torch.no_grad():
                found, logits, _ = explain_class(net, images[number]["image"], which)
        except GigamorphError as error:
            lines.append(f"no evidence map: {error}")
            continue
        text = caption(target.names[which], float(log_odds_of(logits[None].double(), which, target.outputs)[0]))
        name = f"evidence/{overlay_name(str(position + 1), as_stored(found.source).shape)}"
        if group.speaks:
            (run.out / "evidence").mkdir(parents=True, exist_ok=True)
            write_overlay(found, run.out / name, stored=True, caption=text)
        lines.append(f"{name}: {text}")
    return list(dict.fromkeys(group.in_order(lines))) or ["no map: the test split has no image to show"]


PLAIN = ((False, False),)


def mirrorings(augment: str) -> tuple[tuple[bool, bool], ...]:
    """Return the flips that an augmentation draws in training, including none; averaging over others would not be
    valid."""
    left_right, up_down = FLIPS.get(Augment.parse(augment).flip, (False, False))
    return *PLAIN, *((across, down) for across, down in FLIPS.values() if across <= left_right and down <= up_down)


def predict(
    net: Callable[[Any], Any],
    images: Images,
    numbers: Sequence[int],
    flips: Sequence[tuple[bool, bool]] = PLAIN,
    *,
    labels: bool = False,
    batch: int = 1,
) -> Array:
    """Return log-odds (images, outputs) of each output's mean probability over mirrored images.

    Args:
        net: a list of pixel sources -> logits (images, outputs); in evaluation mode.
        numbers: numbers of the images to predict.
        labels: outputs are labels with a sigmoid each; otherwise classes with a softmax.
        batch: number of images per step.
    """
    found = []
    with torch.no_grad():
        for first in range(0, len(numbers), batch):
            sources = [images[i]["image"] for i in numbers[first : first + batch]]
            seen = []
            for left_right, up_down in flips:
                mirrored = left_right or up_down
                views = [MirroredSource(s, left_right=left_right, up_down=up_down) if mirrored else s for s in sources]
                seen.append(net(views).double().cpu().numpy())
            logits = np.stack(seen)
            found.append(odds.mean(logits if labels else odds.of_logits(logits)))
    return np.concatenate(found) if found else np.empty((0, 0))


def averaged(members: Sequence[Cases]) -> Cases:
    """Return the ensemble of networks that predicted the same images: the mean of their probabilities."""
    return replace(members[0], scores=odds.mean(np.stack([member.scores for member in members])))


def auc_of(cases: Cases) -> tuple[float | None, dict[str, float | None]]:
    """Return the mean area under the ROC curves, and that of each output; None if it is undefined."""
    mean, each = labelwise_auc(cases.truth, cases.scores)
    return mean, dict(zip(cases.outputs, each, strict=True))


def cross_entropy(cases: Cases) -> float:
    """Return the mean over images of minus the log probability of the known truth."""
    known = ~np.isnan(cases.truth)
    signed = np.where(cases.truth == 1, cases.scores, -cases.scores)
    if cases.kind == "classes":  # only the true class of each image counts
        known &= cases.truth == 1
    return float(np.logaddexp(0, -signed[known]).mean())


def read_target(
    table: str | Path, kind: Literal["classes", "labels"], labels: Sequence[str], config: ImagesConfig, run: Run
) -> tuple[dict[str, list[Record]], Target]:
    """Read a table's records by split, and its target.

    Args:
        labels: names of label columns (``label_NAME``), for ``kind="labels"``; empty for all of them, or for the 14
            findings of ChestX-ray14.

    Raises:
        DataError: the table is wrong, a patient is in two splits, a label does not exist, or training or validation
            images have only one class.
    """
    read = read_table(table, labels=kind == "classes")
    if kind == "classes":
        target = Target(tuple(read.classes))
    else:
        columns = label_columns(table, read.records, labels)
        # The data set's table has one more column, which says whether there is any finding.
        every = FINDINGS if set(FINDINGS) <= set(columns) else tuple(columns)
        target = Target(tuple(labels) or every, "labels")
    records = split_records(read.records, config, run, table=table)
    parts = {name: [r for r in records if r.split == name] for name in SPLITS}
    require_both(parts, target)
    return parts, target


def require_both(parts: dict[str, list[Record]], target: Target) -> None:
    """Refuse training or validation images in which some output has only one value."""
    for split in ("train", "val"):
        truth = target.truth(parts[split])
        for name, column in zip(target.names, truth.T if len(truth) else np.empty((len(target.names), 0)), strict=True):
            values = np.unique(column[~np.isnan(column)])
            if len(values) < 2:
                what = _describe_single_value(target, name, values[0]) if len(values) else "no images"
                raise DataError(
                    f"split {split} has {what}; add patients of both kinds, or remove the column split if there are "
                    "several of each"
                )


def _describe_single_value(target: Target, name: str, value: float) -> str:
    """Describe images in which an output has only one value."""
    if target.kind == "labels":
        return f"only images with {name} = {value:g}"
    if len(target.names) == 2 and not value:
        name, value = next(other for other in target.names if other != name), 1
    return f"{'only' if value else 'no'} images of class {name}"


def classifier_record(recipe: str, config: Any, target: Target, **more: Any) -> dict[str, Any]:
    """Return the checkpoint record of a recipe's classifier, for `open_classifier`."""
    labels = {"target": target.to_plain()} if target.kind == "labels" else {}
    # Checkpoints are shared: they must not name files or describe patients.
    plain = to_plain(config, omit=("weights", "start", "patients"))
    return {"recipe": recipe, "classes": list(target.names), "config": plain, **labels, **more}


class ClassifierTask(ImageTask):
    """A classifier trained on whole images of any size, inside a memory budget.

    Args:
        module: (N, C, H, W) -> (N, outputs).
        train, val, record: see `ImageTask`; the best epoch has the largest mean area under the ROC curves. Without
            validation images it is that with the smallest training loss.
        run: its memory budget; and whether the processes of its group share each image, unless there is a fallback.
        stages: predictions have their largest batches.
        balanced: see `Target.loss`.
        stop_by_loss: patience uses the mean cross-entropy of the validation images instead of the score.
        measure: replaces the area under the ROC curves; only for classes.
        fallback: see `accelerate`.
    """

    def __init__(
        self,
        module: nn.Module,
        train: Images,
        val: Images,
        target: Target,
        run: Run,
        stages: Sequence[Stage],
        record: Mapping[str, Any] | None = None,
        *,
        balanced: bool = False,
        stop_by_loss: bool = False,
        measure: Measure | None = None,
        fallback: str | None = None,
    ) -> None:
        split = fallback is None and run.group.split
        net = accelerate(module, memory_budget=run.memory_budget, split=split, fallback=fallback)
        super().__init__(module, net, train, val, record or {})
        self.target, self.balanced, self.stop_by_loss = target, balanced, stop_by_loss
        self.batch = max(stage.batch_size for stage in stages)
        self.measure, self.best_by_loss = measure, not len(val)

    def loss(self, batch: Sequence[Any]) -> Tensor:
        self.meter.image(sum(item["image"].shape[-2] * item["image"].shape[-1] for item in batch))
        logits = logits_of_items(self.net, batch)
        truth = self.target.truth([item["record"] for item in batch])
        return self.target.loss(logits, truth, balanced=self.balanced)

    def score(self) -> Score | float | None:
        if not len(self.val):
            return None
        if self.measure is not None:
            return self.measure([record.label for record in self.val.records], self.log_odds(self.val))
        cases = self.predict(self.val)
        area = auc_of(cases)[0]
        if area is None or not self.stop_by_loss:
            return area
        return Score(area, stop=-cross_entropy(cases))

    def predict(self, images: Images, flips: Sequence[tuple[bool, bool]] = PLAIN) -> Cases:
        """Return the predictions of `log_odds` with the truth."""
        return self.target.cases(images.records, self.log_odds(images, flips))

    def log_odds(self, images: Images, flips: Sequence[tuple[bool, bool]] = PLAIN) -> Array:
        """Predict for images, averaged over mirrored ones, (images, outputs); the network must be in evaluation mode.

        This is a collective of the process group.
        """
        own = range(self.group.turn, len(images), self.group.at_once)
        labels = self.target.kind == "labels"
        rows = predict(self.net, images, own, flips, labels=labels, batch=self.batch)
        return np.array(self.group.in_order(list(rows)))


def results(
    name: str,
    config: Any,
    task: ClassifierTask,
    trained: RunResult | None,
    records: Mapping[str, Sequence[Record]],
    test: Images,
    run: Run,
    *,
    names: Sequence[Path] = (),
    evidence: bool = False,
) -> tuple[dict[str, Any], Cases]:
    """Measure a network on the test images; write ``test.csv`` and, after a training, the model card.

    Args:
        name, config: of the recipe.
        trained: None without a training.
        records: the images of each split.
        test: the test images of the network.
        names: the files of the test images in the table, if they are others.
        evidence: draw evidence maps.

    Returns:
        The content of ``metrics.json``, and the predictions.
    """
    found: dict[str, Any] = {"auc": None}
    cases, predictions = task.target.cases([], np.empty((0, len(task.target.names)))), {}
    if trained is not None:
        found |= {"best_epoch": trained.best_epoch, "val_auc": [row["score"] for row in trained.rows]}
    if len(test):
        cases = task.predict(test, mirrorings(config.augment) if config.flips else PLAIN)
        cases = predictions["test"] = replace(cases, names=tuple(map(str, names)) or cases.names)
        write_cases(run.out / "test.csv", cases)
        found["auc"] = auc_of(cases)[0]
        if evidence:
            found["evidence"] = draw_evidence(task.net, test, task.target, run)
        if found["auc"] is None:
            run.say("split test has images of only one class, so its area under the ROC curve is undefined")
    if trained is not None:
        recipe_card(
            run,
            name,
            config,
            parameters=sum(p.numel() for p in task.module.parameters()),
            records=records,
            classes=task.target.names,
            predictions=predictions,
            pictures=found.get("evidence", ()),
        )
    return found, cases
