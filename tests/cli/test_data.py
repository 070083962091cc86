import csv
import functools
import json
import shutil

import commands
import imagecodecs
import lookalikes
import numpy as np
import pytest
from commands import rows
from rich.console import Console

from gigamorph.cli.counter import Count
from gigamorph.cli.data import data
from gigamorph.cli.picture import show_picture
from gigamorph.engine.datasets.augment import Augment, augmented
from gigamorph.engine.datasets.tables import read_table
from gigamorph.engine.images.open import open_pixels

run = functools.partial(commands.run, "data")


@pytest.mark.parametrize("command", sorted(data.commands))
def test_every_help_has_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"Example: gigamorph data {command}" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    options = ["--size", "160x128", "--patients", 6, "--breasts", 2, "--lesion", "mass", "--lesion", "cluster"]
    assert run("phantom", "--out", folder, *options, "--masks", "--seed", 3, "--workers", 2) == 0
    return folder


def test_phantom(phantoms, tmp_path, capsys):
    table = read_table(phantoms / "phantoms.csv").records
    assert len(table) == 24
    assert {finding.kind for record in table for finding in record.findings} == {"mass", "cluster"}
    assert all(finding.mask.exists() for record in table for finding in record.findings)
    assert run("phantom", "--out", tmp_path, "--size", "200x160", "--patients", 2, "--format", "tiff") == 0
    assert "4 images of 2 patients, 200 x 160 pixels" in capsys.readouterr().out
    assert len(list((tmp_path / "images").glob("*.tif"))) == 4
    assert run("phantom", "--out", tmp_path, "--size", "70000x128", "--patients", 1) == 2
    assert "error: " in capsys.readouterr().err


def test_index(phantoms, tmp_path, capsys):
    shutil.copytree(phantoms / "images", tmp_path / "in")
    (tmp_path / "in" / "notes").write_text("x")
    assert run("index", tmp_path / "in", "--out", tmp_path / "i.csv") == 0
    said = capsys.readouterr()
    assert "24 images of 6 patients, 1 file skipped" in said.out
    assert "6 L CC, 6 L MLO, 6 R CC, 6 R MLO" in said.out
    assert "skipped: " in said.err and "notes" in said.err
    assert {row["patient_id"] for row in rows(tmp_path / "i.csv")} == {f"P{n:05d}" for n in range(1, 7)}
    assert run("index", tmp_path / "in", "--out", tmp_path / "i.csv", "--identifiers") == 0
    assert {row["patient_id"] for row in rows(tmp_path / "i.csv")} == {f"PHANTOM{n:04d}" for n in range(6)}
    shutil.copytree(phantoms / "masks", tmp_path / "in" / "masks")
    assert run("index", tmp_path / "in", "--out", tmp_path / "i.csv") == 0
    assert "masks are left out" in capsys.readouterr().out and len(rows(tmp_path / "i.csv")) == 24
    (tmp_path / "empty").mkdir()
    assert run("index", tmp_path / "empty", "--out", tmp_path / "e.csv") == 2


def test_check(phantoms, tmp_path, capsys):
    assert run("check", phantoms / "phantoms.csv") == 0
    said = capsys.readouterr().out
    assert "24 images, 0 with problems to correct" in said
    assert "24 flag: not a standard view" in said
    table = (phantoms / "phantoms.csv").read_text().replace("_R_CC.dcm,0,PHANTOM0000", "_R_CC.dcm,0,PHANTOM0001")
    (phantoms / "wrong.csv").write_text(table.replace(",L,CC,", ",R,CC,", 1))
    assert run("check", phantoms / "wrong.csv", "--out", tmp_path / "problems.csv", "--workers", 1) == 1
    said = capsys.readouterr().out
    assert "is R in the table, L in the header" in said
    found = [row for row in rows(tmp_path / "problems.csv") if row["kind"] != "flag"]
    assert f"{len({row['image_path'] for row in found})} with problems to correct" in said
    assert {row["kind"] for row in found} == {"laterality", "patient"}
    (phantoms / "wrong.csv").unlink()


