"""The commands on Orthanc with its DICOMweb plug-in: phantoms in by STOW, predictions and evidence back into it."""

import json

import highdicom
import image_files
import numpy as np
import pydicom
import pytest
import stores
from commands import SMALL_TRAINING, rows, run

from gigamorph.engine.evaluate.read import PROBABILITY
from gigamorph.engine.images.dicomweb import parse_location
from gigamorph.engine.images.open import open_pixels

pytestmark = pytest.mark.skipif(
    stores.ORTHANC is None or not stores.PLUGIN.exists(), reason="needs apt-get install orthanc orthanc-dicomweb"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return stores.phantoms(tmp_path_factory.mktemp("p"), patients=4)


@pytest.fixture(scope="module")
def checkpoint(files, tmp_path_factory):
    out, [table] = tmp_path_factory.mktemp("t") / "run", files[0].parents[1].glob("*.csv")
    assert run("train", table, "--out", out, *SMALL_TRAINING) == 0
    return out / "best.ckpt"


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    with stores.orthanc(tmp_path_factory.mktemp("orthanc")) as (service, client):
        client.store_instances([pydicom.dcmread(path) for path in files[:4]])
        yield f"dicomweb+{service}", client


def walk(ds):
    for item in ds.get("ContentSequence") or ():
        yield item
        yield from walk(item)


@pytest.mark.slow
def test_predictions_from_a_store_and_back_into_it(server, files, checkpoint, tmp_path, capsys):
    url, client = server
    study = pydicom.dcmread(files[0]).StudyInstanceUID
    assert run("predict", checkpoint, *files[:4], "--out", tmp_path / "files") == 0
    options = ("--out", tmp_path / "out", "--store", url)
    capsys.readouterr()
    assert run("predict", checkpoint, f"{url}/studies?PatientID=PHANTOM*", *options, "--json") == 0
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end["done"], end["failed"], end["stored"]) == (4, 0, 2)
    odds = {row["image_path"]: row["log_odds_1"] for row in rows(tmp_path / "out" / "predictions.csv")}
    for path, row in zip(files, rows(tmp_path / "files" / "predictions.csv"), strict=False):
        assert odds[stores.uid_url(url, path)] == row["log_odds_1"]
    reports = stores.instances(client, "SR")
    assert sorted(one.PatientID for one in reports) == ["PHANTOM0000", "PHANTOM0001"]
    for report in reports:
        values = [item.MeasuredValueSequence[0].NumericValue for item in walk(report) if item.ValueType == "NUM"]
        own = [row for row in rows(tmp_path / "out" / "predictions.csv") if row["exam_id"] == report.StudyInstanceUID]
        expected = [float(row[name]) for row in own for name in row if name.startswith(PROBABILITY)]
        assert list(map(float, values)) == pytest.approx(expected, abs=1e-5) and len(own) == 2
    # A second time nothing is computed or stored; reports are no images.
    assert run("predict", checkpoint, f"{url}/studies/{study}", "--out", tmp_path / "study") == 0
    assert len(rows(tmp_path / "study" / "predictions.csv")) == 2
    assert run("predict", checkpoint, f"{url}/studies?PatientID=PHANTOM*", *options, "--resume") == 0
    assert "0 instances stored" in capsys.readouterr().out and len(stores.instances(client, "SR")) == 2


@pytest.mark.slow
def test_evidence_of_a_store_goes_back_as_segmentations(server, files, checkpoint, tmp_path, capsys):
    url, client = server
    image = stores.uid_url(url, files[0])
    assert run("explain", checkpoint, image, "--out", tmp_path / "png", "--store", url) == 2
    assert "--store needs DICOM SEGs; add --format seg" in capsys.readouterr().err
    assert run("explain", checkpoint, image, "--out", tmp_path / "out", "--format", "seg", "--store", url) == 0
    assert run("explain", checkpoint, files[0], "--out", tmp_path / "file", "--format", "seg") == 0
    [path] = (tmp_path / "out").glob("*.seg.dcm")
    assert path.name == f"{parse_location(image).instance}.seg.dcm"
    [stored] = stores.instances(client, "SEG")
    here = highdicom.seg.segread(tmp_path / "file" / f"{files[0].stem}.seg.dcm")
    assert np.array_equal(highdicom.seg.Segmentation.from_dataset(stored).pixel_array, here.pixel_array)
    assert stored.StudyInstanceUID == parse_location(image).study and here.pixel_array.any()


@pytest.mark.parametrize("syntax", [image_files.EXPLICIT, image_files.RLE, image_files.JPEG + "90"])
def test_slides_come_frame_by_frame(server, tmp_path, syntax):
    url, client = server
    own = {"StudyInstanceUID": "1.2.4", "SeriesInstanceUID": "1.2.5", "SOPInstanceUID": f"{syntax}.7"}
    path = image_files.write_slide(tmp_path / "s.dcm", image_files.picture(12, (90, 130)), (32, 48), syntax, 12, **own)
    ds = pydicom.dcmread(path)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    client.store_instances([ds])
    found = open_pixels(stores.uid_url(url, path))
    assert np.array_equal(found.read(0, 90, 0, 130), open_pixels(path).read(0, 90, 0, 130))


def test_bad_input_is_one_line(server, checkpoint, tmp_path, capsys):
    url, _ = server
    for arguments, message in (
        ([f"{url}/studies?PatientID=nobody"], "contains no images"),
        ([f"{url}/instances/1.2.3"], "not the URL of an image"),
        (["dicomweb+http://127.0.0.1:9/dicom-web"], "cannot be reached (Connection refused)"),
        ([url, "--store", f"{url}x"], "answers 404"),
        ([url, "--store", f"{url}/studies/1.2"], "results go to a store"),
    ):
        assert run("predict", checkpoint, *arguments, "--out", tmp_path / "out") == 2
        told = capsys.readouterr().err.strip()
        assert message in told and len(told.splitlines()) == 1, told
        assert not (tmp_path / "out").exists()


def test_user_and_password_are_those_of_netrc(tmp_path, checkpoint, files, monkeypatch, capsys):
    netrc = tmp_path / "netrc"
    with stores.orthanc(tmp_path / "o", AuthenticationEnabled=True, RegisteredUsers={"ann": "secret"}) as (service, _):
        url = f"dicomweb+{service}"
        monkeypatch.setenv("NETRC", str(netrc))
        assert run("predict", checkpoint, url, "--out", tmp_path / "out") == 2
        assert "answers 401 Unauthorized; put user and password for it into ~/.netrc" in capsys.readouterr().err
        netrc.write_text("machine 127.0.0.1 login ann password secret\n")
        netrc.chmod(0o600)
        assert run("predict", checkpoint, url, "--out", tmp_path / "out") == 2
        assert "contains no images" in capsys.readouterr().err
