"""From the files of a data set as they are downloaded to metrics.json, by two commands, with the official split."""

import csv
import json
import shutil
from pathlib import Path

import imagecodecs
import lookalikes
import numpy as np
import pytest
import torch

from gigamorph.cli.main import main
from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.mammography.data_sets.chestxray14 import FINDINGS
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.mammography.recipes.end2end.network import features


def run(*args):
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    assert exit_.value.code == 0


def read_rows(path):
    with path.open(newline="") as file:
        return {Path(row["image_path"]).name: row for row in csv.DictReader(file)}


def trained(folder, tree, dataset, recipe, config, *convert):
    """The metrics of a recipe on a data set, after `gigamorph data convert` and `gigamorph train`, and its card."""
    run("data", "convert", tree, "--dataset", dataset, "--out", folder / "table", *convert)
    (folder / "config.toml").write_text(config)
    out = folder / "run"
    run("train", folder / "table" / "table.csv", "--recipe", recipe, "--config", folder / "config.toml", "--out", out)
    return json.loads((out / "metrics.json").read_text()), out


def test_chestxray14_with_morphhr(tmp_path):
    """Fourteen labels, not the fifteenth column; val drawn from the official train, by patient."""
    tree, rows, number = tmp_path / "tree", [], 24
    for i in range(number):
        name = f"{i + 1:08d}_000.png"
        found = "|".join(FINDINGS) if i % 2 else "No Finding"
        rows.append([name, found, 0, i + 1, "058Y", "F", "PA", 2500, 2048, 0.168, 0.168])
        place = tree / f"images_{i % 2 + 1:03d}" / "images" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (32, 24), dtype=np.uint8)
        place.write_bytes(imagecodecs.png_encode(pixels))
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"  # noqa: E501
    lookalikes.table(tree / "Data_Entry_2017_v2020.csv", header, rows, end="\n")
    names = [row[0] for row in rows]
    (tree / "train_val_list.txt").write_text("\n".join(names[:18]))
    (tree / "test_list.txt").write_text("\n".join(names[18:]))
    config = """
        model = "lesionnet"
        weights = "random"
        channels = 1
        task = "labels"
        factor = 2
        filters = 4
        augment = "flip=left-right"
        flips = false
        [[low]]
        name = "low"
        epochs = 1
        lr = 1e-3
        batch_size = 8
        [[high]]
        name = "high"
        epochs = 1
        lr = 1e-3
        batch_size = 8
    """
    metrics, out = trained(tmp_path, tree, "chestxray14", "morphhr", config)
    assert tuple(metrics["morph"]["labelwise"]) == FINDINGS and len(metrics["morph"]["labelwise"]) == 14
    assert metrics["auc"] == pytest.approx(np.mean(list(metrics["morph"]["labelwise"].values())))
    card = (out / "morph" / "model_card.md").read_text()
    assert "| test | image | mean |" in card and "weights: random, without pretraining" in card
    header = (out / "morph" / "test.csv").read_text().splitlines()
    assert len(header) == 1 + 6 and "label_Hernia" in header[0] and "label_finding" not in header[0]
    # Its checkpoint predicts and explains as it was measured.
    checkpoint, predicted = out / "morph" / "best.ckpt", tmp_path / "predicted"
    run("predict", checkpoint, tmp_path / "table" / "table.csv", "--out", predicted)
    mine, own = (read_rows(file) for file in (predicted / "predictions.csv", out / "morph" / "test.csv"))
    for name, row in own.items():
        for finding in FINDINGS:
            assert float(mine[name][f"log_odds_{finding}"]) == pytest.approx(
                float(row[f"log_odds_{finding}"]), abs=1e-4
            )
    run("explain", checkpoint, tree / "images_001" / "images" / names[0], "--format", "png", "--out", tmp_path / "why")


def test_cbis_ddsm_with_end2end(tmp_path):
    """Masks of masses beside their crops, patients of the official train and test."""
    tree, parts = tmp_path / "tree", {"train": [], "test": []}
    for i in range(16):
        part, patient = "test" if i >= 12 else "train", f"P_{i:05d}"
        name = f"Mass-{'Test' if part == 'test' else 'Training'}_{patient}_LEFT_CC"
        uid = f"1.3.6.{i}"
        lookalikes.dicom(tree / name / f"{uid}.1" / f"{uid}.2" / "000000.dcm", (60, 50))
        mask = np.zeros((60, 50), np.uint16)
        mask[10:30, 10:26] = 4095
        roi = f"{name}_1/{uid}.3/{uid}.4"
        lookalikes.dicom(tree / roi / "000000.dcm", (9, 8))
        lookalikes.dicom(tree / roi / "000001.dcm", (60, 50), pixels=mask)
        image, truth = f"{name}/{uid}.1/{uid}.2/000000.dcm", "MALIGNANT" if i % 2 else "BENIGN_WITHOUT_CALLBACK"
        cells = [patient, 3, "LEFT", "CC", 1, "mass", "OVAL", "SPICULATED", 4, truth, 2]
        parts[part].append([*cells, image, f"{roi}/000000.dcm\n", f"{roi}/000001.dcm\n"])
    for part, rows in parts.items():
        lookalikes.table(tree / f"mass_case_description_{part}_set.csv", lookalikes.CBIS_MASS, rows)
    config = """
        resize = [48, 40]
        channels = 1
        augment = "flip"
        fractions = [0.5, 0.25, 0.25]
        [sampling]
        side = 16
        per_lesion = 2
        background = 2
        [[models]]
        name = "small"
        backbone = "lesionnet"
        layer = "stages"
        weights = "random"
        blocks = [{kind = "residual", depth = 4, expand = 2}]
        [[patch]]
        name = "all"
        epochs = 1
        lr = 1e-3
        batch_size = 8
        [[whole]]
        name = "all"
        epochs = 1
        lr = 1e-3
        batch_size = 4
    """
    metrics, out = trained(tmp_path, tree, "cbis-ddsm", "end2end", config)
    assert 0 <= metrics["auc"] <= 1 and 0 <= metrics["patch_accuracy_small"] <= 1
    assert len((out / "small" / "test.csv").read_text().splitlines()) == 1 + 4
    table = {record.patient_id: record.split for record in read_table(tmp_path / "table" / "table.csv").records}
    assert list(table.values()) == ["train"] * 12 + ["test"] * 4


