"""DICOMweb stores: that of dicomweb-client over a folder, and Orthanc as a process."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicomweb_client import DICOMfileClient, DICOMwebClient

from gigamorph.engine.images import dicomweb
from gigamorph.engine.mammography.phantom import write_phantoms

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def phantoms(folder: Path, patients: int = 2) -> list[Path]:
    """Mammograms of `patients`, two views each, of 160 x 128 pixels."""
    return sorted(
        (write_phantoms(folder, patients=patients, height=160, width=128, seed=1).parent / "images").iterdir()
    )


class FolderStore:
    """A folder that answers as a DICOMweb store does, in this process; counts what is asked of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.asked = folder, []
        self.service = f"http://store.test/{folder.name}-{id(self)}"
        self.url = f"dicomweb+{self.service}"
        self._local = threading.local()  # its database is a thread's own
        monkeypatch.setattr(dicomweb, "connect", lambda service: self)

    @property
    def _client(self) -> Any:
        if not hasattr(self._local, "client"):
            self._local.client = DICOMfileClient(f"file://{self.folder}")
        return self._local.client

    def put(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.store_instances([pydicom.dcmread(path)])

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.asked.append(name)
            return call(*args, **options)

        return counted


def uid_url(store: str, path: Path) -> str:
    """Where a file's instance is in a store."""
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    return f"{store}/studies/{ds.StudyInstanceUID}/series/{ds.SeriesInstanceUID}/instances/{ds.SOPInstanceUID}"


def instances(client: Any, modality: str) -> list[pydicom.Dataset]:
    """Those of a modality that a store holds, whole."""
    found = map(pydicom.Dataset.from_json, client.search_for_instances(search_filters={"Modality": modality}))
    return [client.retrieve_instance(one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID) for one in found]


@contextlib.contextmanager
def orthanc(folder: Path, **settings: Any) -> Iterator[tuple[str, DICOMwebClient]]:
    """Orthanc with its DICOMweb plug-in on a free port of this machine: (URL of the service, a client of its own)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "orthanc.json"
    own = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": port,
        "DicomServerEnabled": False,
    }
    own |= {"RemoteAccessAllowed": False, "AuthenticationEnabled": False, "Plugins": [str(PLUGIN)]}
    config.write_text(json.dumps(own | {"DicomWeb": {"Enable": True, "Root": "/dicom-web/"}} | settings))
    assert ORTHANC is not None
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([ORTHANC, str(config)], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/dicom-web/studies?limit=1", timeout=5).close()
                break
            except urllib.error.HTTPError:  # it is there, and wants to know who asks
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.1)
        service = f"http://127.0.0.1:{port}/dicom-web"
        yield service, DICOMwebClient(service)
    finally:
        process.terminate()
        process.wait(30)
