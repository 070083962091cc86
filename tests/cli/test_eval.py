"""`gigamorph eval` from predictions to the report, and every bad input in one line."""

import csv
import hashlib
import json
import re

import numpy as np
import pytest
from commands import run
from sklearn.metrics import average_precision_score, roc_auc_score

from gigamorph.engine.evaluate.report import verdict


@pytest.fixture
def files(tmp_path):
    """Predictions, those of another network, and the table that they are of."""
    random = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    names = ["a", "b", "table"]
    paths = {name: folder / f"{name}.csv" for name in names}
    opened = {name: path.open("w", newline="") for name, path in paths.items()}
    writers = {name: csv.writer(file) for name, file in opened.items()}
    for name in "ab":
        writers[name].writerow(["image_path", "patient_id", "laterality", "view", "label", "log_odds_0", "log_odds_1"])
    writers["table"].writerow(["image_path", "label", "patient_id", "split", "density", "findings"])
    for patient in range(40):
        split = "test" if patient < 30 else "val"
        for side in "LR":
            label = int(random.random() < 0.3)
            for view in ("CC", "MLO"):
                image = f"{patient}_{side}_{view}.png"
                z = 40 + random.normal(size=2).cumsum() + 1.5 * label  # all probabilities are 1 in float64
                for name, value in zip("ab", z, strict=True):
                    row = [folder / image, f"P{patient}", side, view, label, repr(float(-value)), repr(float(value))]
                    writers[name].writerow(row)
                findings = json.dumps([{"box": [10, 20, 10, 20]}]) if label else ""
                writers["table"].writerow([image, label, f"P{patient}", split, "ABCD"[patient % 4], findings])
    for file in opened.values():
        file.close()
    return paths


def test_all_of_it(files, tmp_path, capsys):
    marks = tmp_path / "marks.csv"
    rows = list(csv.DictReader(files["a"].open()))
    lines = [f"{row['image_path']},{15 if k % 2 else 50},15,{k}" for k, row in enumerate(rows)]
    marks.write_text("image_path,row,column,score\n" + "\n".join(lines))
    files["a"].with_suffix(".json").write_text('{"checkpoint": "best.ckpt", "sha256": "abc"}')
    out = tmp_path / "out"
    options = [
        "--table",
        files["table"],
        "--split",
        "test",
        "--by",
        "density",
        "--level",
        "image",
        "--level",
        "exam",
        "--marks",
        marks,
    ]
    assert run("eval", files["a"], "--out", out, "--compare", files["b"], "--resamples", 100, *options) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())
    used = [row for row in rows if int(row["patient_id"][1:]) < 30]
    labels, z = [int(r["label"]) for r in used], [float(r["log_odds_1"]) for r in used]
    image = found["levels"]["image"]
    assert image["rows"] == 120 and image["patients"] == 30 and found["split"] == "test"
    assert image["outputs"]["1"]["auc"]["value"] == pytest.approx(roc_auc_score(labels, z), abs=1e-12)
    precision = image["outputs"]["1"]["average_precision"]["value"]
    assert precision == pytest.approx(average_precision_score(labels, z), abs=1e-12)
    assert set(found["levels"]) == {"image", "exam"}
    assert [row["value"] for row in image["subgroups"]["density"]["1"]["rows"]] == list("ABCD")
    assert 0 < image["comparison"]["1"]["p"] < 1
    assert found["froc"]["lesions"] == sum(labels) and found["froc"]["marks"] == 120
    assert found["predictions_sha256"] == hashlib.sha256(files["a"].read_bytes()).hexdigest()
    assert f"image level: AUC {roc_auc_score(labels, z):.3f} (" in said and "FROC: mean sensitivity" in said
    page = (out / "report.html").read_text()
    assert len(page) > 50_000 and page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) >= 6
    for known in ("best.ckpt", "SHA-256 of the model abc", "a.csv", "table.csv", found["date"], "Evaluation of"):
        assert known in page, known
    assert "weighted kappa" not in page  # of one output
    exam = found["levels"]["exam"]["outputs"]["1"]
    rates = [f"{name} {exam['at_threshold'][name]['value']:.3f}" for name in ("sensitivity", "specificity")]
    sentence = re.search(r'class="lead">([^<]*)<', page)[1]
    assert [one in sentence.lower() for one in rates] == [True, True] and page.index(sentence) < page.index("<table")
    assert f" at the threshold of split val, specificity 0.9; exam level: AUC {exam['auc']['value']:.3f} (" in sentence
    alone = {"levels": {"exam": {**found["levels"]["exam"], "outputs": {"1": {**exam, "at_threshold": {}}}}}}
    point = exam["sensitivity_at_specificity"][1]
    assert verdict(alone).startswith(f"Sensitivity {point['value']:.3f} (")
    assert " at specificity 0.9; exam level: " in verdict(alone)
    fitted = {"levels": {"exam": found["levels"]["exam"]}, "rows": {"measured": {"val": 9}}}  # on the measured rows
    assert verdict(fitted) == verdict(alone)
    undefined = {**found["levels"]["exam"], "outputs": {"1": {"undefined": "one class only"}}}
    assert "; image level: AUC " in verdict({"levels": {"image": image, "exam": undefined}})


