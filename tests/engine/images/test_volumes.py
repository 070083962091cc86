"""Volumes of every kind of file equal the array that they were written from, in the order of their positions."""

import gzip
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import EXPLICIT, JPEG, RLE, item, picture, sequence
from pydicom.sequence import Sequence
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.images.open import open_pixels

Write = Callable[..., Path]
SHAPE = (5, 37, 53)


def whole(source: Any) -> np.ndarray:
    return source.read(0, source.shape[-2], 0, source.shape[-1]).numpy()


def stored(source: Any) -> np.ndarray:
    return np.asarray(source.stored.read(0, source.shape[-2], 0, source.shape[-1]))


def at(z: float, directions: tuple[float, ...] = (1, 0, 0, 0, 1, 0)) -> dict[str, Any]:
    """Elements of a slice at `z` mm."""
    return {"ImagePositionPatient": [-10, 5, z], "ImageOrientationPatient": list(directions)}


def groups(places: list[float]) -> dict[str, Any]:
    """The functional groups of frames at these places."""
    shared = item(PlaneOrientationSequence=sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    frames = [item(PlanePositionSequence=sequence(ImagePositionPatient=[0, 0, z])) for z in places]
    return {"SharedFunctionalGroupsSequence": Sequence([shared]), "PerFrameFunctionalGroupsSequence": Sequence(frames)}


# ---------------------------------------------------------------------------------------------- formats


def formats(pixels: np.ndarray, folder: Path) -> dict[str, Any]:
    """One volume (D, H, W) of 16 bits in each format that needs no library beyond those of images."""
    folder.mkdir(exist_ok=True)
    files = {name: folder / name for name in ("c.npy", "fortran.npy", "pages.tif", "tiled.tif", "a.zarr", "ome.zarr")}
    np.save(files["c.npy"], pixels)
    np.save(files["fortran.npy"], np.asfortranarray(pixels))
    tifffile.imwrite(files["pages.tif"], pixels, photometric="minisblack")
    tifffile.imwrite(files["tiled.tif"], pixels, photometric="minisblack", tile=(16, 32), compression="zlib")
    zarr.save_array(files["a.zarr"], pixels)
    group = zarr.open_group(files["ome.zarr"], mode="w")
    group.create_array("0", shape=(1, 1, *pixels.shape), dtype=pixels.dtype, chunks=(1, 1, 2, 16, 16))[0, 0] = pixels
    axes = [{"name": name} for name in "tczyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    singles = [folder / f"{number}.png" for number in range(len(pixels))]
    for path, one in zip(singles, pixels, strict=True):
        path.write_bytes(imagecodecs.png_encode(one))
    return {**files, "array": pixels, "tensor": torch.from_numpy(pixels.astype(np.int32)), "list of files": singles}


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), depth=st.integers(1, 7), height=st.integers(5, 40), width=st.integers(5, 40))
def test_every_format_by_region(tmp_path: Path, data: st.DataObject, depth: int, height: int, width: int) -> None:
    pixels = np.random.default_rng(depth).integers(0, 2**12, (depth, height, width)).astype(np.uint16)
    shutil.rmtree(tmp_path / "files", ignore_errors=True)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top, height)), data.draw(st.integers(left, width))
    flip = data.draw(st.booleans())
    shown = pixels[..., ::-1] if flip else pixels
    wanted = (shown[:, top:bottom, left:right] / np.float32(4095)).astype(np.float32)
    for name, image in formats(pixels, tmp_path / "files").items():
        source = open_pixels(image, frame="all", white=4095, flip=flip)
        assert source.shape == (1, depth, height, width), name
        np.testing.assert_allclose(source.read(top, bottom, left, right)[0].numpy(), wanted, atol=1e-7, err_msg=name)
        again = pickle.loads(pickle.dumps(source))
        np.testing.assert_allclose(again.read(top, bottom, left, right)[0].numpy(), wanted, atol=1e-7, err_msg=name)