def test_ctrl_c_tells_what_the_check_has_found(tmp_path, capsys, monkeypatch):
    good = imagecodecs.png_encode(np.random.default_rng(0).integers(0, 256, (9, 8), dtype=np.uint8))
    for name, content in {"a": good, "b": good[:40], "c": good, "d": good}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    table = tmp_path / "t.csv"
    table.write_text("image_path,label\n" + "".join(f"{name}.png,{name}\n" for name in "abcd"))

    def add(self, count=1):
        self.done += count
        if self.done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Count, "add", add)
    assert run("check", table, "--out", tmp_path / "p.csv", "--workers", 1) == 130
    said = capsys.readouterr()
    assert "3 of 4 images, 2 with problems to correct" in said.out
    assert "stopped by Ctrl-C; this result covers only the checked images" in said.err and said.err.count("\n") == 1
    assert [(row["image_path"][-5:], row["kind"]) for row in rows(tmp_path / "p.csv")] == [
        ("b.png", "unreadable"),
        ("c.png", "duplicate"),
    ]


def test_check_of_a_public_data_set(tmp_path, capsys):
    lookalikes.vindr_mammo(tmp_path)
    assert run("check", tmp_path) == 0
    assert "is VinDr-Mammo (--dataset vindr-mammo)" in capsys.readouterr().out
    (tmp_path / "images" / "s1" / "i1.dicom").unlink()
    assert run("check", tmp_path, "--dataset", "vindr-mammo") == 1
    assert "No such file" in capsys.readouterr().out