def test_the_same_command_writes_the_same_bytes(files, tmp_path):
    for name in "xy":
        assert run("eval", files["a"], "--out", tmp_path / name, "--level", "image", "--resamples", 50) == 0
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert len(names) >= 4
    assert all((tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda row: row | {"label": "0"}, [], "one class only: all 160 images are negative"),
        (lambda row: row | {"label": ""}, [], "no image has a label"),
        (lambda row: row | {"log_odds_1": "nan"}, [], "line 2: log_odds_1 is not a number (NaN)"),
        (lambda row: row | {"label": "7"}, [], "label '7' must be one of 0, 1"),
        (lambda row: row, ["--score", "probability"], "column probability is missing"),
        (lambda row: row, ["--label", "cancer"], "column cancer is missing"),
        (lambda row: row, ["--by", "maker"], "unknown column 'maker' for subgroups; there are"),
        (lambda row: row, ["--split", "test"], "has no column split"),
        (lambda row: row, ["--threshold", "2"], "the threshold must be a probability between 0 and 1, not 2"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, capsys, change, options, message):
    rows = [change(row) for row in csv.DictReader(files["a"].open())]
    with (tmp_path / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert run("eval", tmp_path / "p.csv", "--out", tmp_path / "out", "--resamples", 5, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_a_patient_in_two_splits_is_refused(files, tmp_path, capsys):
    text = files["table"].read_text().replace("39_R_MLO.png,0,P39,val", "39_R_MLO.png,0,P39,train")
    text = text.replace("39_R_MLO.png,1,P39,val", "39_R_MLO.png,1,P39,train")
    files["table"].write_text(text)
    assert run("eval", files["a"], "--table", files["table"], "--split", "test", "--out", tmp_path / "out") == 2
    assert "patient P39 is in train and val" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten_and_marks_need_findings(files, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text("{}")
    assert run("eval", files["a"], "--out", tmp_path) == 2
    assert "already holds metrics" in capsys.readouterr().err
    assert run("eval", files["a"], "--marks", files["b"], "--out", tmp_path / "out") == 2
    assert "--marks needs the findings of --table" in capsys.readouterr().err


def test_told_thresholds_are_taken_again(files, tmp_path):
    """All probabilities are 1 in float64."""
    assert run("eval", files["a"], "--out", tmp_path / "x", "--level", "image", "--resamples", 2) == 0
    read = lambda name: json.loads((tmp_path / name / "metrics.json").read_text())  # noqa: E731
    [point, *_] = read("x")["levels"]["image"]["outputs"]["1"]["sensitivity_at_specificity"]
    assert point["threshold"] is None and 35 < point["log_odds"] < 50
    assert f"log_odds={point['log_odds']}" in (tmp_path / "x" / "report.html").read_text()
    options = ["--level", "image", "--resamples", 2, "--threshold", f"log_odds={point['log_odds']}"]
    assert run("eval", files["a"], "--out", tmp_path / "y", *options) == 0
    assert read("y")["levels"]["image"]["outputs"]["1"]["at_threshold"]["sensitivity"]["value"] == point["value"]


def test_boxes_at_any_rate_and_overlap(files, tmp_path):
    marks = tmp_path / "marks.csv"
    rows = list(csv.DictReader(files["a"].open()))
    lines = [f"{row['image_path']},10,20,{12 if k % 2 else 18},{22 if k % 2 else 28},{k}" for k, row in enumerate(rows)]
    marks.write_text("image_path,top,bottom,left,right,score\n" + "\n".join(lines))
    options = ["--table", files["table"], "--split", "all", "--marks", marks, "--resamples", 5, "--level", "image"]
    extra = ["--false-marks", "0.3,1", "--iou", "0.5"]
    assert run("eval", files["a"], "--out", tmp_path / "out", *options, *extra) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["froc"]
    assert [row["false_marks_per_image"] for row in found["sensitivity"]] == [0.3, 1] and found["iou"] == 0.5
    positive = [k % 2 for k, row in enumerate(rows) if row["label"] == "1"]
    assert found["sensitivity"][1]["value"] == pytest.approx(sum(positive) / len(positive))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "overlap by 0.5 of their union" in page


def test_a_readers_study(tmp_path, capsys):
    random = np.random.default_rng(0)
    lines = ["case,patient_id,reader,modality,label,grade"]
    for case in range(60):
        for reader in "ABC":
            for modality in ("film", "digital"):
                grade = int(np.clip(np.rint(2.5 + case % 2 + random.normal()), 1, 5))
                lines.append(f"c{case},P{case},{reader},{modality},{case % 2},{grade}")
    table = tmp_path / "readings.csv"
    table.write_text("\n".join(lines))
    options = ["--score", "grade", "--reader", "reader", "--modality", "modality"]
    assert run("eval", table, "--out", tmp_path / "out", *options, "--covariance", "jackknife") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["cases"] == 60 and set(found["areas"]) == {"film", "digital"} and found["covariance"] == "jackknife"
    p = found["random_readers_random_cases"]["differences"]["film - digital"]["p"]
    assert "new readers and new cases: film - digital: AUC " in said and f"p {p:.3f}" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 readers, 60 cases, 30 positive" in page and "readings.csv" in page
    assert run("eval", table, "--out", tmp_path / "two", "--score", "grade", "--modality", "modality") == 2
    assert "--modality needs the readers" in capsys.readouterr().err


def test_overwriting_and_json(files, tmp_path, capsys):
    given = ["eval", files["a"], "--split", "all", "--resamples", "20", "--level", "image", "--out", tmp_path / "o"]
    (tmp_path / "o").mkdir()
    assert run(*given) == 0
    (tmp_path / "o" / "own.txt").write_text("kept")
    (tmp_path / "o" / "own.png").write_bytes(b"a picture of the user's own")
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    assert run(*given) == 2
    assert "or give --overwrite" in capsys.readouterr().err
    assert run(*given, "--overwrite", "--score", "nope") == 2  # what failed has replaced nothing
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before
    capsys.readouterr()
    assert run(*given, "--overwrite", "--json") == 0
    told = capsys.readouterr().out
    assert told == (tmp_path / "o" / "metrics.json").read_text() and json.loads(told)["levels"].keys() == {"image"}
    assert (tmp_path / "o" / "own.txt").exists() and (tmp_path / "o" / "own.png").exists()


def test_numbers(tmp_path, capsys):
    random = np.random.default_rng(3)
    truth = random.normal(50, 10, 60)
    found = truth + random.normal(1, 4, 60)
    path = tmp_path / "p.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "patient_id", "laterality", "label_age", "value_age"])
        for i, (one, other) in enumerate(zip(truth, found, strict=True)):
            writer.writerow([f"{i}.png", f"P{i // 2}", "LR"[i % 2], repr(float(one)), repr(float(other))])
    assert run("eval", path, "--resamples", "200", "--out", tmp_path / "o") == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "measured: 60 rows without a split; nothing is fitted" and second.startswith(
        "image level, age: MAE "
    )
    measured = json.loads((tmp_path / "o" / "metrics.json").read_text())["levels"]["image"]["outputs"]["age"]
    assert measured["mae"]["value"] == pytest.approx(np.abs(found - truth).mean())
    assert measured["pearson"]["value"] == pytest.approx(np.corrcoef(found, truth)[0, 1])
    assert measured["rmse"]["value"] ** 2 == pytest.approx(((found - truth) ** 2).mean())
    low, high = measured["mae"]["bootstrap"]
    assert low < measured["mae"]["value"] < high
    page = (tmp_path / "o" / "report.html").read_text()
    assert "Lin" in page and "Spearman" in page
    assert run("eval", path, "--threshold", "0.5", "--out", tmp_path / "t") == 2
    assert "do not apply to numbers; omit them" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_what_strangers_give(files, tmp_path, capsys):
    """A table without rows, a folder of predictions, an image that is there twice."""
    head = "image_path,label,patient_id,split,log_odds_1\n"
    (tmp_path / "empty.csv").write_text(head)
    assert run("eval", tmp_path / "empty.csv", "--out", tmp_path / "none") == 2
    assert "empty.csv: holds no predictions" in capsys.readouterr().err
    folder = tmp_path / "predictions"
    folder.mkdir()
    assert run("eval", folder, "--out", tmp_path / "none") == 2
    assert "predictions: holds no predictions.csv" in capsys.readouterr().err
    lines = [f"{n}.dcm,{n % 2},p{n},test,{n % 3}\n" for n in range(8)]
    (folder / "predictions.csv").write_text(head + "".join(lines))
    assert run("eval", folder, "--resamples", "20", "--out", tmp_path / "whole") == 0
    out, err = capsys.readouterr()
    assert "8 images" in out and "twice" not in err
    (folder / "predictions.csv").write_text(head + "".join([*lines, lines[2]]))
    assert run("eval", folder, "--resamples", "20", "--out", tmp_path / "twice") == 0
    assert "warning: 1 of 9 rows repeat an image (2.dcm)" in capsys.readouterr().err
