"""Predictions from a DICOMweb store and back into it: reports, segmentations, and what a stop leaves."""

import functools
import io
import time
from dataclasses import replace

import archives
import highdicom
import numpy as np
import pydicom
import pytest
import stores
import torch
from commands import rows
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.datasets.dataset import ImageDataset
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.evaluate.read import PROBABILITY
from gigamorph.engine.images import dicomweb
from gigamorph.engine.images.dicom_results import own_code
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.images.remote import RemoteFile
from gigamorph.engine.predict.masks import MaskOptions, MostProbableClass, Segmenter, predict_masks
from gigamorph.engine.predict.run import PredictOptions, predict
from gigamorph.engine.train.mask_target import MaskTarget
from gigamorph.engine.train.record import with_splits

HERE = PredictOptions("m" * 64, "best.ckpt", workers=0)
FORGIVING = replace(HERE, max_failures=1.0, resume=True)


def instances(store, modality):
    """Those of a modality, whole."""
    client = store._client
    found = [
        pydicom.Dataset.from_json(one) for one in client.search_for_instances(search_filters={"Modality": modality})
    ]
    return [client.retrieve_instance(one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID) for one in found]


def groups(report):
    """(image, class) -> what a report says, read by highdicom."""
    file = io.BytesIO()
    report.save_as(file, enforce_file_format=True)
    read = highdicom.sr.srread(io.BytesIO(file.getvalue()))
    found = {}
    for group in read.content.get_image_measurement_groups():
        [measurement], [image] = group.get_measurements(), group.source_images
        assert measurement.unit.value == "1" and measurement.name.meaning == "Probability"
        found[image.referenced_sop_instance_uid, group.finding_type.meaning] = measurement.value
    return found


def test_rows_are_those_of_the_files(store, files, tmp_path):
    predict(archives.tiny, files, tmp_path / "files", HERE)
    predict(archives.tiny, [store.url], tmp_path / "store-out", HERE)
    expected = {
        stores.uid_url(store.url, path): row
        for path, row in zip(files, rows(tmp_path / "files/predictions.csv"), strict=True)
    }
    found = {row["image_path"]: row for row in rows(tmp_path / "store-out/predictions.csv")}
    assert found.keys() == expected.keys() and len(found) == 4
    for url, row in found.items():
        for name in ("log_odds_0", "log_odds_1", "laterality", "view"):
            assert row[name] == expected[url][name], name
        assert row["exam_id"] == dicomweb.parse_location(url).study
    assert {row["patient_id"] for row in found.values()} == {"P00001", "P00002"}
    assert len(rows(tmp_path / "store-out/exams.csv")) == 2
    assert "PHANTOM" not in (tmp_path / "store-out/predictions.csv").read_text()


def test_places_stand_in_tables_too(store, files, tmp_path):
    table = tmp_path / "table.csv"
    lines = [f"{stores.uid_url(store.url, path)},P{number}" for number, path in enumerate(files)]
    table.write_text("image_path,patient_id\n" + "\n".join(lines) + "\n")
    assert predict(archives.stub, [table], tmp_path / "out", HERE).done == 4
    assert [row["patient_id"] for row in rows(tmp_path / "out" / "predictions.csv")] == ["P0", "P1", "P2", "P3"]


def test_images_that_cannot_be_had_are_in_quarantine(store, files, tmp_path):
    gone = f"{store.url}/studies/1.2/series/1.2.3/instances/1.2.3.4"
    found = predict(archives.stub, [store.url, gone], tmp_path / "out", FORGIVING)
    assert (found.done, found.failed) == (4, 1)
    [row] = rows(tmp_path / "out" / "quarantine.csv")
    assert row["image_path"] == gone and row["reason"].startswith(f"{gone}: its store answers ")
    with pytest.raises(DataError, match=r"1\.2\.3\.4: its store answers"):
        predict(archives.stub, [gone], tmp_path / "other", HERE)


