"""Where the images of a prediction come from: tables and folders together, folders that are closed."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import archives
import pytest
from commands import rows

from gigamorph.engine.errors import DataError
from gigamorph.engine.predict.run import PredictOptions, Watch, predict

HERE = PredictOptions("m", workers=0)
FORGIVING = replace(HERE, max_failures=1.0, resume=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return archives.make_archive(tmp_path_factory.mktemp("archive"), 12)


def test_an_image_of_a_table_and_of_its_folder_counts_once_as_the_table_says(table, tmp_path):
    said = []
    predict(archives.tiny, [table], tmp_path / "whole", HERE)
    predict(archives.tiny, [table.parent, table], tmp_path / "out", HERE, Watch(warn=said.append))
    assert rows(tmp_path / "out" / "predictions.csv") == rows(tmp_path / "whole" / "predictions.csv")
    assert said == [f"12 images of {table.parent} are repeated, and count once"]


def test_an_image_of_two_tables_counts_once_and_has_one_label(table, tmp_path):
    said = []
    first, *others = table.read_text().splitlines()
    (table.parent / "more.csv").write_text("\n".join([first, *others[:3], others[0]]) + "\n")
    try:
        tables = [table, table.parent / "more.csv"]
        predict(archives.tiny, tables, tmp_path / "out", HERE, Watch(warn=said.append))
        assert len(rows(tmp_path / "out" / "predictions.csv")) == 12
        assert said == [f"4 images of {tables[1]} are repeated, and count once"]
        wrong = others[0].split(",")
        wrong[first.split(",").index("label")] = str(1 - int(wrong[first.split(",").index("label")]))
        tables[1].write_text("\n".join([first, ",".join(wrong)]) + "\n")
        with pytest.raises(DataError, match=r"more.csv: .* has label \d, but \d in an earlier source; keep one"):
            predict(archives.tiny, tables, tmp_path / "none", HERE)
    finally:
        (table.parent / "more.csv").unlink()


def test_a_sub_folder_that_is_closed_is_quarantined_and_the_others_are_predicted(table, tmp_path, monkeypatch):
    shutil.copytree(table.parent, tmp_path / "in")
    closed, iterdir, listdir = tmp_path / "in" / "closed", Path.iterdir, os.listdir
    closed.mkdir()

    def refuse(path, ask):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied")
        return ask(path)

    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path, iterdir))
    monkeypatch.setattr(os, "listdir", lambda path=".": refuse(path, listdir))
    assert predict(archives.tiny, [tmp_path / "in"], tmp_path / "out", FORGIVING).failed == 1
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 12
    [row] = rows(tmp_path / "out" / "quarantine.csv")
    assert row["reason"] == f"{closed}: cannot be read (Permission denied)"


def test_what_is_left_out_of_a_folder_is_told_once(tmp_path, caplog):
    """Masks are told apart in a look of its own at the whole folder, which says nothing of the rest."""
    images = archives.make_archive(tmp_path / "images" / "b", 2).parent
    (images / "table.csv").unlink()
    run = tmp_path / "images" / "a" / "run"
    run.mkdir(parents=True)
    (run.parent / "x.bmp").write_bytes(b"")
    (run / "last.ckpt").write_bytes(b"")
    found = predict(archives.tiny, [tmp_path / "images"], tmp_path / "out", PredictOptions("m", workers=0))
    assert found.done == 2
    told = [record.getMessage() for record in caplog.records]
    assert sum("results of gigamorph train" in line for line in told) == 1 and sum(".bmp" in line for line in told) == 1
