"""What a training says of its validation images, `gigamorph predict` says of them too with its best checkpoint."""

import csv

import pytest
from commands import rows, run

from gigamorph.engine.mammography.phantom import write_phantoms

LABELS = ["--task", "labels", "--label", "cluster", "--label", "lesion"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Phantoms with exams."""
    table = write_phantoms(tmp_path_factory.mktemp("phantoms"), patients=4, height=128, width=96, seed=1)
    found = rows(table)
    for row in found:
        row["exam_id"], row["label_lesion"] = "E", row["label"]
        del row["split"]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    return table


@pytest.mark.parametrize(
    "options",
    [["-o", "average=0.9", "--augment", "flip=left-right", "--precision", "bf16"], ["--views", "mean"], LABELS],
    ids=["images", "exams", "labels"],
)
def test_validation_rows_are_those_of_predict(table, tmp_path, options):
    network = ["--model", "lesionnet?stages=1", "--mean", "auto", "--std", "auto"]
    fast = [*network, "--folds", "2", "--epochs", "1", "--accumulate", "4"]
    assert run("train", table, *fast, *options, "--quiet", "--out", tmp_path / "run") == 0
    own, out = tmp_path / "run" / "fold1", tmp_path / "predicted"
    assert run("predict", own / "best.ckpt", table, "--out", out) == 0
    key, name = ("exam", "exams.csv") if "--views" in options else ("image_path", "predictions.csv")
    found, validated = {row[key]: row for row in rows(out / name)}, rows(own / "val.csv")
    assert len(validated) >= 2
    odds = ["log_odds_cluster", "log_odds_lesion"] if options == LABELS else ["log_odds_1"]
    for row in validated:
        other = found[row[key]]
        assert [float(row[o]) for o in odds] == pytest.approx([float(other[o]) for o in odds], rel=1e-5, abs=1e-6)