def test_a_store_that_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    nowhere = "dicomweb+http://127.0.0.1:9/dicom-web"
    for sources, options in (([nowhere], HERE), ([tmp_path], replace(HERE, store=nowhere))):
        with pytest.raises(GigamorphError, match=r"its store cannot be reached \(Connection refused\)"):
            predict(archives.stub, sources, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_report_for_each_study_says_what_the_table_says(store, tmp_path):
    out = tmp_path / "out"
    assert predict(archives.tiny, [store.url], out, replace(HERE, store=store.url)).stored == 2
    found = {}
    for report in instances(store, "SR"):
        assert report.PatientID.startswith("PHANTOM000") and report.SOPClassUID == pydicom.uid.ComprehensiveSRStorage
        assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
        own = groups(report)
        images = {
            dicomweb.parse_location(row["image_path"]).instance
            for row in rows(out / "predictions.csv")
            if row["exam_id"] == report.StudyInstanceUID
        }
        assert {image for image, _ in own} == images and len(images) == 2
        found |= own
    assert len(found) == 8
    for row in rows(out / "predictions.csv"):
        for name in archives.CLASSES:
            own = found[dicomweb.parse_location(row["image_path"]).instance, name]
            assert own == pytest.approx(float(row[PROBABILITY + name]), abs=1e-6)
    # What is stored is no image, and is not stored twice.
    again = predict(archives.tiny, [store.url], out, replace(HERE, store=store.url, resume=True))
    assert (again.computed, again.stored, again.images) == (0, 0, 4) and len(instances(store, "SR")) == 2


def test_a_kill_between_the_store_and_its_note_makes_no_second_report(store, tmp_path, monkeypatch):
    from gigamorph.engine.predict import delivery

    class Killed(delivery.Parts):
        def append(self, row):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "Parts", Killed)
        with pytest.raises(KeyboardInterrupt):
            predict(archives.stub, [store.url], tmp_path / "out", replace(HERE, store=store.url))
    assert len(instances(store, "SR")) == 1
    found = predict(archives.stub, [store.url], tmp_path / "out", replace(HERE, store=store.url, resume=True))
    assert (found.computed, found.stored) == (0, 2)
    uids = [one.SOPInstanceUID for one in instances(store, "SR")]
    assert len(uids) == len(set(uids)) == 2


def test_what_the_store_refuses_keeps_nothing_else_back(store, files, tmp_path, monkeypatch):
    real, refused = store._client.store_instances, []

    def store_instances(documents):
        if documents[0].PatientID == "PHANTOM0000" and not refused:
            refused.append(1)
            failed = pydicom.Dataset()
            failed.FailureReason = 0x0110
            answer = pydicom.Dataset()
            answer.FailedSOPSequence = [failed]
            return answer
        return real(documents)

    monkeypatch.setattr(store._client, "store_instances", store_instances)
    options = replace(HERE, store=store.url)
    with pytest.raises(GigamorphError, match=r"1 of 2 results were not stored .* --resume retries .* \(reason 0110H\)"):
        predict(archives.stub, [store.url], tmp_path / "out", options)
    assert len(instances(store, "SR")) == 1 and len(rows(tmp_path / "out" / "predictions.csv")) == 4
    assert predict(archives.stub, [store.url], tmp_path / "out", replace(options, resume=True)).stored == 1
    assert len(instances(store, "SR")) == 2


def test_results_of_files_go_to_a_store_if_they_are_dicom(store, files, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((24, 24), np.float32))
    options = replace(HERE, store=store.url)
    with pytest.raises(GigamorphError, match=r"1 of 3 .*a\.npy: is not a DICOM file, so its result cannot be stored"):
        predict(archives.stub, [*files, tmp_path / "a.npy"], tmp_path / "out", options)
    assert {one.StudyInstanceUID for one in instances(store, "SR")} == {
        pydicom.dcmread(path).StudyInstanceUID for path in files
    }


def segmenter(*, device: str) -> Segmenter:
    torch.manual_seed(0)
    net = accelerate(MostProbableClass(nn.Conv2d(1, 3, 3, padding=1)), tile=64)
    return Segmenter(
        net, MaskTarget(("background", "gland", "a lesion")), functools.partial(ImageDataset, channels=1), 0
    )


def test_a_segmentation_for_each_image_is_its_mask(store, files, tmp_path):
    out = tmp_path / "out"
    options = MaskOptions("m" * 64, "best.ckpt", workers=0, store=store.url)
    assert predict_masks(segmenter, [store.url], out, options).stored == 4
    masks = {row["image_path"].rpartition("/")[2]: out / row["mask"] for row in rows(out / "predictions.csv")}
    found = instances(store, "SEG")
    assert len(found) == 4 and sum(open_pixels(path).stored.read(0, 160, 0, 128).max() > 0 for path in masks.values())
    for one in found:
        seg = highdicom.seg.Segmentation.from_dataset(one)
        [(_, _, image)] = seg.get_source_image_uids()
        values = seg.get_pixels_by_source_instance([image], combine_segments=True, ignore_spatial_locations=True)[0]
        assert np.array_equal(values, open_pixels(masks[image]).stored.read(0, 160, 0, 128)[0])
        told = [seg.get_segment_description(number) for number in (1, 2)]
        assert [one.segment_label for one in told] == ["gland", "a lesion"]
        assert told[0].segmented_property_type.value == "gland"
        assert told[1].segmented_property_type.value == own_code("a lesion").value
    assert predict_masks(segmenter, [store.url], out, replace(options, resume=True)).stored == 0


@pytest.mark.parametrize("place", ["dicomweb+https://host/studies/1/series/2/instances/3", "https://host/a/b.dcm"])
def test_the_split_of_an_image_elsewhere_is_looked_up_as_of_a_file(place):
    file = dicomweb.Instance(place) if dicomweb.is_dicomweb(place) else RemoteFile(place)
    records = [Record(file, 0, f"P{number}") for number in range(4)]
    trained = {"options": {"seed": 0}, "split": {"sha256": ""}}
    assert [record.split for record in with_splits(records, trained)] == [None] * 4