def test_colour_and_channels(tmp_path: Path) -> None:
    pixels = picture(8, (4, 12, 15, 3))
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", np.moveaxis(pixels, 3, 0))
    for name in ("last.npy", "first.npy"):
        source = open_pixels(tmp_path / name, frame="all")
        assert source.shape == (3, 4, 12, 15)
        np.testing.assert_array_equal(stored(source), np.moveaxis(pixels, 3, 0))
    grey = open_pixels(pixels[..., 0], frame="all", channels=3)
    np.testing.assert_array_equal(whole(grey), np.repeat(whole(open_pixels(pixels[..., 0], frame="all")), 3, 0))


def test_white_is_that_of_all_slices() -> None:
    pixels = np.zeros((3, 8, 8), np.uint16)
    pixels[2] = 4000  # only the last slice shows 12 bits
    pixels[0] = 200
    assert whole(open_pixels(pixels, frame="all", white="auto")).max() == np.float32(4000 / 4095)


def nifti(path: Path, values: np.ndarray, scale: tuple[float, float] | None = None) -> Path:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([0.5, 0.5, 2.5, 1]))
    if scale is not None:
        image.header.set_slope_inter(*scale)
    image.to_filename(path)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti(tmp_path: Path, name: str) -> None:
    values = picture(12, SHAPE).astype(np.int16)
    source = open_pixels(nifti(tmp_path / name, values), frame="all", white=4095)
    np.testing.assert_array_equal(stored(source)[0], values)
    assert source.read(3, 20, 5, 9).shape == (1, 5, 17, 4) and source.stored.spacing == 2.5
    np.testing.assert_array_equal(whole(pickle.loads(pickle.dumps(source))), whole(source))
    with pytest.raises(DataError, match=r"NIfTI volume; open it with frame='all'|gzip"):
        open_pixels(tmp_path / name)


def test_nifti_in_hounsfield_units(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    path = nifti(tmp_path / "a.nii", picture(12, SHAPE).astype(np.int16), (0.5, -1024))
    wanted = np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)
    np.testing.assert_allclose(whole(open_pixels(path, frame="all"))[0], wanted, rtol=1e-6)


def test_damaged_nifti(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", picture(12, SHAPE).astype(np.int16))
    short = tmp_path / "short.nii"
    short.write_bytes(path.read_bytes()[:-10])
    packed = tmp_path / "short.nii.gz"
    packed.write_bytes(gzip.compress(short.read_bytes()))
    for one in (short, packed):
        with pytest.raises(DataError, match=r"short.nii.*truncated"):
            open_pixels(one, frame="all")
    np.save(tmp_path / "b.npy", np.zeros((2, 3, 4, 5)))
    with pytest.raises(DataError, match=r"b.npy: shape \(2, 3, 4, 5\) must be"):
        open_pixels(tmp_path / "b.npy", frame="all")


# ---------------------------------------------------------------------------------------------- DICOM


@pytest.mark.parametrize("syntax", [EXPLICIT, RLE, JPEG + "70", JPEG + "90"])
def test_frames_of_a_file(write_dicom: Write, syntax: str) -> None:
    pixels = picture(12, SHAPE)
    path = write_dicom(pixels, syntax)
    source = open_pixels(path, frame="all", flip=False)
    np.testing.assert_array_equal(stored(source)[0], pixels)
    for frame in range(len(pixels)):
        np.testing.assert_array_equal(whole(source)[:, frame], whole(open_pixels(path, frame=frame, flip=False)))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.read(5, 21, 7, 50).numpy(), whole(source)[:, :, 5:21, 7:50])


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(5)), spacing=st.floats(0.5, 8))
def test_frames_are_ordered_by_their_positions(write_dicom: Write, order: list[int], spacing: float) -> None:
    pixels = picture(12, SHAPE)
    places = [round(number * spacing, 3) for number in order]
    source = open_pixels(write_dicom(pixels, **groups(places)), frame="all", flip=False)
    found, ascending = stored(source)[0], pixels[np.argsort(order)]
    kept = list(order) == sorted(order, reverse=True)  # a file in descending order keeps its order
    np.testing.assert_array_equal(found, pixels if kept else ascending)
    assert source.stored.spacing == pytest.approx(spacing, abs=2e-3)


