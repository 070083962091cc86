"""The method from table to metrics: patches, patch network, whole-image networks, their ensemble; or the transfer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....config import from_plain
from ....datasets.tables import SPLITS, Record
from ....errors import DataError, GigamorphError
from ....evaluate.cases import Cases
from ....evaluate.read import write_cases
from ....images.parallel import available_cpus
from ....morph.files import Grown, save_network
from ....morph.recipe import Recipe, apply
from ....train.checkpoint import save_torch
from ....train.loop import RunResult, run_stages
from ....train.option_checks import check_stages
from ....train.run import Run
from ....train.stages import Stage
from ....train.target import Target, batch_weights
from ....train.task import Score, Task
from ..classify import ClassifierTask, auc_of, averaged, classifier_record, read_target, results
from ..features import shape_of_maps
from ..morphhr.config import MorphHRConfig
from ..morphhr.grow import grow, without_decay
from ..recipe import begin, finish
from ..sized import Size
from ..tensors import ReadAhead
from ..weights import find_weights
from .config import CLASSES, End2EndConfig, Model
from .images import Patches, check_findings, sample_all, whole_images, write_resized
from .network import PatchNet, WholeNet, convert, features

Parts = dict[str, list[Record]]


class PatchTask(Task):
    """The patch classifier: cross-entropy in which all classes of a batch have equal weight.

    The score is the accuracy on validation patches; patience uses their plain cross-entropy.
    """

    def __init__(self, module: PatchNet, train: Patches, val: Patches, batch: int) -> None:
        self.module, self.train, self.val, self.batch = module, train, val, batch
        self.readers = ThreadPoolExecutor(available_cpus(), "gigamorph-patches")
        self._ahead = ReadAhead(lambda numbers: list(self.readers.map(self.train.__getitem__, numbers)))

    def examples(self, epoch: int) -> Sequence[int]:
        self.train.epoch = epoch
        self._ahead.forget()  # batches that an interrupted epoch has left over have its augmentation
        return range(len(self.train))

    def ahead(self, batch: Sequence[int]) -> None:
        self._ahead.announce(batch)

    def loss(self, batch: Sequence[int]) -> Tensor:
        logits, labels = self._forward(self._ahead.take(batch))
        return (F.cross_entropy(logits.float(), labels, reduction="none") * batch_weights(labels)).mean()

    def score(self) -> Score | None:
        if not len(self.val):
            return None
        right, loss = 0, 0.0
        for first in range(0, len(self.val), self.batch):
            batch = range(first, min(first + self.batch, len(self.val)))
            logits, labels = self._forward(self.readers.map(self.val.__getitem__, batch))
            right += int((logits.argmax(1) == labels).sum())
            loss += F.cross_entropy(logits.detach().float(), labels, reduction="sum").item()
        return Score(right / len(self.val), stop=-loss / len(self.val))

    def _forward(self, batch: Iterable[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        device = next(self.module.parameters()).device
        pixels, labels = zip(*batch, strict=True)
        x = torch.stack(pixels)
        self.meter.image(len(x) * x.shape[-2] * x.shape[-1])
        return self.module(x.to(device)), torch.tensor(labels, device=device)


def train(table: Path, config: End2EndConfig, run: Run) -> dict[str, Any]:
    """Run Shen's method on a table of images with two classes; ``docs/recipes/end2end.md`` lists the written files.

    Args:
        table: a csv or folder for `read_table`; lesions are in its column findings (kind, pathology, mask or box),
            which only the patch network learns from.

    Returns:
        The content of ``metrics.json``: accuracy of the patch networks; area under the ROC curve per image of each
        whole-image network on the test images, plain and averaged over mirrored images, and of the ensemble. For a
        transfer, these before and after training with each number of patients.

    Raises:
        DataError: the table or an image is wrong, or no training image has a lesion.
        GigamorphError: a loss is not finite, or the folder contains another run.
    """
    parts, target = read_target(table, "classes", (), config, run)
    if len(target.names) != 2:
        raise DataError(f"{table}: has the classes {', '.join(target.names)}; the method needs two")
    for model in config.models:
        _check_model(model, config, run)
    if config.start is None and not any(f.pathology for record in parts["train"] for f in record.findings):
        raise DataError("no training image has a lesion with a pathology; patches need the column findings")
    check_findings(parts["train"] + parts["val"] if config.start is None else ())
    begin(run, "end2end", config, [record for part in parts.values() for record in part])
    count = sum(map(len, parts.values()))
    run.say(f"{count} images of {'native size' if not config.resize else '{} x {}'.format(*config.resize)}")
    images = _resized(parts, config, run.out / "images")
    if config.start is not None:
        return finish(run, _transfer(images, parts, target, config, run))
    metrics: dict[str, Any] = {}
    patch_nets: dict[Any, PatchNet] = {}
    for model in config.models:
        if _patch_key(model) not in patch_nets:
            patch_nets[_patch_key(model)], accuracy = _patch_network(parts, images, model, config, run)
            metrics[f"patch_accuracy_{model.name}"] = accuracy
    members = []
    for number, model in enumerate(config.models):
        run.say(f"{model.name}: training the whole-image network with image labels")
        torch.manual_seed(run.seed + number)
        net = convert(patch_nets[_patch_key(model)], model, config.resize, config.channels)
        own = run.part(model.name)
        task = _task(net, images, target, config, run, config.whole, model=model.name)
        trained = run_stages(task, config.whole, own)
        save_torch(net.state_dict(), own.out / "model.pt", "network")
        metrics[model.name], cases = _results(task, images, parts, config, own, trained)
        members.append(cases)
        if model.front:
            metrics[f"{model.name}-front"] = _with_front(net, parts, model, config, target, run)
    metrics["auc"] = auc_of(averaged(members))[0] if len(members[0]) else None
    if len(members) > 1 and len(members[0]):
        write_cases(run.out / "ensemble.csv", averaged(members))
    return finish(run, metrics)


def _check_model(model: Model, config: End2EndConfig, run: Run) -> None:
    """Refuse unknown networks, weights and stages, before any work."""
    if config.start is not None:
        check_stages(
            config.transfer, run.group.at_once, _load(Path(config.start) / model.name / "model.pt", model, config)
        )
        return
    find_weights(model.weights, config.mean, config.std)
    patch = _patch_net(model, config)
    check_stages(model.patch or config.patch, run.group.at_once, patch)
    whole = convert(patch, model, config.resize, config.channels)
    check_stages(config.whole, run.group.at_once, whole)
    if model.front:
        child, _ = _add_front(Grown(whole.eval(), channels=config.channels), model, config, run.seed)
        check_stages(config.native, run.group.at_once, child.network)


def _resized(parts: Parts, config: End2EndConfig, folder: Path) -> Parts:
    sized = iter(write_resized([record for split in SPLITS for record in parts[split]], config, folder))
    return {split: [next(sized) for _ in parts[split]] for split in SPLITS}


def _with_front(
    net: WholeNet, parts: Parts, model: Model, config: End2EndConfig, target: Target, run: Run
) -> dict[str, Any]:
    """Add a front for larger images to the trained network, exactly, and train it further on them."""
    larger = replace(config, resize=tuple(model.front * side for side in config.resize))
    images = _resized(parts, larger, run.out / f"images_{model.front}")
    run.say(f"{model.name}: training with a front on images of {larger.resize[0]} x {larger.resize[1]}")
    child, _ = _add_front(Grown(net.cpu().eval(), channels=config.channels), model, config, run.seed)
    own = run.part(f"{model.name}-front")
    known = {"model": model.name, "morphs": child.recipe.to_json()}
    task = _task(child.network, images, target, larger, run, config.native, **known)
    trained = run_stages(task, without_decay(config.native, child.network), own)
    save_network(own.out / "model.safetensors", child)
    return _results(task, images, parts, larger, own, trained)[0]


def _add_front(parent: Grown, model: Model, config: End2EndConfig, seed: int) -> tuple[Grown, Any]:
    return grow(parent, MorphHRConfig(channels=config.channels, factor=model.front), seed)


def _patch_key(model: Model) -> Any:
    """Return what identifies a patch network: models that share it learn their patches once."""
    return model.backbone, model.weights, model.layer


def _patch_network(
    parts: Parts, images: Parts, model: Model, config: End2EndConfig, run: Run
) -> tuple[PatchNet, float | None]:
    sets, stages = {}, model.patch or config.patch
    for number, split in enumerate(("train", "val")):
        places = sample_all(parts[split], images[split], config, run.seed + number)
        counts = np.bincount([patch.label for _, patch in places], minlength=len(CLASSES))
        listed = ", ".join(f"{count} {name}" for name, count in zip(CLASSES, counts, strict=True))
        run.say(f"{model.name}: patches of {split}: {listed}")
        sets[split] = Patches(images[split], places, config, augment=split == "train", seed=run.seed)
    torch.manual_seed(run.seed)
    weights = find_weights(model.weights, config.mean, config.std, run)
    net = _patch_net(model, config, weights)
    task = PatchTask(net, sets["train"], sets["val"], max(stage.batch_size for stage in stages))
    trained = run_stages(task, stages, run.part(f"{model.name}-patches"))
    return net, trained.best_score


def _task(
    net: nn.Module, images: Parts, target: Target, config: End2EndConfig, run: Run, stages: Sequence[Stage], **more: Any
) -> ClassifierTask:
    train = whole_images(images["train"], config, augment=config.augment, seed=run.seed)
    val, record = whole_images(images["val"], config), classifier_record("end2end", config, target, **more)
    return ClassifierTask(net, train, val, target, run, stages, record, balanced=True, stop_by_loss=True)


def restore(record: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Return the whole-image network of a checkpoint's record, and an opener of its images."""
    config = from_plain(record["config"], End2EndConfig, "checkpoint")
    model = next(model for model in config.models if model.name == record["model"])
    network: nn.Module = _untrained(model, config)
    if "morphs" in record:
        network = apply(Recipe.from_json(record["morphs"]), network)
    return network, lambda records: whole_images(records, config, view=Size(config.resize).view)


