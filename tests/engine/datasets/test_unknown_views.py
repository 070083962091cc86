"""An image whose side, view or exam is not known makes no further breast, pair or exam; the same everywhere."""

import csv
import json

import archives
import pytest
from commands import rows, run
from hypothesis import given
from hypothesis import strategies as st

from gigamorph.engine.datasets.dataset import ExamDataset
from gigamorph.engine.datasets.tables import Record, read_table
from gigamorph.engine.datasets.tables.values import side
from gigamorph.engine.datasets.unknown_views import unplaced
from gigamorph.engine.errors import DataError
from gigamorph.engine.evaluate.read import read_cases
from gigamorph.engine.mammography.recipes.siamese.pairs import find_pairs
from gigamorph.engine.predict.run import PredictOptions, predict
from gigamorph.engine.train.metrics import Prediction, scores

HEADER = "image_path patient_id exam_id laterality view label log_odds_0 log_odds_1".split()


def written(path, changes):
    """Two patients of two breasts of two views; `changes` by row and column."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for n in range(8):
            row = [f"{n}.npy", f"p{n // 4}", "e", "LR"[n // 2 % 2], ("CC", "MLO")[n % 2], n // 2 % 2, -n, n]
            for column, value in changes.get(n, {}).items():
                row[HEADER.index(column)] = value
            writer.writerow(row)
    return path


@given(st.lists(st.tuples(st.sampled_from(["", "p", "q"]), st.sampled_from(["", "L", "R"])), max_size=12))
def test_only_rows_of_patients_of_whom_another_row_says_it(pairs):
    patients, values = [p for p, _ in pairs], [v for _, v in pairs]
    wanted = [n for n, (p, v) in enumerate(pairs) if p and not v and any(q == p and w for q, w in pairs)]
    assert unplaced(patients, values) == wanted


@given(st.sampled_from(["L", "l", "left", "LEFT", "Left"]), st.text(" \t", max_size=3), st.text(" \t", max_size=3))
def test_a_side_is_one_however_it_is_spelt(text, before, after):
    assert side(before + text + after) == "L"


@pytest.mark.parametrize("spelt", ["", "nan", "None"])
def test_a_missing_side_makes_no_third_breast(tmp_path, capsys, spelt):
    path = written(
        tmp_path / "p.csv", {1: {"laterality": spelt}, 2: {"laterality": " right "}, 5: {"laterality": spelt}}
    )
    assert run("eval", path, "--out", tmp_path / "out", "--resamples", 5) == 0
    error = capsys.readouterr().err
    told = "2 images without a side, but others of their patient have one (first: 1.npy, line 3); they are in no breast"
    assert error.count("\n") == 1 and told in error
    levels = json.loads((tmp_path / "out" / "metrics.json").read_text())["levels"]
    assert levels["breast"]["rows"] == 4 and levels["breast"]["left_out"] == 2
    assert levels["image"]["rows"] == 8 and levels["image"]["left_out"] == 0
    assert levels["exam"]["rows"] == 2 and levels["exam"]["left_out"] == 0  # its patient and exam are known


def test_a_missing_exam_makes_no_further_exam(tmp_path, capsys):
    path = written(tmp_path / "p.csv", {3: {"exam_id": ""}})
    assert run("eval", path, "--out", tmp_path / "out", "--resamples", 5) == 0
    assert (
        "1 image without an exam, but others of their patient have one (first: 3.npy, line 5)"
        in capsys.readouterr().err
    )
    levels = json.loads((tmp_path / "out" / "metrics.json").read_text())["levels"]
    assert levels["exam"]["rows"] == 2 and levels["exam"]["left_out"] == levels["breast"]["left_out"] == 1


def test_where_no_image_of_a_patient_has_a_side_each_stands_for_itself(tmp_path, capsys):
    path = written(tmp_path / "p.csv", {n: {"laterality": ""} for n in range(4)})
    breasts = read_cases(path).placed("breast").at("breast")
    assert len(breasts) == 6
    assert run("eval", path, "--out", tmp_path / "out", "--resamples", 5) == 0 and not capsys.readouterr().err


def test_a_side_that_is_none_is_refused(tmp_path):
    path = written(tmp_path / "p.csv", {1: {"laterality": "both"}})
    with pytest.raises(DataError, match="line 3: laterality 'both' is neither L nor R"):
        read_cases(path)


def test_tables_of_trainings_and_recipes_warn(tmp_path, caplog):
    path = written(tmp_path / "t.csv", {1: {"laterality": "nan"}, 2: {"view": ""}, 3: {"exam_id": ""}})
    records = read_table(path, check_files=False).records
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == [
        f"{path}: 1 image without a side",
        f"{path}: 1 image without a view",
        f"{path}: 1 image without an exam",
    ]
    assert all("(first: " in line and "line " in line for line in lines)

    class Images:
        def __init__(self, records):
            self.records = records

    exams = ExamDataset(Images(records))  # type: ignore[arg-type]
    assert [(one.patient_id, one.exam_id) for one in exams.samples] == [("p0", "e"), ("p1", "e")]
    with pytest.raises(DataError, match=r"1\.npy: the table has no laterality \(L, R\), view or exam"):
        find_pairs(records)
    said = []
    pairs = find_pairs(records, skip_unpaired=True, say=said.append)
    assert [pair.left.patient_id for pair in pairs] == ["p1", "p1"] and "omitted 4 of 8 images" in said[0]


def test_a_training_and_a_prediction_count_the_same_breasts(tmp_path, caplog):
    found = [Prediction(f"{n}", (-n, float(n)), n % 2, "p", "" if n == 2 else "LR"[n % 2], exam="e") for n in range(4)]
    assert scores(found, ["0", "1"])["breasts"] == 2
    table = archives.make_archive(tmp_path, 8)
    with table.open(newline="") as file:
        own = list(csv.DictReader(file))
    for n, row in enumerate(own):
        row |= {
            "patient_id": f"p{n // 4}",
            "laterality": "" if n == 1 else "LR"[n // 2 % 2],
            "exam_id": "e" if n != 6 else "",
        }
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(own[0]))
        writer.writeheader()
        writer.writerows(own)
    predict(archives.stub, [table], tmp_path / "out", PredictOptions("m", workers=0))
    breasts, exams = rows(tmp_path / "out" / "breasts.csv"), rows(tmp_path / "out" / "exams.csv")
    assert [(row["patient_id"], row["laterality"]) for row in breasts] == [
        ("p0", "L"),
        ("p0", "R"),
        ("p1", "L"),
        ("p1", "R"),
    ]
    assert [row["patient_id"] for row in exams] == ["p0", "p1"]
    assert "1 image without a side" in caplog.text and "1 image without an exam" in caplog.text


def test_frames_are_no_repeats(tmp_path, capsys):
    lines = [f"a.dcm,{n},p{n},{n % 2},{n}" for n in range(4)]
    (tmp_path / "p.csv").write_text("\n".join(["image_path,frame,patient_id,label,score_1", *lines]) + "\n")
    assert run("eval", tmp_path / "p.csv", "--out", tmp_path / "out", "--resamples", 5) == 0
    assert "repeat an image" not in capsys.readouterr().err


def test_a_record_without_a_patient_is_of_no_other():
    record = Record("a.png", 0, "a.png", patient_known=False)  # type: ignore[arg-type]
    assert unplaced([""], [record.laterality or ""]) == []