def test_inbreast_with_cae_and_dvme(tmp_path):
    """No split, and BI-RADS 3 left out."""
    tree, rows = tmp_path / "tree", []
    for i in range(20):
        grade = ("1", "5", "2", "4b", "3")[i % 5]
        rows.append(["removed", "removed", "R", "CC", "201001", f"{20586900 + i}", "2", grade])
        lookalikes.dicom(tree / "AllDICOMs" / f"{20586900 + i}_{i:016x}_MG_R_CC_ANON.dcm", (40, 32))
    header = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads"
    lookalikes.table(tree / "INbreast.csv", header, rows, separator=";")
    config = """
        model = "lesionnet"
        layer = "stages"
        weights = "random"
        channels = 1
        mean = [0.5]
        std = [0.25]
        resize = [32, 24]
        code_channels = [6]
        epochs = 1
        [[finetune]]
        name = "all"
        epochs = 1
        lr = 1e-3
        batch_size = 4
    """
    metrics, _ = trained(tmp_path, tree, "inbreast", "cae", config, "--label", "suspicious_without_3")
    assert sum(metrics["images"].values()) == 16 and min(metrics["images"].values()) >= 2
    for machine in ("raw_linear", "cae_linear", "cae_rbf", "finetuned"):
        assert 0 <= metrics[machine]["test"]["auc"] <= 1 and 0 <= metrics[machine]["val"]["accuracy"] <= 1
    config = """
        channels = 1
        mean = [0.5]
        std = [0.25]
        resize = [32, 24]
        crop = 0
        protocols = ["linear", "dvme"]
        subsets = [0]
        folds = 1
        epochs = 1
        p = 4
        hidden = 8
        [[extractors]]
        name = "a"
        model = "lesionnet"
        [[extractors]]
        name = "alone"
        model = "lesionnet"
        fused = false
    """
    (tmp_path / "dvme.toml").write_text(config)
    table, out = tmp_path / "table" / "table.csv", tmp_path / "dvme"
    run("train", table, "--recipe", "dvme", "--config", tmp_path / "dvme.toml", "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["attention"]["extractors"] == ["a"]
    assert [(row["protocol"], row["extractor"]) for row in metrics["rows"]] == [
        ("linear", "a"),
        ("linear", "alone"),
        ("dvme", "all"),
    ]
    assert len(read_table(tmp_path / "table" / "unlabelled.csv", labels=False).records) == 4


def test_vindr_mammo_with_siamese(tmp_path):
    """Contralateral views of exams in the official training and test, and findings for the probe."""
    tree, phantoms = tmp_path / "tree", tmp_path / "phantoms"
    made = read_table(
        write_phantoms(phantoms, patients=4, height=160, width=128, breasts=2, lesions=("mass",), positive=1.0, seed=1)
    )
    breasts, findings = [], []
    for number, record in enumerate(made.records):
        exam = sorted({r.patient_id for r in made.records}).index(record.patient_id)
        split = "training" if exam < 2 else "test"
        row = [f"s{exam}", f"e{exam}", f"i{number}", record.laterality, record.view, 160, 128]
        graded = [*row, f"BI-RADS {5 if record.findings else 1}", "DENSITY B"]
        breasts.append([*graded, split])
        boxes = [(f.box[2], f.box[0], f.box[3], f.box[1]) for f in record.findings]
        findings += [[*graded, "['Mass']", "BI-RADS 5", *box, split] for box in boxes]
        place = tree / "images" / f"s{exam}" / f"i{number}.dicom"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(record.path, place)
    header = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"
    lookalikes.table(tree / "breast-level_annotations.csv", header, breasts, end="\n")
    header = header.replace(",split", ",finding_categories,finding_birads,xmin,ymin,xmax,ymax,split")
    lookalikes.table(tree / "finding_annotations.csv", header, findings, end="\n")
    config = """
        model = "lesionnet"
        layer = "stages"
        patch = 32
        stride = 32
        dim = 4
        warm_up = 1
        epochs = 2
        batch_size = 8
        registration = "none"
        labelled = [1.0]
        probe_epochs = 1
        maps = false
    """
    metrics, out = trained(tmp_path, tree, "vindr-mammo", "siamese", config)
    assert metrics["pairs"] == {"train": 4, "val": 0, "test": 4} and metrics["patches"]["test"] > 0
    assert [row["start"] for row in metrics["probe"]] == ["siamese", "scratch"]
    # Its encoder is what a patch network of end2end starts from.
    maps, state = features("lesionnet", 1, out / "encoder.pt", "stages"), torch.load(out / "encoder.pt")
    assert torch.equal(maps.network.stem.weight, state["stem.weight"])
