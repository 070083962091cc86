"""Files that fsspec reaches are read as those on the disk are, and no more of them is fetched than is asked for."""

import contextlib
import io
import json
import pickle
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import fsspec
import image_files
import numpy as np
import pytest
import range_server
from fsspec.implementations.reference import ReferenceFileSystem

from gigamorph.engine.datasets.tables.folders import LeftOutMasks
from gigamorph.engine.errors import DataError
from gigamorph.engine.images import remote
from gigamorph.engine.images.open import open_pixels
from gigamorph.engine.predict.rows import fetch, rows_of

WRITERS = image_files.corpus()


def in_memory(path: Path) -> str:
    """A copy, file or folder."""
    system = fsspec.filesystem("memory")
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        system.pipe(f"/remote/{file.relative_to(path.parent)}", file.read_bytes())
    return f"memory://remote/{path.name}"


@pytest.mark.parametrize("small", [True, False], ids=["at once", "by blocks"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_read_as_from_the_disk(kind, small, tmp_path, monkeypatch):
    if not small:
        monkeypatch.setattr(remote, "SMALL", 0)
        monkeypatch.setattr(remote, "BLOCK", 97)
    path = WRITERS[kind](tmp_path / ("a.zarr" if "zarr" in kind else "a.bin"))
    try:
        frame, here = None, open_pixels(path)
    except DataError:
        frame, here = 1, open_pixels(path, frame=1)
    there = pickle.loads(pickle.dumps(open_pixels(in_memory(path), frame=frame)))
    assert there.shape == here.shape and there.steps == here.steps
    _, height, width = here.shape
    for box in ((0, height, 0, width), (3, 9, 5, 6), (height - 1, height, 0, 3)):
        assert np.array_equal(here.read(*box).numpy(), there.read(*box).numpy())


def test_only_what_is_read_is_fetched(tmp_path, monkeypatch):
    """A frame of many, a band of rows, a tile."""
    monkeypatch.setattr(remote, "SMALL", 0)
    monkeypatch.setattr(remote, "BLOCK", 2**12)
    frames = np.random.default_rng(0).integers(0, 4096, (30, 100, 90)).astype(np.uint16)
    image_files.write_dicom(tmp_path / "frames.dcm", frames)
    image_files.write_dicom(tmp_path / "packed.dcm", frames, image_files.JPEG + "80")
    image_files.write_npy(tmp_path / "rows.npy", image_files.picture(12, (6000, 90)))
    image_files.write_tiff(tmp_path / "tiles.tif", image_files.picture(12, (640, 640)), tile=(64, 64))
    with range_server.serving(tmp_path) as served:
        for name, frame, box in (
            ("frames.dcm", 17, (0, 100, 0, 90)),
            ("packed.dcm", 17, (0, 100, 0, 90)),
            ("rows.npy", None, (1500, 1560, 0, 90)),
            ("tiles.tif", None, (64, 128, 64, 128)),
        ):
            before = served.bytes
            found = open_pixels(f"{served.url}/{name}", frame=frame, flip=False).read(*box)
            assert np.array_equal(found.numpy(), open_pixels(tmp_path / name, frame=frame, flip=False).read(*box))
            assert 0 < served.bytes - before < 0.15 * (tmp_path / name).stat().st_size, name


def test_what_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(remote, "SMALL", 99)
    np.save(tmp_path / "a.npy", np.ones((9, 9), np.float32))
    with range_server.serving(tmp_path, ranges=False) as served:
        with pytest.raises(DataError, match=r"a\.npy: its server does not support byte ranges; download it"):
            open_pixels(f"{served.url}/a.npy")
        with pytest.raises(DataError, match=r"none\.npy: cannot be fetched \(FileNotFoundError"):
            open_pixels(f"{served.url}/none.npy")
    with pytest.raises(DataError, match=r"a\.npy: cannot be fetched \(ClientConnectorError"):
        open_pixels("http://127.0.0.1:9/a.npy")
    with pytest.raises(DataError, match=r"a\.npy: cannot be fetched \(ValueError: Protocol not known: odd"):
        open_pixels("odd://a.npy")


def test_small_files_need_no_ranges(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((9, 9), np.float32))
    with range_server.serving(tmp_path, ranges=False) as served:
        assert open_pixels(f"{served.url}/a.npy").read(0, 9, 0, 9).sum() == 81
        assert served.requests == 1


def test_a_store_that_fails_now_and_then_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    url = in_memory(image_files.write_npy(tmp_path / "a.npy", image_files.picture(12)))
    system, real, calls = fsspec.filesystem("memory"), fsspec.filesystem("memory").cat_file, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) % 3:
            raise ConnectionError("reset by peer")
        return real(*args, **kwargs)

    monkeypatch.setattr(system, "cat_file", failing)
    assert open_pixels(url).read(0, 37, 0, 53).shape == (1, 37, 53) and len(calls) == 3


def fetched(url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fetch(url, Path(folder))


def references(path: Path, monkeypatch) -> list[Path]:
    """A file of references whose template would run code in many versions of fsspec; which such files are opened."""
    path.write_text(json.dumps({"version": 1, "templates": {"u": "{{ 1 }}"}, "refs": {"a.npy": ["{{u}}", 0, 1]}}))
    opened: list[Path] = []
    monkeypatch.setattr(ReferenceFileSystem, "__init__", lambda *_, **__: opened.append(path))
    return opened


@pytest.mark.parametrize(
    "url",
    [
        "reference://a.npy::file://{}",
        "reference://a.zarr::file://{}",
        "reference::file://{}",
        "simplecache::reference://a.npy::file://{}",
        "simplecache::reference::file://{}",
        "generic://reference://a.npy::{}",
    ],
)
@pytest.mark.parametrize("how", [open_pixels, lambda url: list(rows_of(url, None, Counter(), LeftOutMasks())), fetched])
def test_a_file_of_references_is_never_opened(how, url, tmp_path, monkeypatch):
    opened = references(tmp_path / "refs.json", monkeypatch)
    with contextlib.suppress(DataError):
        how(url.format(tmp_path / "refs.json"))
    assert not opened


def test_a_file_of_references_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(
        DataError, match=r"refs\.json: cannot be opened because a file of references may run code; pass"
    ):
        fetch(f"reference://a.npy::file://{tmp_path}/refs.json", tmp_path)


def test_a_folder_that_is_called_like_a_url_is_a_folder(tmp_path, monkeypatch):
    """zarr takes "reference::refs.json" for a URL."""
    opened = references(tmp_path / "refs.json", monkeypatch)
    monkeypatch.chdir(tmp_path)
    values = image_files.picture(12, (32, 48))
    image_files.write_zarr(Path("a.zarr"), values, (16, 16))
    folder = Path("a.zarr").rename("reference::refs.json")
    assert open_pixels(folder).shape == (1, 32, 48)
    assert not opened


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_of_an_archive_stay_in_their_folder(kind, tmp_path):
    """Older versions of fsspec write the last where its name leads."""
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    names = ["a.zarr/zarr.json", "a.zarr/c/0", "a.zarr/../../outside"]
    path = tmp_path / f"a.{kind}"
    with zipfile.ZipFile(path, "w") if kind == "zip" else tarfile.open(path, "w") as archive:
        for name in names:
            if isinstance(archive, zipfile.ZipFile):
                archive.writestr(name, b"x")
            else:
                member = tarfile.TarInfo(name)
                member.size = 1
                archive.addfile(member, io.BytesIO(b"x"))
    with contextlib.suppress(DataError):
        fetch(f"{kind}://a.zarr::file://{path}", folder)
    written = {str(own.relative_to(folder)) for own in tmp_path.rglob("*") if own.is_file() and own != path}
    assert written <= set(names[:2])


def test_what_a_store_lists_outside_of_a_folder_is_not_fetched(tmp_path, monkeypatch):
    system = fsspec.filesystem("memory")
    system.pipe("/listed/a.zarr/zarr.json", b"x")
    monkeypatch.setattr(type(system), "find", lambda *_, **__: ["/listed/a.zarr/zarr.json", "/listed/a.zarr/../../b"])
    with pytest.raises(DataError, match=r"cannot be fetched \(ValueError: '/listed/a.zarr/../../b' is outside"):
        fetch("memory://listed/a.zarr", tmp_path)
    assert not list(tmp_path.iterdir())
