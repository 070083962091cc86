"""Several frames of one file: each row of the tables names its frame, and who reads them opens that one."""

import archives
import numpy as np
import pytest
import tifffile
from commands import rows

from gigamorph.engine.errors import DataError
from gigamorph.engine.evaluate.compare import common
from gigamorph.engine.evaluate.read import read_cases, read_marks
from gigamorph.engine.explain import ExplainOptions, explain
from gigamorph.engine.mammography.view.exams import read_exams
from gigamorph.engine.mammography.view.site import ViewerFiles
from gigamorph.engine.predict.run import PredictOptions, predict

MADE = {"model": "sha", "checkpoint": "net", "device": "cpu", "workers": 0}
HOW = ("white", "chest_wall")
READ = [{"white": "4000", "chest_wall": "left"}, {"white": "1000", "chest_wall": "right"}]


@pytest.fixture
def tables(tmp_path):
    """(table of the frames of one file, table of files with the same pixels), without patients."""
    frames = np.random.default_rng(0).integers(0, 1000, (2, 40, 36), np.uint16)
    frames[1] //= 2
    tifffile.imwrite(tmp_path / "both.tif", frames, photometric="minisblack")
    lines = {
        "frames.csv": ["image_path,frame,label,white,chest_wall"],
        "files.csv": ["image_path,label,white,chest_wall"],
    }
    for number, how in enumerate(READ):
        tifffile.imwrite(tmp_path / f"{number}.tif", frames[number])
        end = f"{number},{how['white']},{how['chest_wall']}"
        lines["frames.csv"].append(f"both.tif,{number}.0,{end}")
        lines["files.csv"].append(f"{number}.tif,{end}")
    for name, text in lines.items():
        (tmp_path / name).write_text("\n".join(text) + "\n")
    return tmp_path / "frames.csv", tmp_path / "files.csv"


def predicted(table, out):
    predict(archives.tiny, [table], out, PredictOptions(**MADE))
    return out / "predictions.csv"


def odds(path):
    return [row["log_odds_1"] for row in rows(path)]


def pictures(predictions, table=None):
    """The tile of each image, in the order of the predictions."""
    exams = read_exams(predictions, table=table)
    site = ViewerFiles(exams, None, identifiers=True)
    by_label = sorted(range(len(site.views)), key=lambda number: site.views[number].truth["1"])
    return [site.tiles_of(number).tile(0, 0, 0) for number in by_label], exams


def test_predictions_of_frames_say_how_their_pixels_are_read(tables, tmp_path):
    frames, files = (predicted(table, tmp_path / table.stem) for table in tables)
    assert [row["frame"] for row in rows(frames)] == ["0", "1"] and "frame" not in rows(files)[0]
    for path in (frames, files):
        assert [{name: row[name] for name in HOW} for row in rows(path)] == READ
    assert len(set(odds(frames))) == 2 and odds(frames) == odds(files)
    again = predicted(frames, tmp_path / "again")  # as a table of images
    assert odds(again) == odds(frames)


@pytest.mark.parametrize("with_table", [False, True])
def test_the_viewer_shows_each_frame(tables, tmp_path, with_table):
    (frames, exams), (files, _) = (
        pictures(predicted(table, tmp_path / table.stem), table if with_table else None) for table in tables
    )
    assert len(set(frames)) == 2 and frames == files
    assert [len(exam.views) for exam in exams] == [1, 1]  # whose patient is not known


def test_predictions_without_frames_are_not_shown_with_a_table_of_several(tables, tmp_path):
    frames = predicted(tables[0], tmp_path / "out")
    lines = [",".join((line.split(",")[0], *line.split(",")[2:])) for line in frames.read_text().splitlines()]
    frames.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"predictions\.csv, line 2: .*both\.tif has several frames in .*; predict again"
    ):
        read_exams(frames, table=tables[0])


def test_marks_are_of_their_frame(tables, tmp_path):
    marks = []
    for table in tables:
        out = tmp_path / table.stem
        explain(archives.tiny, [table], out, ExplainOptions(**MADE))
        marks.append(rows(out / "marks.csv"))
    assert {row["frame"] for row in marks[0]} == {"0", "1"} and "frame" not in marks[1][0]
    for number in range(2):
        own = [row for row in marks[0] if row["frame"] == str(number)]
        others = [row for row in marks[1] if row["image_path"].endswith(f"/{number}.tif")]
        assert own and [row["score"] for row in own] == [row["score"] for row in others]
    cases = read_cases(predicted(tables[0], tmp_path / "out"), table=tables[0])
    found, _ = read_marks(tmp_path / "frames" / "marks.csv", tables[0], cases)
    assert [len(one.scores) for one in found] == [sum(row["frame"] == name for row in marks[0]) for name in "01"]


def test_predictions_of_frames_are_compared_frame_by_frame(tables, tmp_path):
    cases = read_cases(predicted(tables[0], tmp_path / "out"), table=tables[0])
    one, two = common(cases, cases.where([1, 0]))
    assert one.scores.tolist() == two.scores.tolist() == cases.scores.tolist()
