"""The runner of predictions: what is done once, by whom, and what bad input does to it."""

import functools
import http.server
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import archives
import fsspec
import lookalikes
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from commands import rows
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.tables import Record, read_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.evaluate.read import read_cases
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.predict.decoders import Ahead
from gigamorph.engine.predict.index import RunDatabase
from gigamorph.engine.predict.parts import read_parts
from gigamorph.engine.predict.predictor import Classifier
from gigamorph.engine.predict.rows import Row, Work
from gigamorph.engine.predict.run import PredictOptions, Summary, Watch, predict

HERE = PredictOptions("m", workers=0)
FORGIVING = replace(HERE, max_failures=1.0, resume=True)


def keys(out):
    return [row["key"] for some in read_parts(out / "parts") for row in some]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return archives.make_archive(tmp_path_factory.mktemp("archive"), 12)


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    predict(archives.tiny, [table], out, HERE)
    return out


class Counted:
    """A classifier whose images are counted as they are opened, in this process."""

    def __init__(self):
        self.opened = []

    def __call__(self, *, device):
        def images(records):
            self.opened += [record.path.name for record in records]
            return ImageDataset(records, channels=1)

        return Classifier(archives.Sum(), archives.CLASSES, images)


# ---- one run


def test_the_rows_are_those_of_the_table_with_the_networks_outputs(table, whole):
    found = rows(whole / "predictions.csv")
    assert [Path(row["image_path"]).name for row in found] == [row["image_path"] for row in rows(table)]
    net = archives.tiny(device="cpu").net.eval()
    for row, item in zip(found, ImageDataset(read_table(table).records, channels=1, flip=False), strict=True):
        _, height, width = item["image"].shape
        with torch.no_grad():
            logits = net(item["image"].read(0, height, 0, width)[None])[0].double()
        assert float(row["log_odds_1"]) == pytest.approx(float(logits[1] - logits[0]), rel=1e-5)
    assert len(rows(whole / "breasts.csv")) == 6 and not (whole / "quarantine.csv").exists()


