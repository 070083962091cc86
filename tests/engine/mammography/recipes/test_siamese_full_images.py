"""siamese: labels of full images by the pairs; what they are of, and how good they are where the truth is known."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import small_recipes
import torch
from torch import nn
from torch.nn import functional as F

from gigamorph.engine.datasets.tables import Finding, Record, read_table, write_table
from gigamorph.engine.evaluate.roc import auc
from gigamorph.engine.mammography.recipes.siamese import train
from gigamorph.engine.mammography.recipes.siamese.full_images import (
    SCORES,
    classes_of,
    label_pairs,
    localisation,
    localised,
    write_images,
)
from gigamorph.engine.mammography.recipes.siamese.mixture import Judge, Mixture
from gigamorph.engine.mammography.recipes.siamese.network import Embedding
from gigamorph.engine.mammography.recipes.siamese.pairs import Pair, find_pairs
from gigamorph.engine.mammography.recipes.siamese.patches import patch_pairs, write_patches
from gigamorph.engine.train.run import Run

CONFIG = replace(small_recipes.configs(1)["siamese"], maps=False, patch=16, stride=16)


class Brightness(nn.Module):
    """Its maps are the grey values and one, so that directions tell bright patches from dark ones."""

    def forward(self, x):
        return torch.cat([x, torch.ones_like(x)], 1)[:, :, ::2, ::2]


def brightness():
    embedding = Embedding(Brightness(), "", 2, 1, 16)
    with torch.no_grad():
        embedding.project.weight.copy_(torch.eye(2))
        embedding.project.bias.zero_()
    return embedding.eval()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small_recipes.write(tmp_path_factory.mktemp("table"))


def judged(pairs, networks, folder):
    patches = patch_pairs([write_patches(pair, CONFIG, folder) for pair in pairs])
    x = patches[:]
    with torch.no_grad():
        found = [F.pairwise_distance(net(x[:, 0]), net(x[:, 1]), eps=0) for net in networks]
    return [Judge.fit(d.double().numpy(), CONFIG) for d in found]


def test_scores_are_those_of_the_patches_half_a_patch_apart(table, tmp_path):
    torch.manual_seed(0)
    pairs = find_pairs(read_table(table, labels=False).records)
    networks = [Embedding(nn.Conv2d(1, 6, 3, 2), "", 4, 1, 16).eval() for _ in range(2)]
    judges = judged(pairs, networks, tmp_path / "own")
    found = label_pairs(pairs[:3], networks, judges, CONFIG, Run(tmp_path))
    for pair, row in zip(pairs, found, strict=False):
        patches = patch_pairs([write_patches(pair, replace(CONFIG, stride=8), tmp_path / "dense")])
        x = patches[:]
        with torch.no_grad():
            d = np.array([(net(x[:, 0]) - net(x[:, 1])).norm(dim=1).double().numpy() for net in networks])
        labels = np.mean([judge.labels(own) for judge, own in zip(judges, d, strict=True)], 0)
        d = d.mean(0)
        wanted = labels.max(), np.quantile(labels, 0.95), d.max(), np.quantile(d, 0.95)
        assert row["patches"] == len(patches) > 3
        # Patches in files have 16 bits, and a distance has an epsilon under its root.
        assert [row[name] for name in SCORES] == pytest.approx(list(wanted), abs=1e-3)


def test_pairs_with_a_bright_mass_are_told_from_others_and_sides_are_not(table, tmp_path):
    """Of eight pairs four have a mass on one side: the areas follow from that alone."""
    read = read_table(table)
    pairs, network = find_pairs(read.records), brightness()
    judges = judged(pairs, [network], tmp_path)
    scores = label_pairs(pairs, [network], judges, CONFIG, Run(tmp_path))
    areas = write_images(pairs, scores, classes_of(table), True, Run(tmp_path))
    assert [(row["truth"], row["level"], row["count"], row["positive"]) for row in areas] == [
        (truth, level, count, 4) for truth in ("finding", "label") for level, count in (("pair", 8), ("image", 16))
    ]
    assert all(row["largest_distance"] == 1 and row["largest_soft_label"] > 0.99 for row in areas[::2])
    # An ill image outranks the 8 of healthy pairs and ties, on average, with the 4 healthy ones of its kind of pair.
    assert areas[1]["largest_distance"] == areas[3]["largest_distance"] == pytest.approx((8 + 0.5 * 4) / 12)
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert len(rows) == 16 and [row["laterality"] for row in rows] == ["L", "R"] * 8
    assert all(
        first[name] == second[name] for first, second in zip(rows[::2], rows[1::2], strict=True) for name in SCORES
    )
    truth, values = ([float(row[name]) for row in rows] for name in ("finding", "upper_distance"))
    assert areas[1]["upper_distance"] == auc(np.array(truth), np.array(values))
    places = [row["places"] for row in scores]
    assert [bool(one) for one in places] == [bool(p.left.findings or p.right.findings) for p in pairs]
    told = localisation(places)
    assert told["pairs"] == 4 and told["hit"] == 1 and told["auc"] > 0.9 > 0.5 > told["by_chance"]


def test_places_of_findings_are_told_by_the_patches_that_hold_their_middle(tmp_path):
    finding = Finding("mass", box=(10, 14, 4, 8))  # its middle is at row 12, column 6
    left, right = (Record(tmp_path / f"{side}.npy", -1, "p", "test", side, "CC") for side in "LR")
    pair = Pair(left, replace(right, findings=(finding,)))
    boxes = np.array([[0, 0, 6, 20], [6, 0, 20, 12], [6, 12, 20, 20], [0, 12, 9, 20]], np.float64)
    elsewhere = boxes + 100
    assert localised(pair, (boxes, elsewhere), np.arange(4.0)) is None
    found = localised(pair, (elsewhere, boxes), np.array([0.5, 1.0, 2.0, 0.2]))
    assert found == {"hit": 1.0, "by_chance": 0.5, "auc": 0.5}
    found = localised(pair, (elsewhere, boxes), np.array([2.0, 0.0, 2.0, 1.0]))
    assert found == {"hit": 0.5, "by_chance": 0.5, "auc": 0.625}
    assert localisation([None]) == "no pair of the test split has a finding in some of its patches"


def test_the_recipe_labels_full_images(table, tmp_path):
    found = train(table, CONFIG, Run(tmp_path / "run", seed=1))
    assert {(row["truth"], row["level"]) for row in found["images"]} == {
        (truth, level) for truth in ("finding", "label") for level in ("pair", "image")
    }
    rows = list(csv.DictReader((tmp_path / "run" / "images.csv").open()))
    assert [row["image"] for row in rows] == ["6L.npy", "6R.npy", "7L.npy", "7R.npy"]
    assert [row["finding"] for row in rows] == [row["label"] for row in rows] == ["0", "0", "1", "0"]
    assert (
        "- Full images of the test split by the pairs: 2 pairs, 1 with a finding: AUC"
        in (tmp_path / "run" / "model_card.md").read_text()
    )
    assert found["localisation"]["pairs"] == 1
    assert (
        "- Locations of findings by the distances, means over 1 pairs"
        in (tmp_path / "run" / "model_card.md").read_text()
    )
    without = train(table, replace(CONFIG, scores=False), Run(tmp_path / "without", seed=1))
    assert "images" not in without and not (tmp_path / "without" / "images.csv").exists()
    assert {**without, **{name: found[name] for name in ("images", "localisation")}} == found


def test_what_is_not_known_is_not_measured(tmp_path):
    def pair(number):
        return Pair(*(Record(tmp_path / f"{number}{side}.npy", -1, f"p{number}", "test", side, "CC") for side in "LR"))

    pairs = [pair(n) for n in range(4)]
    scores = [{"patches": 1, **dict.fromkeys(SCORES, float(n))} for n in range(3)]
    scores.append({"patches": 0, **dict.fromkeys(SCORES)})  # no place in both breasts
    run = Run(tmp_path)
    assert write_images([], [], {}, False, run) == "the table has no pair in the test split"
    assert write_images(pairs, scores, {}, False, run).startswith("the test split does not have both kinds of images")
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert rows[0]["finding"] == rows[0]["label"] == "" and rows[-1]["largest_distance"] == ""
    # A pair of which one image is unknown is ill if the other is, and else unknown; images count by themselves.
    keys = [[(record.path, record.frame) for record in (own.left, own.right)] for own in pairs]
    classes = {keys[0][0]: 0, keys[1][0]: 0, keys[1][1]: 0, keys[2][0]: 1, keys[3][0]: 1, keys[3][1]: 1}
    pairwise, single = write_images(pairs, scores, classes, False, run)
    assert (pairwise["count"], pairwise["positive"], pairwise["largest_distance"]) == (2, 1, 1.0)
    assert (single["count"], single["positive"]) == (4, 1)


def test_labels_of_other_than_two_classes_are_no_truth(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.zeros((4, 4), np.uint16))
    records = [Record(tmp_path / f"{i}.npy", i, f"p{i}", findings=(Finding("mass"),)) for i in range(3)]
    assert classes_of(write_table(tmp_path / "three.csv", records, ["a", "b", "c"])) == {}
    (tmp_path / "none.csv").write_text("image_path,patient_id\n0.npy,p0\n")
    assert classes_of(tmp_path / "none.csv") == {}
    two = write_table(tmp_path / "two.csv", [replace(r, label=min(r.label, 1)) for r in records], ["a", "b"])
    assert sorted(classes_of(two).values()) == [0, 1, 1]


def test_ranks_of_others_go_by_the_training_pairs():
    d = np.concatenate([np.linspace(0.1, 0.2, 95), np.linspace(1, 1.1, 5)])
    judge = Judge.fit(d, replace(CONFIG, labels="rank"))
    own = judge.labels(d)
    assert np.array_equal(judge.labels(d[[50, 97]]), own[[50, 97]]) and judge.labels([9.0]) == [1.0]
    assert not Judge(d, Mixture((0.5, 0.52), (0.1, 0.1), 0.1), "gmm").labels([0.1, 9.0]).any()  # its parts are one
