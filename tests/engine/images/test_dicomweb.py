"""Images in a DICOMweb store: what is found, what is fetched, and what a store's answers may be."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pydicom
import pytest
import requests
import stores
from image_files import EXPLICIT, JPEG, encode, picture, write_dicom, write_slide

from gigamorph import DataError, open_pixels
from gigamorph.engine.images import dicomweb
from gigamorph.engine.images.codecs import Frame
from gigamorph.engine.images.dicom import syntax_of
from gigamorph.engine.images.dicomweb import Instance, ask_store, parse_location, search, service_of


def whole(source):
    _, height, width = source.shape
    return source.read(0, height, 0, width)


def test_a_store_a_study_a_series_and_searches_in_them_name_images(store, files):
    own = [parse_location(stores.uid_url(store.url, path)) for path in files]
    everything = {stores.uid_url(store.url, path) for path in files}
    of_first = {own[0].url(p.study, p.series, p.instance) for p in own if p.study == own[0].study}
    assert len(everything) == 4 and len(of_first) == 2
    for end, expected in (
        ("", everything),
        ("/studies", everything),
        ("/studies?PatientID=PHANTOM0000", of_first),
        (f"/studies/{own[0].study}", of_first),
        (f"/studies/{own[0].study}/series", of_first),
        (f"/studies/{own[0].study}/series/{own[0].series}", of_first),
        ("/series?Modality=MG", everything),
        (f"/instances?SOPInstanceUID={own[1].instance}", {stores.uid_url(store.url, files[1])}),
    ):
        assert {url for url, _ in search(store.url + end)} == expected, end


def test_pages_of_any_size_give_each_image_once(store, files, monkeypatch):
    monkeypatch.setattr(dicomweb, "_PAGE", 1)
    assert sorted(url for url, _ in search(store.url)) == sorted(stores.uid_url(store.url, path) for path in files)


def test_a_store_that_knows_no_offsets_is_seen(store, monkeypatch):
    real = store._client.search_for_studies
    store._client.search_for_studies = lambda limit, offset, **options: real(limit=limit, **options)
    assert len(list(search(store.url))) == 4  # all of it came at once
    monkeypatch.setattr(dicomweb, "_PAGE", 1)
    with pytest.raises(DataError, match="its store returns the same results at each offset; search for fewer images"):
        list(search(store.url))


def test_what_is_no_image_is_left_out(store, files):
    report = pydicom.dcmread(files[0], stop_before_pixels=True)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = pydicom.uid.ComprehensiveSRStorage
    report.SOPInstanceUID = report.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    report.StudyInstanceUID, report.SeriesInstanceUID, report.Modality = "1.2.3", "1.2.3.5", "SR"
    store.store_instances([report])
    assert len(list(search(store.url))) == 4
    with pytest.raises(DataError, match=r"studies/1\.2\.3: contains no images"):
        list(search(f"{store.url}/studies/1.2.3"))


@pytest.mark.parametrize(
    "end, message",
    [
        ("/studies?PatientsID=1", "unknown DICOM attribute PatientsID; correct it, because stores ignore unknown ones"),
        ("/studies?limit=3", "limit is not a search attribute; remove it"),
        ("/patients/1#", "not a DICOMweb URL"),
    ],
)
def test_searches_that_mean_nothing_are_refused(store, end, message):
    with pytest.raises(DataError, match=message):
        list(search(store.url + end))
    assert store.asked == []


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(DataError, match=r"put it into ~/\.netrc") as error:
        parse_location("dicomweb+https://ann:secret@host/dicom-web/studies")
    assert "secret" not in str(error.value)


def test_an_image_is_that_of_its_file_bit_for_bit(store, files):
    for path in files:
        source = open_pixels(stores.uid_url(store.url, path))
        assert np.array_equal(whole(source), whole(open_pixels(path)))
        assert source.stored.info.patient_id == pydicom.dcmread(path).PatientID
    assert store.asked.count("retrieve_instance") == len(files)  # once each, however often it is read


@pytest.mark.parametrize("syntax", [EXPLICIT, JPEG + "70", JPEG + "80", JPEG + "90"])
@pytest.mark.parametrize("colour", [False, True])
def test_slides_are_read_frame_by_frame(tmp_path, monkeypatch, syntax, colour):
    image = picture(8, (90, 130, 3)) if colour else picture(12, (90, 130))
    own = {"StudyInstanceUID": "1.2.4", "SeriesInstanceUID": "1.2.5", "SOPInstanceUID": "1.2.3"}
    path = write_slide(tmp_path / "s.dcm", image, (32, 48), syntax, None if colour else 12, **own)
    store = stores.FolderStore(tmp_path / "store", monkeypatch)
    store.put([path])
    found, file = open_pixels(stores.uid_url(store.url, path)), open_pixels(path)
    before = store.asked.count("retrieve_instance_frames")  # one, and one for each way that the store does not know
    assert found.shape == file.shape and before <= 3
    assert np.array_equal(found.read(0, 30, 0, 40), file.read(0, 30, 0, 40))
    assert store.asked.count("retrieve_instance_frames") == before + 1 and "retrieve_instance" not in store.asked
    assert np.array_equal(whole(found), whole(file))


def test_a_frame_of_many_is_fetched_alone(tmp_path, monkeypatch):
    own = {"StudyInstanceUID": "1.2.4", "SeriesInstanceUID": "1.2.5"}
    path = write_dicom(tmp_path / "t.dcm", picture(12, (5, 40, 30)), JPEG + "70", 12, **own)
    store = stores.FolderStore(tmp_path / "store", monkeypatch)
    store.put([path])
    url = stores.uid_url(store.url, path)
    assert np.array_equal(whole(open_pixels(url, frame=3)), whole(open_pixels(path, frame=3)))
    assert "retrieve_instance" not in store.asked
    with pytest.raises(DataError, match="has 5 frames; choose one"):
        open_pixels(url)


def test_a_grey_scale_by_reference_is_refused(tmp_path, monkeypatch):
    own = {"StudyInstanceUID": "1.2.4", "SeriesInstanceUID": "1.2.5"}
    path = write_dicom(tmp_path / "t.dcm", picture(12, (2, 40, 30)), **own)
    store = stores.FolderStore(tmp_path / "store", monkeypatch)
    store.put([path])
    real = store._client.retrieve_instance_metadata
    table = {"00283010": {"vr": "SQ", "Value": [{"00283006": {"vr": "OW", "BulkDataURI": "http://x/1"}}]}}
    store._client.retrieve_instance_metadata = lambda *uids: real(*uids) | table
    with pytest.raises(DataError, match="returns the grey scale by reference; download the file"):
        open_pixels(stores.uid_url(store.url, path), frame=0)


def test_frames_that_a_store_has_compressed_with_a_loss_are_refused(tmp_path, monkeypatch):
    own = {"StudyInstanceUID": "1.2.4", "SeriesInstanceUID": "1.2.5"}
    path = write_slide(tmp_path / "s.dcm", picture(8, (64, 96, 3)), (32, 48), **own, LossyImageCompression="00")
    store = stores.FolderStore(tmp_path / "store", monkeypatch)
    store.put([path])
    jpeg = encode(picture(8, (32, 48, 3)), JPEG + "50", 8)
    store._client.retrieve_instance_frames = lambda *uids, media_types: [jpeg]
    with pytest.raises(DataError, match="sends frames with additional lossy compression; download the file"):
        open_pixels(stores.uid_url(store.url, path))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"<html>", b"\xff\xd8\xff\xc0\x00\x11\x08" + b"\0" * 20])
def test_bytes_that_are_no_frame_are_refused(data):
    with pytest.raises(DataError, match="are not a frame of 32 x 48 pixels with 1 samples"):
        syntax_of(data, Frame(32, 48, 1, 16, "MONOCHROME2"), "x")


class Failing:
    """A store that answers with an error, a number of times."""

    def __init__(self, error, times=99):
        self.error, self.left, self.calls = error, times, 0

    def __call__(self, client):
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return "answer"


def http(status, reason=""):
    response = requests.Response()
    response.status_code, response.reason = status, reason
    return requests.HTTPError(response=response)


@pytest.mark.parametrize(
    "error, calls, unreachable, message",
    [
        (http(404, "Not Found"), 1, False, "u: its store answers 404 Not Found"),
        (http(401, "Unauthorized"), 1, True, r"u: its store answers 401 Unauthorized; put user and password .*netrc"),
        (http(500, "Oops"), 3, False, "u: its store answers 500 Oops"),
        (http(503), 3, True, "u: its store answers 503"),
        (requests.ConnectionError("long\ntext"), 3, True, r"u: its store cannot be reached \(long text\)"),
        (ValueError("no json"), 1, False, r"u: its store's answer cannot be read \(no json\)"),
    ],
)
def test_what_a_store_answers_in_one_line(store, monkeypatch, error, calls, unreachable, message):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    failing = Failing(error)
    with pytest.raises(DataError, match=f"^{message}$") as caught:
        ask_store("u", store.service, failing)
    assert failing.calls == calls and isinstance(caught.value, dicomweb.StoreUnreachableError) == unreachable
    if calls == 3:
        assert ask_store("u", store.service, Failing(error, 2)) == "answer"


def test_where_results_go_is_a_store(store, monkeypatch):
    assert service_of(store.url) == store.service
    with pytest.raises(DataError, match="results go to a store, into the study of their image"):
        service_of(f"{store.url}/studies/1.2.3")
    with pytest.raises(DataError, match=r"not the URL of an image; write \.\.\./studies/UID/series/UID/instances/UID"):
        Instance(f"{store.url}/studies/1.2.3")


def test_without_the_libraries_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dicomweb_client", None)
    with pytest.raises(DataError, match=r"DICOMweb needs dicomweb-client: pip install 'gigamorph\[dicomweb\]'"):
        list(search("dicomweb+http://nowhere.test/without"))


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("machine 127.0.0.1 login ann password secret", ["Basic YW5uOnNlY3JldA==", None]),
        ("machine localhost login ann password secret", [None, "Basic YW5uOnNlY3JldA=="]),
        ("default login ann password secret", [None, None]),
        ("machine", [None, None]),
    ],
)
def test_a_login_goes_to_the_hosts_that_netrc_names(text, sent, tmp_path, monkeypatch):
    """A host that a table names, and one that it redirects to, are sent no login of another or of any host."""
    found = []

    class Store(BaseHTTPRequestHandler):
        def do_GET(self):
            found.append(self.headers["Authorization"])
            self.send_response(302 if len(found) == 1 else 404)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/studies")
            self.end_headers()

        def log_message(self, *_):
            pass

    (tmp_path / "netrc").write_text(text)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = dicomweb.connect(f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(requests.HTTPError):
            client.search_for_studies(limit=1)
        server.shutdown()
    assert found == sent