@pytest.mark.parametrize(
    ("trained_on", "told"), [(12, True), (10, True), (6, True), (5, False), (13, False), (0, False)]
)
def test_a_table_that_a_training_may_have_been_of_is_asked_for_its_splits(table, tmp_path, trained_on, told):
    class Splits(ImageDataset):
        def __init__(self, records):
            super().__init__([replace(record, split="val") for record in records], channels=1)

    def opener(*, device):
        return Classifier(archives.Sum(), archives.CLASSES, Splits, trained_on)

    table = shutil.copy(table, Path(table).with_name("no_splits.csv"))
    lines = [row | {"split": ""} for row in rows(table)]
    Path(table).write_text("\n".join([",".join(lines[0]), *(",".join(row.values()) for row in lines)]) + "\n")
    predict(opener, [table], tmp_path / "out", HERE)
    assert {row["split"] for row in rows(tmp_path / "out" / "predictions.csv")} == {"val" if told else ""}


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_ahead_changes_no_bit(table, whole, tmp_path, workers):
    predict(archives.tiny, [table], tmp_path / "out", replace(HERE, workers=workers))
    for name in ("predictions.csv", "breasts.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_an_error_leaves_no_process_that_reads_ahead(table, tmp_path, monkeypatch):
    """Where this process is a child of multiprocessing, one that is left would never end: its queue is closed first."""

    def full(self, row):
        raise GigamorphError("the disk is full")

    monkeypatch.setattr("gigamorph.engine.predict.parts.Parts.append", full)
    before = set(multiprocessing.active_children())
    with pytest.raises(GigamorphError, match="the disk is full"):
        predict(archives.tiny, [table], tmp_path / "out", replace(HERE, workers=2))
    assert set(multiprocessing.active_children()) <= before


def test_two_devices_give_the_rows_of_one_bit_for_bit(table, whole, tmp_path):
    found = predict(archives.tiny, [table], tmp_path / "out", replace(HERE, devices=2, workers=1))
    assert (found.done, found.computed, found.complete) == (12, 12, True)
    for name in ("predictions.csv", "breasts.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def killing(*, device: str, parent: int) -> Classifier:
    class Deadly(archives.Sum):
        def forward(self, source):
            if source.name.endswith("0004.npy") and os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(source)

    return Classifier(Deadly(), archives.CLASSES, functools.partial(ImageDataset, channels=1))


def test_a_device_process_that_dies_is_named_and_the_rest_is_kept(table, tmp_path, monkeypatch):
    # Forked: new interpreters, as users have them, are begun where two devices give the rows of one.
    start = functools.partial(multiprocessing.get_context, "fork")
    monkeypatch.setattr("gigamorph.engine.predict.devices.multiprocessing.get_context", lambda _: start())
    options = replace(HERE, devices=2, workers=0)
    with pytest.raises(GigamorphError, match=r"process of device \d was ended by signal 9; it may have run out of mem"):
        predict(functools.partial(killing, parent=os.getpid()), [table], tmp_path / "out", options)
    assert predict(archives.stub, [table], tmp_path / "out", replace(HERE, resume=True)).done == 12
    assert len(set(keys(tmp_path / "out"))) == len(keys(tmp_path / "out")) == 12


def test_mammograms_that_are_decoded_ahead_are_turned_and_drawn_as_they_are_here(tmp_path):
    write_phantoms(tmp_path / "p", patients=2, height=160, width=128, seed=1)
    images = sorted((tmp_path / "p" / "images").iterdir())

    def classifier(*, device):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
        return Classifier(accelerate(nn.Sequential(*layers)), ["0", "1"], functools.partial(ImageDataset, channels=1))

    for name, workers in (("here", 0), ("ahead", 1)):
        predict(classifier, images, tmp_path / name, replace(HERE, heatmaps=True, workers=workers))
    found = {path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.[cp][sn][vg]")}
    assert len(found) == 3 + len(images)
    for path in found:
        assert (tmp_path / "here" / path).read_bytes() == (tmp_path / "ahead" / path).read_bytes()
    assert {row["laterality"] for row in rows(tmp_path / "ahead" / "predictions.csv")} == {"L", "R"}


# ---- resuming


def test_only_what_is_left_is_computed(table, tmp_path):
    part = tmp_path / "part.csv"
    lines = [line.replace(",P", ",P", 1) for line in table.read_text().splitlines()]
    part.write_text("\n".join([lines[0], *(f"{table.parent}/{line}" for line in lines[1:6])]) + "\n")
    first, second = Counted(), Counted()
    predict(first, [part], tmp_path / "out", HERE)
    warned = []
    found = predict(second, [table], tmp_path / "out", replace(HERE, resume=True), Watch(warn=warned.append))
    assert len(first.opened) == 5 and second.opened == [f"{n:04d}.npy" for n in range(5, 12)]
    assert (found.computed, found.done, len(rows(tmp_path / "out" / "predictions.csv"))) == (7, 12, 12)
    assert len(warned) == 1 and "the table has changed since the run started (5 rows then, 12 now)" in warned[0]
    # A table that names fewer images: what it no longer names stays in the parts, and is not in the tables.
    warned.clear()
    assert predict(second, [part], tmp_path / "out", replace(HERE, resume=True), Watch(warn=warned.append)).done == 5
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 5 and len(keys(tmp_path / "out")) == 12
    assert any("has 7 results of images that are not in the table" in text for text in warned)


def test_a_folder_that_is_not_this_runs_is_refused(table, tmp_path):
    out = tmp_path / "out"
    options = replace(HERE, checkpoint="first.ckpt")
    predict(archives.stub, [table], out, options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = replace(options, resume=True)
    for other, message in (
        (options, "already holds predictions; continue with --resume, or name another --out"),
        (replace(again, model="other"), r"has results of another model \(first.ckpt, SHA-256 m...\); name another"),
        (replace(again, heatmaps=True), "was started without --heatmaps; continue without it"),
        (replace(again, identifiers=True), "was started without --identifiers"),
    ):
        with pytest.raises(GigamorphError, match=message):
            predict(archives.stub, [table], out, other)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_that_came_to_nothing_is_in_nobodys_way(table, tmp_path):
    with pytest.raises(DataError, match="damaged"):
        (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY damaged")
        predict(archives.stub, [tmp_path / "bad.npy"], tmp_path / "out", HERE)
    warned = []
    options = replace(HERE, model="another", identifiers=True)
    assert predict(archives.stub, [table], tmp_path / "out", options, Watch(warn=warned.append)).done == 12
    assert not warned and json.loads((tmp_path / "out" / "run.json").read_text())["model"] == "another"


# ---- failures


@pytest.fixture
def damaged(tmp_path):
    table = archives.make_archive(tmp_path / "images", 12)
    for number in (2, 5, 9):
        (table.parent / f"{number:04d}.npy").write_bytes(b"\x93NUMPY damaged")
    return table


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_fail_go_to_quarantine_and_are_tried_again_when_asked(damaged, tmp_path, workers):
    out, options = tmp_path / "out", replace(FORGIVING, workers=workers)
    told = []
    found = predict(archives.stub, [damaged], out, options, Watch(failed=lambda image, reason: told.append(image)))
    assert (found.done, found.failed, found.complete) == (9, 3, True)
    table = rows(out / "quarantine.csv")
    assert [Path(row["image_path"]).stem for row in table] == ["0002", "0005", "0009"] == [Path(t).stem for t in told]
    assert all("damaged .npy header" in row["reason"] and "\n" not in row["reason"] for row in table)
    np.save(damaged.parent / "0005.npy", np.ones((20, 20), np.float32))
    counted = Counted()
    assert predict(counted, [damaged], out, replace(options, workers=0)).failed == 3 and counted.opened == []
    found = predict(counted, [damaged], out, replace(options, workers=0, retry_failed=True))
    assert counted.opened == ["0002.npy", "0005.npy", "0009.npy"] and (found.done, found.failed) == (10, 2)
    assert [Path(row["image_path"]).stem for row in rows(out / "quarantine.csv")] == ["0002", "0009"]
    assert len(rows(out / "predictions.csv")) == 10


def test_too_many_failures_stop_the_run(damaged, tmp_path):
    options = replace(FORGIVING, max_failures=0.1)
    with pytest.raises(
        GigamorphError, match=r"2 of \d images failed, more than --max-failures 10.00% .*0005.npy: damag"
    ):
        predict(archives.stub, [damaged], tmp_path / "out", options)
    assert [Path(row["image_path"]).stem for row in rows(tmp_path / "out" / "quarantine.csv")] == ["0002", "0005"]
    found = predict(archives.stub, [damaged], tmp_path / "out", replace(options, max_failures=0.25))
    assert (found.done, found.failed, found.computed) == (9, 3, 5)


def test_without_leave_the_first_failure_ends_the_run_and_is_tried_again(damaged, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match=r"0002\.npy: damaged"):
            predict(archives.stub, [damaged], tmp_path / "out", replace(HERE, resume=True))
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 2 and not (tmp_path / "out" / "quarantine.csv").exists()


class Crashing(ImageDataset):
    def __getitem__(self, index):
        if self.records[index].path.stem in ("0003", "0008"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.records[index].path.stem == "0006":
            raise ZeroDivisionError("a decoder's fault")
        return super().__getitem__(index)


def crashing(*, device):
    return Classifier(archives.Sum(), archives.CLASSES, functools.partial(Crashing, channels=1))


def test_a_decoder_that_crashes_costs_its_image_only(table, tmp_path):
    found = predict(crashing, [table], tmp_path / "out", replace(FORGIVING, workers=2))
    assert (found.done, found.failed) == (9, 3)
    reasons = [row["reason"] for row in rows(tmp_path / "out" / "quarantine.csv")]
    assert "0003.npy: reading it ended the process" in reasons[0] and "0008.npy" in reasons[2]
    assert reasons[1].endswith("0006.npy: cannot be read (ZeroDivisionError: a decoder's fault)")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):  # not hidden where failures are not asked for
        predict(crashing, [table.parent / "0006.npy"], tmp_path / "strict", replace(HERE, workers=1))


class LateCrash(ImageDataset):
    """Image 0000 crashes its decoder; the next is asked for when that has been seen."""

    def __getitem__(self, index):
        if self.records[index].path.stem == "0000":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_decoder_that_has_crashed_before_the_next_image_is_asked_for(table, tmp_path):
    def work():
        for number, path in enumerate(sorted(table.parent.glob("000[0-2].npy"))):
            if number == 1:  # until the executor knows
                deadline = time.monotonic() + 20
                while not ahead._pool._broken and time.monotonic() < deadline:
                    time.sleep(0.01)
            yield Work(path.name, Row(Record(path, -1, path.name)))

    open_one = lambda record, work: {**LateCrash([record], channels=1)[0], "record": record}  # noqa: E731
    with Ahead(open_one, workers=1, depth=2, staging=tmp_path) as ahead:
        found = list(ahead(work()))
    assert [opened.error is None for opened in found] == [False, True, True]


# ---- tables and places


def test_duplicate_images_have_one_result_and_both_rows(table, tmp_path):
    image = table.parent / "0001.npy"
    twice = tmp_path / "t.csv"
    twice.write_text(f"image_path,patient_id,label\n{image},a,0\n{table.parent}/0002.npy,b,1\n{image},c,1\n")
    counted = Counted()
    found = predict(counted, [twice], tmp_path / "out", HERE)
    assert (found.images, found.computed) == (2, 2) and len(counted.opened) == 2
    written = rows(tmp_path / "out" / "predictions.csv")
    assert [(row["patient_id"], row["label"]) for row in written] == [("a", "0"), ("b", "1"), ("c", "1")]
    assert written[0]["log_odds_1"] == written[2]["log_odds_1"] != written[1]["log_odds_1"]
    assert len(keys(tmp_path / "out")) == 2


def test_parquet_csv_and_folder_say_the_same(table, whole, tmp_path):
    parquet = table.parent / "table.parquet"
    pq.write_table(pyarrow.csv.read_csv(table), parquet, row_group_size=5)
    gz = table.parent / "table.csv.gz"
    import gzip

    gz.write_bytes(gzip.compress(table.read_bytes()))
    for source in (parquet, gz):
        predict(archives.tiny, [source], tmp_path / source.name, HERE)
        assert (tmp_path / source.name / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    for path in (parquet, gz):
        path.unlink()
    folder = tmp_path / "folder"
    shutil.copytree(table.parent, folder)
    (folder / "table.csv").unlink()
    predict(archives.tiny, [folder], tmp_path / "f", HERE)
    log_odds = [row["log_odds_1"] for row in rows(whole / "predictions.csv")]
    assert [row["log_odds_1"] for row in rows(tmp_path / "f" / "predictions.csv")] == log_odds


def test_masks_of_a_folder_are_no_images(table, tmp_path):
    """Also of a folder elsewhere; and without an ordinary image beside them they are what is asked for."""
    folder = tmp_path / "folder"
    (folder / "masks").mkdir(parents=True)
    for name in ("0.npy", "1.npy", "0_mask.npy", "masks/1.npy"):
        shutil.copy(table.parent / "0000.npy", folder / name)
    for number, source in enumerate((folder, f"file://{folder}")):
        told, out = [], tmp_path / str(number)
        predict(archives.stub, [source], out, HERE, Watch(warn=told.append))
        assert [Path(row["image_path"]).name for row in rows(out / "predictions.csv")] == ["0.npy", "1.npy"]
        assert len(told) == 1 and "2 masks are left out, recognised by name, the first" in told[0]
    assert predict(archives.stub, [folder / "masks"], tmp_path / "masks", HERE).images == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.npy,0\n", "column image_path is missing"),
        ("image_path,label\na.npy,0\nb.npy\n", "line 3: has 1 cells, but the header has 2"),
        ("image_path\n\0\n", "it contains zero bytes"),
        ("image_path,frame\na.npy,x\n", "line 2: frame 'x' must be a number"),
        ("image_path\n", "no images to predict"),
        ("image_path\nnone.npy\nnope.npy\n", "2 of 2 images do not exist: .*none.npy, .*nope.npy"),
    ],
)
def test_a_wrong_table_is_one_line_before_anything_is_written(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        predict(archives.stub, [tmp_path / "t.csv"], tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()


def test_labels_are_written_by_name(table, tmp_path):
    """Numbers said something only together with the order of the columns."""
    text = table.read_text().splitlines()
    cells = [line.split(",") for line in text[1:]]
    for row in cells:
        row[4] = {"0": "cancer", "1": "normal"}[row[4]]
    given = table.parent / "named.csv"
    given.write_text("\n".join([text[0], *map(",".join, cells)]) + "\n")

    def opener(*, device):
        return Classifier(archives.Sum(), ("cancer", "normal"), functools.partial(ImageDataset, channels=1))

    predict(opener, [given], tmp_path / "out", HERE)
    written = rows(tmp_path / "out" / "predictions.csv")
    assert [row["label"] for row in written] == [row[4] for row in cells]
    assert {row["label"] for row in rows(tmp_path / "out" / "breasts.csv")} <= {"cancer", "normal"}
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["classes"] == ["cancer", "normal"]
    cases = read_cases(tmp_path / "out" / "predictions.csv")
    assert cases.outputs == ("cancer",)
    assert cases.truth[:, 0].tolist() == [float(row[4] == "cancer") for row in cells]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_count_where_they_are_known(table, tmp_path, kind):
    text = table.read_text().splitlines()
    cells = [line.split(",") for line in text[1:]]
    for row, label in zip(cells, ["", "7", "true"], strict=False):
        row[4] = label
    names = text[0].split(",")
    names[1] = "who"  # no patient is named, either
    (table.parent / "some.csv").write_text("\n".join(map(",".join, [names, *cells])) + "\n")
    given = table.parent / f"some.{kind}"
    if kind == "parquet":
        pq.write_table(pa.csv.read_csv(table.parent / "some.csv"), given)
    told = []
    predict(archives.stub, [given], tmp_path / "out", HERE, Watch(warn=told.append))
    known = [row["label"] for row in rows(tmp_path / "out" / "predictions.csv")]
    assert known == ["", "", "", *(row[4] for row in cells[3:])]
    assert told == [
        f"{given}: the labels of 2 images are not among the classes 0, 1 and count as unknown: 7 (1), true (1)"
    ]


def test_the_study_of_a_header_is_the_exam(tmp_path):
    for number, (patient, study) in enumerate([("A", "1.2"), ("A", "1.3"), ("B", "1.4"), ("A", "1.2")]):
        place = tmp_path / "images" / f"{number}.dcm"
        lookalikes.dicom(place, PatientID=patient, StudyInstanceUID=study, ImageLaterality="R", ViewPosition="CC")
    for identifiers, exams in ((False, ["E00001", "E00002", "E00003", "E00001"]), (True, ["1.2", "1.3", "1.4", "1.2"])):
        out = tmp_path / f"out{identifiers}"
        predict(archives.stub, [tmp_path / "images"], out, replace(HERE, identifiers=identifiers))
        assert [row["exam_id"] for row in rows(out / "predictions.csv")] == exams
        assert [row["exam_id"] for row in rows(out / "exams.csv")] == exams[:3]
        assert len(rows(out / "breasts.csv")) == 3
    kept = pq.read_table(tmp_path / "outFalse" / "parts").to_pylist()
    assert not any(row["header_exam"].startswith("1.") for row in kept)


def test_a_header_without_a_patient_has_a_study(tmp_path):
    """Its views are one exam and its patient; without a study they are nobody's."""
    for number, elements in enumerate(2 * [{"StudyInstanceUID": "1.2", "PatientID": ""}] + [{}]):
        lookalikes.dicom(tmp_path / "images" / f"{number}.dcm", ImageLaterality="R", **elements)
    predict(archives.stub, [tmp_path / "images"], tmp_path / "out", HERE)
    found = rows(tmp_path / "out" / "predictions.csv")
    assert [(row["patient_id"], row["exam_id"]) for row in found[:2]] == 2 * [("P00001", "E00001")]
    assert found[2]["patient_id"].endswith("2.dcm") and not found[2]["exam_id"]
    assert len(rows(tmp_path / "out" / "breasts.csv")) == 2


def test_numbers_that_a_table_has_given_are_not_given_again(tmp_path):
    """As in a table of `data index`, in which a header without a patient leaves one unknown."""
    for name, elements in {"a": {"PatientID": "A"}, "b": {"PatientID": "", "StudyInstanceUID": "1.2"}}.items():
        lookalikes.dicom(tmp_path / f"{name}.dcm", ImageLaterality="R", ViewPosition="CC", **elements)
    table = tmp_path / "table.csv"
    table.write_text("image_path,patient_id,exam_id\na.dcm,P00001,E00001\nb.dcm,,\n")
    predict(archives.stub, [table], tmp_path / "out", HERE)
    found = rows(tmp_path / "out" / "predictions.csv")
    assert [(row["patient_id"], row["exam_id"]) for row in found] == [("P00001", "E00001"), ("P00002", "E00002")]
    assert len(rows(tmp_path / "out" / "breasts.csv")) == len(rows(tmp_path / "out" / "exams.csv")) == 2


def test_a_name_that_cannot_be_asked_for_costs_its_image_alone(table, tmp_path):
    given = tmp_path / "t.csv"
    given.write_text(f"image_path\n{'a' * 300}.npy\n{table.parent / '0000.npy'}\n")
    assert predict(archives.stub, [given], tmp_path / "out", FORGIVING).done == 1
    assert "cannot be read (File name too long)" in (tmp_path / "out" / "quarantine.csv").read_text()
    with pytest.raises(DataError, match="cannot be read"):
        predict(archives.stub, [given], tmp_path / "strict", HERE)


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"t\.parquet: is not a readable Parquet file"):
        predict(archives.stub, [tmp_path / "t.parquet"], tmp_path / "out", HERE)
    with pytest.raises(DataError, match=r"none\.parquet: no such file$"):
        predict(archives.stub, [tmp_path / "none.parquet"], tmp_path / "out", HERE)


@pytest.fixture
def server(table):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(table.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_in_memory_in_an_archive_and_on_a_server_are_those_on_the_disk(table, whole, tmp_path, server, workers):
    names = [f"{number:04d}.npy" for number in range(4)]
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in names:
            memory.pipe(f"/exams/{name}", (table.parent / name).read_bytes())
            archive.write(table.parent / name, f"inner/{name}")
    expected = [row["log_odds_1"] for row in rows(whole / "predictions.csv")][:4]
    listed = tmp_path / "t.csv"
    listed.write_text("image_path,patient_id\n" + "".join(f"{server}/{name},p{name}\n" for name in names))
    options = replace(HERE, workers=workers)
    for number, source in enumerate(["memory://exams", f"zip://inner::{tmp_path}/images.zip", listed]):
        out = tmp_path / f"{workers}-{number}"
        found = predict(archives.tiny, [source], out, options)
        written = rows(out / "predictions.csv")
        assert found.done == 4 and [row["log_odds_1"] for row in written] == expected, source
        assert written[3]["image_path"].split("::")[0].endswith("/0003.npy") and "://" in written[3]["image_path"]
    own = f"-{os.getpid()}-"
    assert not [path for path in Path(tempfile.gettempdir()).glob(".gigamorph.*") if own in path.name]


def test_the_folder_of_fetched_files_cannot_be_made_before(table, tmp_path, monkeypatch):
    """Its name was a hash of that of --out, and a file of that name, as of another account, stopped the run."""
    names, make = [], os.mkdir

    def noted(path, *args, **kwargs):
        if Path(path).parent == tmp_path / "temporary":
            names.append((Path(path).name, args))
        return make(path, *args, **kwargs)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(os, "mkdir", noted)
    for _ in range(2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert predict(archives.tiny, [table], tmp_path / "out", replace(HERE, workers=0)).done == 12
    assert len({name for name, _ in names}) == 2 and all(args == (0o700,) for _, args in names)
    assert not os.listdir(tmp_path / "temporary")


def test_a_store_that_cannot_be_reached_and_a_file_that_is_not_there(table, server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    listed = tmp_path / "t.csv"
    listed.write_text(f"image_path\n{server}/0001.npy\n{server}/none.npy\nhttp://127.0.0.1:9/a.npy\nodd://x/a.npy\n")
    found = predict(archives.stub, [listed], tmp_path / "out", FORGIVING)
    assert (found.done, found.failed) == (1, 3)
    reasons = [row["reason"] for row in rows(tmp_path / "out" / "quarantine.csv")]
    assert all("://" in reason and "cannot be fetched (" in reason and "/tmp" not in reason for reason in reasons)
    with pytest.raises(DataError, match=r"none\.npy: cannot be fetched \(FileNotFoundError"):
        predict(archives.stub, [f"{server}/none.npy"], tmp_path / "strict", HERE)


def test_an_image_that_is_named_by_its_url_is_one_among_others(table, server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    found = predict(archives.stub, [f"{server}/0001.npy", "http://127.0.0.1:9/a.dcm"], tmp_path / "out", FORGIVING)
    assert (found.done, found.failed) == (1, 1)
    assert "a.dcm: cannot be fetched (ClientConnectorError" in (tmp_path / "out" / "quarantine.csv").read_text()


def test_a_folder_that_cannot_be_written_is_no_full_disk(table):
    with pytest.raises(GigamorphError, match="/proc/none: cannot be written: No such file or directory; name another"):
        predict(archives.stub, [table], "/proc/none", HERE)


# ---- shards


def index_of(sizes, shards):
    with RunDatabase(lambda row: row.key("m")) as index:
        records = [
            Record(Path(f"{n}.npy"), -1, f"{n}", extra={"rows": str(size), "columns": "10"})
            for n, size in enumerate(sizes)
        ]
        index.fill(records, ["0", "1"], check_files=False)
        index.share_out(shards)
        return [[int(one.row.record.path.stem) for one in index.work(n + 1, failed=False)] for n in range(shards)]


def test_shards_are_a_partition_with_about_as_many_pixels_each():
    random = np.random.default_rng(0)
    for shards in (1, 3, 8):
        sizes = random.choice([10, 100, 1000, 3000], 200).tolist()
        found = index_of(sizes, shards)
        assert found == index_of(sizes, shards)  # whoever asks
        assert sorted(n for part in found for n in part) == list(range(200))
        loads = [sum(sizes[n] for n in part) for part in found]
        assert max(loads) - min(loads) <= max(sizes) and max(loads) < 1.05 * sum(sizes) / shards
        assert all(part == sorted(part) for part in found)


def test_shards_into_one_folder_are_one_run(table, whole, tmp_path):
    out, ends = tmp_path / "out", []
    for number in (1, 2, 3):
        ends.append(predict(archives.tiny, [table], out, replace(HERE, shard=(number, 3))))
        assert (out / "predictions.csv").exists() == (number == 3)
    assert [end.complete for end in ends] == [False, False, True] and sum(end.computed for end in ends) == 12
    for name in ("predictions.csv", "breasts.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(GigamorphError, match="already holds predictions; continue with --resume"):
        predict(archives.tiny, [table], out, replace(HERE, shard=(2, 3)))
    # What other shards have done is done, however many there are now.
    assert predict(archives.tiny, [table], out, replace(HERE, shard=(1, 2), resume=True)).computed == 0


def test_sizes_that_the_table_does_not_say_are_looked_up(tmp_path):
    for number, side in enumerate((40, 8, 8, 8, 8)):
        np.save(tmp_path / f"{number}.npy", np.ones((side, side), np.float32))
    done = [predict(archives.stub, [tmp_path], tmp_path / "o", replace(HERE, shard=(n, 2))).images for n in (1, 2)]
    assert sorted(done) == [1, 4]  # and what the run has written below the folder are none of its images
    assert predict(archives.stub, [tmp_path], tmp_path / "o", replace(HERE, resume=True)).images == 5


# ---- how it goes


def test_a_device_that_is_slower_than_the_decoder_hardly_waits(table, tmp_path):
    class Slow(ImageDataset):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    def classifier(*, device):
        return Classifier(archives.Sum(0.1), archives.CLASSES, functools.partial(Slow, channels=1))

    idle = {}
    for workers in (0, 2):
        found = predict(classifier, [table], tmp_path / str(workers), replace(HERE, workers=workers))
        assert isinstance(found, Summary) and found.computed == 12
        idle[workers] = found.idle
    assert idle[0] > 0.2 and idle[2] < 0.6 * idle[0]


def test_a_crowd_of_quick_images_goes_to_a_worker_together(table, tmp_path):
    def images(record, work):
        return {**ImageDataset([record], channels=1)[0], "record": work.row.record}

    work = [Work(str(n), Row(Record(table.parent / f"{n % 12:04d}.npy", -1, "p"))) for n in range(200)]
    with Ahead(images, 1, 3, tmp_path) as ahead:
        found = list(ahead(work))
    # Python's end is no moment at which a pool may still be ending: "Bad file descriptor".
    assert not [thread for thread in threading.enumerate() if "Executor" in type(thread).__name__]
    assert [one.work.key for one in found] == [str(n) for n in range(200)] and not any(one.error for one in found)
    for one in found[:12]:
        expected = np.load(one.work.row.record.path)[None]
        _, height, width = expected.shape
        assert np.array_equal(one.item["image"].read(0, height, 0, width).numpy(), expected)


def test_patients_whom_only_headers_name_are_numbered_alike_after_a_resume(tmp_path):
    write_phantoms(tmp_path / "p", patients=3, height=160, width=128, seed=1)
    images = sorted((tmp_path / "p" / "images").iterdir())
    opener = archives.stub
    predict(opener, images, tmp_path / "whole", HERE)
    predict(opener, images[3:], tmp_path / "out", HERE)
    predict(opener, images, tmp_path / "out", replace(HERE, resume=True))
    for name in ("predictions.csv", "breasts.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {row["patient_id"] for row in rows(tmp_path / "out" / "predictions.csv")} == {"P00001", "P00002", "P00003"}
    kept = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet"))
    assert b"PHANTOM" in kept  # in the names of files, which are never changed
    assert not any(
        row["header_patient"].startswith("PHANTOM") for row in pq.read_table(tmp_path / "out" / "parts").to_pylist()
    )
    assert (tmp_path / "out" / "parts" / "_patients.key").stat().st_mode & 0o077 == 0


def test_names_of_heat_maps_are_unique(tmp_path):
    with RunDatabase(lambda row: row.key("m")) as index:
        paths = ["a/x.npy", "b/x.npy", "c/x-2.npy", "d/X.npy"]
        index.fill([Record(Path(path), -1, path) for path in paths], ["0"], check_files=False)
        index.name_files(lambda row: row.record.path.stem)
        assert [one.name for one in index.work(1, failed=False)] == ["x", "x-2", "x-2-2", "X-3"]


def test_names_that_no_file_of_ours_could_have(tmp_path):
    """A name of 255 bytes leaves no room for an ending, and SQLite takes UTF-8 alone."""
    paths = [f"{251 * 'n'}.npy", f"{251 * 'n'}.dcm", f"{125 * 'ü'}.npy", "\udce9.npy"]
    with RunDatabase(lambda row: row.key("m")) as index:
        index.fill([Record(Path(path), -1, "p") for path in paths], ["0"], check_files=False)
        index.name_files(lambda row: row.stem)
        names = [200 * "n", f"{200 * 'n'}-2", 100 * "ü", "\\udce9"]
        assert [one.name for one in index.work(1, failed=False)] == names


def test_a_file_whose_name_is_not_in_utf_8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.npy")
    np.save(path, np.ones((8, 8), np.float32))
    for sources in ([tmp_path], [tmp_path, path]):
        out = tmp_path / f"o{len(sources)}"
        assert predict(archives.stub, sources, out, HERE).done == 1
        assert rows(out / "predictions.csv")[0]["image_path"].endswith("/\\udce9.npy")


def test_the_state_of_a_run_is_told(damaged, tmp_path):
    seen = []
    from gigamorph.engine.train.progress import Meter

    predict(archives.stub, [damaged], tmp_path / "out", FORGIVING, Watch(Meter(seen.append)))
    assert (seen[0].image, seen[0].images) == (0, 12) and seen[-1].image == 12
    assert json.loads((tmp_path / "out" / "run.json").read_text())["rows"] == 12
    assert pa.types.is_list(
        pq.read_schema(next((tmp_path / "out" / "parts").rglob("*.parquet"))).field("log_odds").type
    )


def test_a_resumed_run_with_another_table_names_all_patients_as_that_does(tmp_path):
    """Images that were done with a table of patients and views kept these, or had none, with a table that has none."""
    write_phantoms(tmp_path / "p", patients=3, height=160, width=128, seed=1)
    images = sorted((tmp_path / "p" / "images").iterdir())
    table = tmp_path / "table.csv"
    table.write_text(
        "image_path,patient_id,view\n" + "".join(f"{image},X{n},ML\n" for n, image in enumerate(images[:3]))
    )
    predict(archives.stub, [table], tmp_path / "out", HERE)
    predict(archives.stub, images, tmp_path / "out", replace(HERE, resume=True))
    predict(archives.stub, images, tmp_path / "whole", HERE)
    for name in ("predictions.csv", "breasts.csv", "exams.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    kept = pq.read_table(tmp_path / "out" / "parts").to_pylist()
    assert not any((row["header_patient"] or "").startswith("PHANTOM") for row in kept)