def test_a_series_is_ordered_by_positions_not_names(write_dicom: Write, tmp_path: Path) -> None:
    pixels = picture(12, SHAPE)
    folder = tmp_path / "series"
    folder.mkdir()
    for name, number in zip("cadeb", range(5), strict=True):
        write_dicom(pixels[number], SeriesInstanceUID="1.2", **at(number * 3.0)).rename(folder / f"{name}.dcm")
    (folder / "notes.txt").write_text("not an image")
    source = open_pixels(folder, frame="all", flip=False)
    np.testing.assert_array_equal(stored(source)[0], pixels)
    assert source.stored.spacing == 3.0 and "5 slices, 3 mm apart" in source.steps[0]
    np.testing.assert_array_equal(stored(open_pixels(sorted(folder.glob("*.dcm")), frame="all", flip=False))[0], pixels)


def test_a_folder_without_positions_is_refused_and_a_list_keeps_its_order(write_dicom: Write, tmp_path: Path) -> None:
    pixels, folder = picture(12, SHAPE), tmp_path / "series"
    folder.mkdir()
    paths = [folder / f"{name}.dcm" for name in "cadeb"]
    for path, own in zip(paths, pixels, strict=True):
        write_dicom(own, SeriesInstanceUID="1.2").rename(path)
    with pytest.raises(DataError, match="series: its files have no positions; pass a list"):
        open_pixels(folder, frame="all")
    np.testing.assert_array_equal(stored(open_pixels(paths, frame="all", flip=False))[0], pixels)


@pytest.mark.parametrize(
    ("places", "series", "directions", "message"),
    [
        ([0, 1, 2, 4, 5], "1.2", (1, 0, 0, 0, 1, 0), "2 mm between slices after 2 mm, but 1 mm elsewhere"),
        ([0, 1, 1, 2, 3], "1.2", (1, 0, 0, 0, 1, 0), "two slices lie at 1 mm"),
        ([0, 1, 2, 3, 4], "1.3", (1, 0, 0, 0, 1, 0), "slices of 2 series"),
        ([0, 1, 2, 3, 4], "1.2", (0, 1, 0, 0, 0, -1), "not parallel"),
    ],
)
def test_series_that_are_no_volume(
    write_dicom: Write, tmp_path: Path, places: list[float], series: str, directions: tuple[float, ...], message: str
) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    for number, place in enumerate(places):
        last = number == len(places) - 1
        elements = at(place, directions if last else (1, 0, 0, 0, 1, 0))
        own = series if last else "1.2"
        write_dicom(picture(12), SeriesInstanceUID=own, **elements).rename(folder / f"{number}.dcm")
    with pytest.raises(DataError, match=message) as error:
        open_pixels(folder, frame="all")
    assert "\n" not in str(error.value)


def test_windows_of_single_frames(write_dicom: Write) -> None:
    """Each frame is shown with its own window, as when it is opened alone."""
    pixels = picture(12, (3, 37, 53))
    frames = [item(FrameVOILUTSequence=sequence(WindowCenter=c, WindowWidth=900)) for c in (900, 1500, 2500)]
    path = write_dicom(pixels, PerFrameFunctionalGroupsSequence=Sequence(frames))
    source = open_pixels(path, frame="all", flip=False)
    for frame in range(3):
        alone = whole(open_pixels(path, frame=frame, flip=False))
        np.testing.assert_allclose(whole(source)[:, frame], alone, atol=1e-6)