def _results(
    task: ClassifierTask, images: Parts, parts: Parts, config: End2EndConfig, run: Run, trained: RunResult | None
) -> tuple[dict[str, Any], Cases]:
    """Return the content of metrics.json, and the predictions with the names of the table's images (`parts`)."""
    test, names = whole_images(images["test"], config), [record.path for record in parts["test"]]
    found, cases = results("end2end", config, task, trained, images, test, run, names=names)
    if trained is not None:
        found["stages"] = [row["stage"] for row in trained.rows]
    if len(test):
        found["auc_single"] = auc_of(task.predict(test))[0]
    return found, cases


def _transfer(images: Parts, parts: Parts, target: Target, config: End2EndConfig, run: Run) -> dict[str, Any]:
    """Train the networks of a finished run further, at a small rate, with increasing numbers of patients."""
    assert config.start is not None
    metrics: dict[str, Any] = {"curve": []}
    order = _patients(images["train"], run.seed)
    for count in config.patients or (len(order),):
        if count > len(order):
            raise DataError(f"patients = {count}, but there are {len(order)} training patients")
        chosen = set(order[:count])
        own = {**images, "train": [r for r in images["train"] if r.patient_id in chosen]}
        members: list[Cases] = []
        row: dict[str, Any] = {"patients": count, "images": len(own["train"])}
        for model in config.models:
            part = run.part(f"{model.name}-{count}")
            net = _load(Path(config.start) / model.name / "model.pt", model, config)
            task = _task(net, own, target, config, run, config.transfer, model=model.name)
            task.module.eval().to(run.device)
            if "before" not in metrics.get(model.name, {}):
                metrics[model.name] = {"before": _results(task, images, parts, config, part, None)[0]["auc"]}
            run.say(f"{model.name}: transfer with {count} patients ({len(own['train'])} images)")
            trained = run_stages(task, config.transfer, part)
            save_torch(net.state_dict(), part.out / "model.pt", "network")
            found, cases = _results(task, images, parts, config, part, trained)
            row[f"auc_{model.name}"] = found["auc"]
            members.append(cases)
        row["auc"] = auc_of(averaged(members))[0] if len(members[0]) else None
        metrics["curve"].append(row)
    metrics["auc"] = metrics["curve"][-1]["auc"]
    return metrics