def test_no_out_destroys_what_is_read(tmp_path, capsys):
    """A slip in --out must not cost a table with its labels, or an image."""
    image, table = tmp_path / "a.png", tmp_path / "table.csv"
    image.write_bytes(imagecodecs.png_encode(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    table.write_text("image_path,label,patient_id\na.png,1,p\n")
    before = image.read_bytes(), table.read_bytes()
    for given in (
        ["check", table, "--out", table],
        ["check", table, "--out", image],
        ["preview", image, "--out", image],
        ["index", tmp_path, "--out", table],
        ["index", tmp_path, "--out", image],
        ["convert", table, "--out", tmp_path],
        ["convert", table, "--out", tmp_path, "--images", "tiff"],
    ):
        assert run(*given) == 2, given
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "name another --out" in said
        assert (image.read_bytes(), table.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [image, table]
    assert run("convert", table, "--out", tmp_path / "out", "--images", "tiff") == 0
    converted = (tmp_path / "out" / "table.csv").read_bytes()
    assert run("convert", table, "--out", tmp_path / "out") == 2
    assert "holds converted images; their table would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "out" / "table.csv").read_bytes() == converted


@pytest.mark.parametrize("command", ["index", "check"])
def test_an_out_that_cannot_be_written_is_told_before_the_work(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.eye(8, dtype=np.uint8)))
    for module in ("index", "check"):
        monkeypatch.setattr(f"gigamorph.engine.datasets.{module}.run_parallel", lambda *_, **__: pytest.fail("worked"))
    assert run(command, tmp_path, "--out", tmp_path / "file" / "out.csv") == 2
    assert "out.csv: the file cannot be written: Not a directory; choose a writable folder" in capsys.readouterr().err


def test_split_keeps_the_table_that_it_reads(tmp_path, capsys):
    table, link = tmp_path / "table.csv", tmp_path / "link.csv"
    table.write_text("image_path,label,patient_id,mine\na.png,1,A,x\n")
    link.symlink_to(table)
    before = table.read_bytes()
    assert run("split", table, "--out", link) == 2
    assert capsys.readouterr().err == f"error: {link}: is an input and would be overwritten; name another --out\n"
    assert table.read_bytes() == before


def test_other_names_of_columns(phantoms, tmp_path, capsys):
    lines = (phantoms / "phantoms.csv").read_text().splitlines()
    header = lines[0].replace("image_path", "Datei").replace("label", "Krebs").replace("patient_id", "Nummer")
    own = phantoms / "own.csv"
    own.write_text("\n".join([header, *lines[1:], lines[1]]))
    columns = ["--column", "image_path=Datei", "--column", "label=Krebs"]
    assert run("split", own, "--out", tmp_path / "s.csv", *columns) == 2
    assert "column patient_id is missing" in capsys.readouterr().err
    columns += ["--column", "patient_id=Nummer"]
    assert run("check", own, *columns, "--workers", 1) == 1
    assert "1 duplicate: the same image or the same pixels twice" in capsys.readouterr().out
    assert run("split", own, "--out", tmp_path / "s.csv", *columns) == 0
    assert run("convert", own, "--out", tmp_path / "c", *columns) == 0
    wanted = [(r.path, r.label, r.patient_id) for r in read_table(phantoms / "phantoms.csv").records]
    for table in (tmp_path / "s.csv", tmp_path / "c" / "table.csv"):
        assert [(r.path, r.label, r.patient_id) for r in read_table(table).records] == wanted
    assert commands.run("train", own, "--print-config", *columns) == 0
    text = '[data.columns]\nimage_path = "Datei"\nlabel = "Krebs"\npatient_id = "Nummer"\n'
    assert text in capsys.readouterr().out
    (tmp_path / "c.toml").write_text('[data.columns]\nlabel = "Krebs"\nview = "Ansicht"\n')
    given = ["--config", tmp_path / "c.toml", "--column", "view=Sicht"]
    assert commands.run("train", own, "--print-config", *given) == 0
    assert '[data.columns]\nlabel = "Krebs"\nview = "Sicht"\n' in capsys.readouterr().out
    assert run("check", phantoms / "images", "--column", "label=Krebs", "--workers", 1) in (0, 1)
    assert "warning: no table had a column Krebs" in capsys.readouterr().err
    assert commands.run("eval", own, "--out", tmp_path / "e", "--column", "label=Krebs") == 2
    assert "name the true column with --label NAME" in capsys.readouterr().err
    assert run("check", own, "--column", "label=a", "--column", "label=b") == 2
    assert "a name is given two columns" in capsys.readouterr().err
    assert run("check", own, "--column", "label") == 2
    assert "'label' must be NAME=COLUMN, as in label=cancer" in capsys.readouterr().err


def test_split(phantoms, tmp_path, capsys):
    lines = [",".join(line.split(",")[:3]) for line in (phantoms / "phantoms.csv").read_text().splitlines()]
    (phantoms / "bare.csv").write_text("\n".join(lines))
    for name in ("a", "b"):
        assert run("split", phantoms / "bare.csv", "--out", tmp_path / f"{name}.csv", "--seed", 1) == 0
    said = capsys.readouterr().out
    assert "train      2 patients       8 images: 6 of 0, 2 of 1" in said
    assert "no patient is in two splits" in said
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    records = read_table(tmp_path / "a.csv").records  # the images are found from there, too
    assert {record.split for record in records} == {"train", "val", "test"}
    assert run("split", tmp_path / "a.csv", "--out", tmp_path / "c.csv", "--seed", 5) == 0
    assert "split of the table kept\n" in capsys.readouterr().out
    assert (tmp_path / "c.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    official = (tmp_path / "a.csv").read_text().replace(",val\n", ",train\n")
    (tmp_path / "official.csv").write_text(official)
    assert run("split", tmp_path / "official.csv", "--out", tmp_path / "d.csv", "--fractions", "0.8,0.2,0") == 0
    assert "split of the table kept; val drawn from train" in capsys.readouterr().out
    assert run("split", tmp_path / "a.csv", "--out", tmp_path / "e.csv", "--fractions", "0.8,0.2") == 2


def test_a_split_of_too_few_patients_is_told(phantoms, tmp_path, capsys):
    lines = [",".join(line.split(",")[:3]) for line in (phantoms / "phantoms.csv").read_text().splitlines()]
    few = phantoms / "few.csv"
    few.write_text("\n".join(lines[:9]))  # two patients
    assert run("split", few, "--out", tmp_path / "split.csv") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "warning: val and test have no patients, because each label has fewer than 3; "
        "give fewer splits with --fractions"
    ) in told
    assert run("split", few, "--out", tmp_path / "all.csv", "--fractions", "1,0,0") == 0
    assert not capsys.readouterr().err  # as asked for


def test_the_folder_of_converted_images_is_no_folder_of_classes(phantoms, tmp_path, capsys):
    assert run("convert", phantoms / "phantoms.csv", "--out", tmp_path / "out", "--images", "png") == 0
    assert commands.run("train", tmp_path / "out", "--out", tmp_path / "run") == 2
    assert f"use its table, {tmp_path / 'out' / 'table.csv'}" in " ".join(capsys.readouterr().err.split())


def test_convert_a_public_data_set(tmp_path, capsys):
    lookalikes.embed(tmp_path / "in")
    out = tmp_path / "out"
    assert run("convert", tmp_path / "in", "--dataset", "embed", "--out", out, "--images", "tiff") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "label cancer: 1 if pathology of the exam and side found cancer" in said
    assert "split: none" in said
    assert "4 images of 3 patients (2 of class 0, 1 of class 1, 1 without label)" in said
    table = read_table(out / "table.csv")
    assert [record.label for record in table.records] == [1, 0, 0]
    assert all(record.path.parent == out / "images" for record in table.records)
    assert [row["label"] for row in rows(out / "unlabelled.csv")] == [""]
    assert len(read_table(out / "unlabelled.csv", labels=False).records) == 1
    stored = json.loads((out / "table.json").read_text())
    assert stored["data_set"] == "embed" and stored["label"].startswith("cancer: ") and stored["left_out"] == 0
    assert stored["images"] == {"of class 0": 2, "of class 1": 1, "without label": 1}


def test_convert_tells_of_patients_in_two_official_lists(tmp_path, capsys):
    lookalikes.chestxray14(tmp_path / "in")
    assert run("convert", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "in" / "train_val_list.txt").write_text("00000001_000.png\n")
    (tmp_path / "in" / "test_list.txt").write_text("00000001_001.png\n00000002_000.png\n")
    assert run("convert", tmp_path / "in", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert told.startswith("warning: 1 patient is in two splits, as 1 in train and test; train refuses such tables")
    assert told.count("\n") == 1


def test_convert_says_what_it_cannot(tmp_path, capsys):
    lookalikes.rsna(tmp_path / "in")
    assert run("convert", tmp_path / "in", "--out", tmp_path / "a", "--label", "invasive") == 0
    assert "RSNA 2023 (--dataset rsna)" in capsys.readouterr().out
    assert [row["label"] for row in rows(tmp_path / "a" / "table.csv")] == ["1", "0", "0"]
    assert run("convert", tmp_path / "in", "--out", tmp_path / "a", "--label", "birads") == 2
    assert "RSNA 2023 has no label 'birads'; choose from cancer, biopsy" in capsys.readouterr().err
    path = tmp_path / "in" / "train_images" / "10" / "100.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:2000])
    assert run("convert", tmp_path / "in", "--out", tmp_path / "b", "--images", "png") == 1
    said = capsys.readouterr()
    assert "left out: " in said.err and "100.dcm" in said.err
    assert len(rows(tmp_path / "b" / "table.csv")) == 2
    path.unlink()
    assert run("convert", tmp_path / "in", "--out", tmp_path / "c") == 2
    assert "1 of 3 images of RSNA 2023 are missing" in capsys.readouterr().err
    assert run("convert", tmp_path / "in", "--out", tmp_path / "c", "--skip-missing") == 0
    assert run("convert", tmp_path / "in", "--out", tmp_path / "e", "--label", "none", "--skip-missing") == 0
    assert "2 without label" in capsys.readouterr().out
    assert not (tmp_path / "e" / "table.csv").exists()
    out = tmp_path / "f"  # a table of one's own that has no labels
    assert run("convert", tmp_path / "e" / "unlabelled.csv", "--out", out, "--label", "none", "--images", "png") == 0
    assert len(rows(out / "unlabelled.csv")) == len(list((out / "images").iterdir())) == 2
    assert run("convert", tmp_path / "e" / "unlabelled.csv", "--out", out) == 2
    assert "label is empty" in capsys.readouterr().err
    assert run("convert", tmp_path / "a" / "table.csv", "--out", tmp_path / "d", "--label", "cancer") == 2
    assert "1 of 3 images do not exist" in capsys.readouterr().err
    only = ["--skip-missing", "--label"]
    assert run("convert", tmp_path / "a" / "table.csv", "--out", tmp_path / "d", *only, "biopsy") == 0
    assert rows(tmp_path / "d" / "table.csv")
    assert run("convert", tmp_path / "a" / "table.csv", "--out", tmp_path / "d", *only, "size") == 2
    assert "has no column label_size" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "in" / "train_images")
    assert run("convert", tmp_path / "in", "--out", tmp_path / "g", "--skip-missing") == 2
    assert "none of the 3 images exists" in capsys.readouterr().err


def test_convert_and_missing_masks(tmp_path, capsys):
    save_png(tmp_path / "x.png", np.arange(63, dtype=np.uint8).reshape(9, 7))
    save_png(tmp_path / "m.png", np.eye(9, 7, dtype=np.uint8))
    (tmp_path / "t.csv").write_text("image_path,label,patient_id,mask_path\nx.png,0,a,m.png\n")
    for number, format_ in enumerate((["--images", "png"], [])):
        assert run("convert", tmp_path / "t.csv", "--out", tmp_path / f"good{number}", *format_) == 0
        assert read_table(tmp_path / f"good{number}" / "table.csv").records[0].findings[0].mask.exists()
    (tmp_path / "m.png").unlink()
    capsys.readouterr()
    for number, format_ in enumerate((["--images", "png"], [])):
        out = tmp_path / str(number)
        assert run("convert", tmp_path / "t.csv", "--out", out, *format_) == 2
        assert "1 masks do not exist, the first" in capsys.readouterr().err
        assert run("convert", tmp_path / "t.csv", "--out", out, "--skip-missing", *format_) == 0
        assert "1 missing masks left out, the first" in capsys.readouterr().err
        assert [finding.mask for r in read_table(out / "table.csv").records for finding in r.findings] == [None]
    assert run("check", tmp_path / "t.csv") == 1
    assert "1 mask: a mask that is missing" in capsys.readouterr().out


def save_png(path, pixels):
    path.write_bytes(imagecodecs.png_encode(pixels))


def test_file_names_and_patients(tmp_path, capsys):
    """A split of exams whose patients nobody names does not claim to be one by patient."""
    folder = tmp_path / "in"
    folder.mkdir()
    for patient in range(6):
        for side in "LR":
            save_png(folder / f"{patient}_{side}-CC.png", np.arange(63, dtype=np.uint8).reshape(9, 7))
    assert run("index", folder, "--out", tmp_path / "i.csv") == 0
    said = capsys.readouterr()
    assert "12 images of 6 patients" in said.out
    assert "file names read as {patient}_{laterality}-{view}: 0_L-CC.png is of patient 0, L, CC" in said.out
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{number}.png")
    assert run("index", folder, "--out", tmp_path / "j.csv", "--pattern", "x{patient}") == 2
    assert run("index", folder, "--out", tmp_path / "j.csv") == 0
    assert "warning: the patient of 12 images is unknown" in capsys.readouterr().err
    found = rows(tmp_path / "j.csv")
    assert all(row["image_path"] == row["patient_id"] for row in found)
    with (tmp_path / "k.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows({**row, "label": number % 2} for number, row in enumerate(found))
    assert run("split", tmp_path / "k.csv", "--out", tmp_path / "s.csv") == 0
    said = capsys.readouterr()
    assert "no patient is in two splits" not in said.out
    assert "warning: the patient of 12 images is unknown" in said.err


def test_twelve_bits_in_sixteen(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 4096, (30, 20)).astype(np.uint16)
    pixels[0, 0] = 4095
    save_png(tmp_path / "x.png", pixels)
    (tmp_path / "t.csv").write_text("image_path,label,patient_id\nx.png,0,a\n")
    assert run("check", tmp_path / "t.csv") == 1
    assert "nearly black; set the white level: --white 4095" in capsys.readouterr().out
    assert run("check", tmp_path / "t.csv", "--white", "auto") == 0
    assert run("preview", tmp_path / "x.png") == 0
    assert "warning: grey values reach only 4095 of 65535" in capsys.readouterr().err
    assert run("preview", tmp_path / "x.png", "--white", "4095") == 0
    said = capsys.readouterr()
    assert "grey 0 to 4095 as 0 to 1" in said.out
    assert said.err == ""
    assert run("preview", tmp_path / "x.png", "--white", "bright") == 2
    assert run("convert", tmp_path / "t.csv", "--out", tmp_path / "c", "--images", "png", "--white", "4095") == 0
    written = imagecodecs.png_decode((tmp_path / "c" / "images" / "x.png").read_bytes())
    np.testing.assert_array_equal(written, np.rint(pixels / np.float32(4095) * 65535))


def test_preview(phantoms, tmp_path, capsys):
    image = sorted((phantoms / "images").glob("*_R_CC.dcm"))[0]
    assert run("preview", image, "--mean", "0.3", "--std", "0.1", "--out", tmp_path / "p.png") == 0
    said = capsys.readouterr().out
    assert "1. DICOM, Explicit VR Little Endian" in said
    assert "mirrored left-right (chest wall left, feet down)" in said
    assert "minus [0.3], over [0.1]" in said
    assert "1 x 160 x 128 (channels x height x width), -3 to" in said
    assert f"{tmp_path / 'p.png'}: every pixel" in said
    assert imagecodecs.png_decode((tmp_path / "p.png").read_bytes()).shape == (160, 128)
    picture = [line for line in said.splitlines() if line.strip() and set(line) <= set(" .:-=+*#%@")]
    assert len(picture) > 10  # as characters, because this is no terminal
    # The chest wall is left.
    assert sum(line[:10].count(" ") for line in picture) < sum(line.ljust(80)[30:40].count(" ") for line in picture)
    assert run("preview", image, "--voi", "window:7") == 2
    assert "window:7" in capsys.readouterr().err
    grey = np.full((20, 20), 255, np.uint8)
    (tmp_path / "white.png").write_bytes(imagecodecs.png_encode(grey))
    assert run("preview", tmp_path / "white.png") == 0
    assert "warning: all pixels are equal" in capsys.readouterr().err


def test_preview_of_a_varied_image(phantoms, tmp_path, capsys):
    """The picture and the steps are those of the image that training would see."""
    image = sorted((phantoms / "images").glob("*_R_CC.dcm"))[0]
    text = "rotate=20,elastic=4,contrast=0.3,noise=0.01"
    out = tmp_path / "p.png"
    assert run("preview", image, "--mean", "0.3", "--augment", text, "--seed", "4", "--out", out) == 0
    said = capsys.readouterr().out
    seen = augmented(open_pixels(image), Augment.parse(text), seed=4, epoch=0, index=0)
    steps = [*seen.steps, "minus [0.3], over [1.0]"]
    assert [line.split(". ", 1)[1] for line in said.splitlines() if ". " in line[:4]] == steps
    assert any(step.startswith("turned by") for step in steps)
    expected = seen.read(0, 160, 0, 128)[0].clip(0, 1).numpy() * 65535
    assert np.abs(imagecodecs.png_decode(out.read_bytes()) - expected).max() < 1
    assert run("preview", image, "--augment", "turn=20") == 2
    error = capsys.readouterr().err
    assert "augmentation turn=20: unknown; choose from flip, rotate" in error


def test_preview_of_the_real_mammogram(real_data, capsys):
    assert run("preview", real_data / "dicom" / "mg_ge_jpeg_lossless.dcm") == 0
    said = capsys.readouterr().out
    assert "1 x 3062 x 2394" in said
    assert "VOI" in said and "padding" in said and "mirrored left-right" in said


def test_pictures_in_colour_are_two_pixels_a_character(capsys):
    picture = np.array([[0, 255], [255, 0], [9, 200]], np.uint8)
    console = Console(force_terminal=True, color_system="truecolor", width=10)
    with console.capture() as capture:
        show_picture(picture, console)
    lines = capture.get().splitlines()
    assert len(lines) == 2
    assert "\x1b[38;2;0;0;0;48;2;255;255;255m▀" in lines[0]
    assert "\x1b[38;2;255;255;255;48;2;0;0;0m▀" in lines[0]
    assert "38;2;200;200;200;48;2;0;0;0m▀" in lines[1]  # nothing below the last row


def test_counts_on_a_terminal_and_elsewhere():
    quiet = Console(force_terminal=False, width=80)
    with quiet.capture() as capture, Count("images", console=quiet, interval=0) as count:
        count.start(3)
        count.add()
        count.add(2)
    assert capture.get().splitlines() == ["images: 1 of 3", "images: 3 of 3"]
    terminal = Console(force_terminal=True, width=80)
    with terminal.capture() as capture, Count("images", 3, console=terminal) as count:
        count.add(3)
    assert "3/3" in capture.get()