def test_mammograms_are_mirrored_as_one(write_dicom: Write) -> None:
    pixels = picture(12, SHAPE)
    source = open_pixels(write_dicom(pixels, PatientOrientation=["P", "L"]), frame="all")
    np.testing.assert_array_equal(whole(source)[0], (pixels / 4095).astype(np.float32)[..., ::-1])
    assert "mirrored left-right" in " ".join(source.steps)


def test_real_tomosynthesis(real_data: Path) -> None:
    path = real_data / "dicom" / "dbt_4frames_jpeg2000.dcm"
    source = open_pixels(path, frame="all")
    assert source.shape[:2] == (1, 4) and source.stored.info.laterality == "L"
    assert source.stored.spacing is None  # all frames of this file have one position
    part = source.read(10, 90, 20, 100).numpy()
    for frame in range(4):
        np.testing.assert_allclose(part[:, frame], open_pixels(path, frame=frame).read(10, 90, 20, 100), atol=1e-6)


# ---------------------------------------------------------------------------------------------- errors


def test_bad_input_is_one_line(write_dicom: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="frame='every' must be a number from 0, or 'all'"):
        open_pixels(np.zeros((3, 8, 8)), frame="every")
    with pytest.raises(DataError, match="list of files is a volume"):
        open_pixels([tmp_path / "a.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: has no DICOM files; pass a list"):
        open_pixels(tmp_path / "empty", frame="all")
    np.save(tmp_path / "a.npy", np.zeros((8, 8), np.uint8))
    np.save(tmp_path / "b.npy", np.zeros((8, 9), np.uint8))
    with pytest.raises(DataError, match=r"b.npy: slice 1 is uint8 \(1, 8, 9\), but slice 0 uint8 \(1, 8, 8\)"):
        open_pixels([tmp_path / "a.npy", tmp_path / "b.npy"], frame="all")
    lying = write_dicom(picture(12, SHAPE), NumberOfFrames=9)
    with pytest.raises(DataError, match="bytes of pixel data instead of"):
        open_pixels(lying, frame="all")
    source = open_pixels(write_dicom(picture(12, SHAPE), RLE), frame="all", flip=False)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1000))
    with pytest.raises(DataError, match=r"0\.0 GB when decoded, but .* set TMPDIR"):
        whole(source)


# ---------------------------------------------------------------------------------------------- networks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 6, (1, 3, 3)),
        nn.Tanh(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    ).double()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("form", ["pages.tif", "a.zarr", "list of files"])
def test_networks_read_volumes_by_region(tmp_path: Path, form: str, live: bool) -> None:
    pixels = [picture(12, (6, 45, 61), seed) for seed in (1, 2)]
    sources = [open_pixels(formats(p, tmp_path / str(n))[form], frame="all") for n, p in enumerate(pixels)]
    plain, net = network().train(live), accelerate(network().train(live), tile=16)
    wanted = plain(torch.stack([torch.from_numpy(whole(source)) for source in sources]).double())
    found = net(sources)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for one, two in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(
            net.eval()(sources[0]), plain.eval()(torch.from_numpy(whole(sources[0]))[None].double())
        )


def test_volumes_of_several_depths() -> None:
    volumes = [picture(12, (depth, 40, 40), depth) for depth in (4, 7)]
    sources = [open_pixels(volume, frame="all") for volume in volumes]
    plain, net = network().eval(), accelerate(network().eval(), tile=16)
    wanted = torch.cat([plain(torch.from_numpy(whole(source))[None].double()) for source in sources])
    torch.testing.assert_close(net(sources), wanted, rtol=1e-12, atol=1e-14)


def test_volume_and_image_are_not_confused() -> None:
    volume, image = open_pixels(picture(12, (4, 40, 40)), frame="all"), open_pixels(picture(12, (40, 40)))
    flat = accelerate(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1)))
    for net, source in ((flat, volume), (accelerate(network().float()), image)):
        with pytest.raises(GigamorphError) as error:
            net(source)
        assert "\n" not in str(error.value).partition("\n\n")[0]
