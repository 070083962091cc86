"""Tiles of masks over images as they are hung, beside plain arrays."""

import imagecodecs
import numpy as np
import pytest
from predicted_masks import write_predicted

from gigamorph.engine.errors import DataError
from gigamorph.engine.mammography.view.exams import read_exams
from gigamorph.engine.mammography.view.pyramid import TILE, MaskTiles
from gigamorph.engine.mammography.view.site import ViewerFiles
from gigamorph.engine.predict.masks import ArrayMask
from gigamorph.engine.report.figure import class_colour, outline_colour

AREAS, OUTLINES = (
    np.array([[0, 0, 0, 0], *([*bytes.fromhex(colour(k)[1:]), 255] for k in (1, 2))], np.uint8)
    for colour in (class_colour, outline_colour)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_predicted(folder, width=1100)
    return folder


def whole(tiles, level):
    columns, rows = tiles.tiles(level)
    return np.concatenate(
        [
            np.concatenate([imagecodecs.png_decode(tiles.tile(level, c, r)) for c in range(columns)], 1)
            for r in range(rows)
        ]
    )


def highest(values, factor):
    height, width = (-(-side // factor) * factor for side in values.shape)
    padded = np.zeros((height, width), np.uint8)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded.reshape(height // factor, factor, width // factor, factor).max((1, 3))


def outlined(values):
    """Pixels of a class with another value at most two steps away, one after the other in rows or columns."""
    found = np.zeros_like(values)
    for k in (1, 2):
        inside = values == k
        for _ in range(2):
            around = np.pad(inside, 1, constant_values=True)
            inside = inside & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
        found[(values == k) & ~inside] = k
    return found


def test_masks_at_every_scale_where_the_image_is(folder):
    exams = read_exams(folder / "out", table=folder / "table.csv")
    site = ViewerFiles(exams, None, identifiers=False)
    for number, view in enumerate(site.views):
        name, source = view.record.path.name, view.open()
        image = imagecodecs.imread(str(folder / name))
        shown = np.rint(source.read(0, 1100, 0, 1100)[0].numpy() * 255)
        [mirrored] = [way for way in (1, -1) if (shown == image[:, ::way]).all()]
        predicted, mask = (
            imagecodecs.imread(str(folder / place / name))[:, ::mirrored] for place in ("out/masks", "masks")
        )
        mask = np.where(mask == 255, 0, mask)
        for level in range(site.tiles_of(number).levels + 1):
            areas, outlines = (whole(site.tiles_of(number, which), level) for which in ("predicted", "reference"))
            assert (areas == AREAS[highest(predicted, 1 << level)]).all()
            assert (outlines == OUTLINES[outlined(highest(mask, 1 << level))]).all()
    assert site.tiles_of(0).levels == 2 and TILE == 512
    with pytest.raises(IndexError):
        site.tiles_of(0, "other")


def test_outlines_are_as_wide_where_tiles_meet():
    mask = np.zeros((1, 1100, 1100), np.uint8)
    mask[0, 450:1026, 450:1026] = 1
    for level in (0, 1):
        found = whole(MaskTiles(ArrayMask(mask), outlined=True), level)
        assert (found == OUTLINES[outlined(highest(mask[0], 1 << level))]).all()


def test_exams_of_masks_the_lowest_dice_first(folder, tmp_path):
    exams = read_exams(folder / "out")
    assert [exam.error is None for exam in exams] == [False, False]
    views = [view for exam in exams for view in exam.views]
    assert all(set(view.masks.files) == {"predicted"} for view in views)
    assert exams[0].error >= exams[1].error > 0.1
    for view in views:
        values = list(view.masks.dice.values())
        assert view.error == (pytest.approx(1 - np.mean(values)) if values else None)
        assert set(view.predicted) == {"mass", "cyst"}
    # Those of a cross-validation have no masks.
    (tmp_path / "out_of_fold.csv").write_text(f"image_path,patient_id,dice_1,fold\n{folder / '0.png'},p,0.25,1\n")
    [exam] = read_exams(tmp_path)
    assert exam.error == 0.75 and not exam.views[0].masks.files
    (tmp_path / "predictions.csv").write_text(f"image_path,mask,dice_1\n{folder / '0.png'},gone.png,0.25\n")
    with pytest.raises(DataError, match=r"gone\.png: no such mask"):
        read_exams(tmp_path)


@pytest.mark.parametrize("binary", [True, False])
def test_255_is_the_class_1_only_where_predict_noted_it(tmp_path, binary):
    mask = np.zeros((40, 30), np.uint8)
    mask[10:20, 5:15] = 255
    for name, values in (("0.png", mask), ("mask.png", mask), ("out.png", mask // 255)):
        (tmp_path / name).write_bytes(imagecodecs.png_encode(values))
    (tmp_path / "table.csv").write_text("image_path,mask_path,patient_id\n0.png,mask.png,p\n")
    header = "image_path,patient_id,mask,share_background,share_1,dice_1\n"
    (tmp_path / "predictions.csv").write_text(f"{header}0.png,p,out.png,0.9,0.1,1\n")
    (tmp_path / "predictions.json").write_text(f'{{"masks": {{"binary": {str(binary).lower()}}}}}')
    site = ViewerFiles(read_exams(tmp_path, table=tmp_path / "table.csv"), None, identifiers=False)
    assert (whole(site.tiles_of(0, "predicted"), 0)[..., 3] > 0).sum() == 100
    assert (whole(site.tiles_of(0, "reference"), 0)[..., 3] > 0).any() == binary