def _patients(records: Sequence[Record], seed: int) -> list[str]:
    """Return the training patients in the random order of the learning curve, with alternating classes."""
    label: dict[str, int] = {}
    for record in records:
        label[record.patient_id] = max(record.label, label.get(record.patient_id, 0))
    drawn = np.random.default_rng([seed, 7]).permutation(sorted(label)).tolist()
    kinds = [[p for p in drawn if label[p] == 1], [p for p in drawn if label[p] == 0]]
    return [kind[i] for i in range(max(map(len, kinds))) for kind in kinds if i < len(kind)]


def _patch_net(model: Model, config: End2EndConfig, weights: Path | None = None) -> PatchNet:
    maps = features(model.backbone, config.channels, weights, model.layer)
    return PatchNet(maps, shape_of_maps(maps, config.channels)[1])


def _untrained(model: Model, config: End2EndConfig) -> WholeNet:
    return convert(_patch_net(model, config), model, config.resize, config.channels)


def _load(path: Path, model: Model, config: End2EndConfig) -> WholeNet:
    net = _untrained(model, config)
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise GigamorphError(f"{path}: network not found; start must be the folder of a finished run") from error
    except Exception as error:  # torch raises many types for a damaged file
        raise GigamorphError(f"{path}: does not fit model {model.name!r}: {str(error).splitlines()[0]}") from error
    return net
