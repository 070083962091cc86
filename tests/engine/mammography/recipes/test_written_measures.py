"""What metrics.json says of a recipe, computed anew from the tables that it has written, by other libraries."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import small_recipes
from scipy import stats
from sklearn.metrics import roc_auc_score

from gigamorph.engine.datasets.tables import read_table, write_table
from gigamorph.engine.mammography.recipes import get_recipe
from gigamorph.engine.train.run import Run

SPLITS = (*["train"] * 4, "val", "val", *["test"] * 8)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Of the test images some labels are wrong, so that no area is 1."""
    path = small_recipes.write(tmp_path_factory.mktemp("table"), SPLITS)
    read = read_table(path)
    wrong = {n for n, record in enumerate(read.records) if record.split == "test" and not n % 3}
    records = [replace(r, label=1 - r.label) if n in wrong else r for n, r in enumerate(read.records)]
    return write_table(path, records, read.classes)


def run(name, table, out, **changes):
    config = replace(small_recipes.configs(1)[name], **changes)
    get_recipe(name).train(table, config, Run(out, seed=3))
    return json.loads((out / "metrics.json").read_text())


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def delong(truth, scores):
    """The interval by DeLong's definition: of each image the share of those of the other kind that it beats."""
    ill, well = scores[truth == 1], scores[truth == 0]
    beats = (ill[:, None] > well).astype(float) + 0.5 * (ill[:, None] == well)
    error = np.sqrt(beats.mean(1).var(ddof=1) / len(ill) + beats.mean(0).var(ddof=1) / len(well))
    return np.clip(beats.mean() + stats.norm.ppf([0.025, 0.975]) * error, 0, 1)


def test_morphhr_of_classes(table, tmp_path):
    metrics = run("morphhr", table, tmp_path, arms=("finetune", "direct", "scratch", "morph"))
    labels = {str(record.path): record.label for record in read_table(table).records if record.split == "test"}
    for arm, folder in {"finetune": "parent", "direct": "direct", "scratch": "scratch", "morph": "morph"}.items():
        written = rows(tmp_path / folder / "test.csv")
        assert {row["image_path"]: int(row["label"]) for row in written} == labels
        truth = np.array([int(row["label"]) for row in written])
        scores = np.array([float(row["log_odds_1"]) for row in written])
        assert 0 < metrics[arm]["auc"] < 1
        assert metrics[arm]["auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        assert metrics[arm]["interval"] == pytest.approx(delong(truth, scores), abs=1e-12)
        log = [float(row["score"]) for row in rows(tmp_path / folder / "log.csv")]
        assert metrics[arm]["val_auc"] == pytest.approx(log)
        assert metrics[arm]["best_epoch"] == 1 + int(np.argmax(log))
    assert metrics["auc"] == metrics["morph"]["auc"]


def test_morphhr_of_labels(table, tmp_path):
    """The mean over the labels of which both kinds are known, and each."""
    read = read_table(table)
    records = []
    for number, record in enumerate(read.records):
        odd = {"odd": float(number % 4 == 3)} if number % 5 else {}  # of every fifth image it is not known
        records.append(replace(record, labels={"mass": float(record.label), **odd}))
    own = write_table(table.parent / "labels.csv", records, read.classes)
    metrics = run("morphhr", own, tmp_path, task="labels")
    written, areas = rows(tmp_path / "morph" / "test.csv"), {}
    for name in ("mass", "odd"):
        known = [row for row in written if row[f"label_{name}"]]
        truth, scores = ([float(row[kind + name]) for row in known] for kind in ("label_", "log_odds_"))
        areas[name] = roc_auc_score(truth, scores)
    assert len(known) < len(written)
    assert metrics["morph"]["labelwise"] == pytest.approx(areas, abs=1e-12)
    assert metrics["auc"] == metrics["morph"]["auc"] == pytest.approx(np.mean(list(areas.values())), abs=1e-12)


def test_siamese(table, tmp_path):
    metrics = run("siamese", table, tmp_path, labelled=(0.5, 1.0))
    for row in metrics["probe"]:
        for kind in ("probe", "fine_tuned"):
            written = rows(tmp_path / "probe" / f"{row['start']}_{row['fraction']}" / f"test_{kind}.csv")
            assert len(written) == metrics["patches"]["test"] * 2 == len({one["image_path"] for one in written})
            truth, scores = ([float(one[key]) for one in written] for key in ("label", "log_odds_finding"))
            assert row[kind] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert len(metrics["probe"]) == 4
    images = rows(tmp_path / "images.csv")
    records = {record.path.name: record for record in read_table(table).records}
    assert len(images) == 2 * metrics["pairs"]["test"] and len(metrics["images"]) == 4
    for row in metrics["images"]:
        truth = [int(one[row["truth"]]) for one in images]
        own = [records[one["image"]] for one in images]
        assert truth == [bool(r.findings) if row["truth"] == "finding" else r.label for r in own]
        for score in ("largest_soft_label", "upper_soft_label", "largest_distance", "upper_distance"):
            values = [float(one[score]) for one in images]
            if row["level"] == "pair":
                assert values[::2] == values[1::2]
                either = [max(pair) for pair in zip(truth[::2], truth[1::2], strict=True)]
                area = roc_auc_score(either, values[::2])
            else:
                area = roc_auc_score(truth, values)
            assert row[score] == pytest.approx(area, abs=1e-12)
    pairs = rows(tmp_path / "soft_labels.csv")
    assert len(pairs) == metrics["patches"]["train"]
