"""Files that fsspec reaches are read as those on the disk are, and no more of them is fetched than is asked for."""

import pickle
import time
from pathlib import Path

import fsspec
import image_files
import numpy as np
import pytest
import range_server

from gigamorph.engine.errors import DataError
from gigamorph.engine.images import remote
from gigamorph.engine.images.open import open_pixels

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
        with pytest.raises(DataError, match=r"a\.npy: no part of it can be read alone where it lies; fetch it"):
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
