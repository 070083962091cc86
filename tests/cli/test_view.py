"""`gigamorph view`: pages that are looked at in headless Chromium, from files and from the server."""

import contextlib
import csv
import math
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import browser
import pytest
from commands import run
from forked import command as forked
from hostile import hostile
from viewed import shown

from gigamorph.engine.datasets.tables.folders import made_by
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.mammography.view.evidence import MapServer
from gigamorph.engine.mammography.view.exams import read_exams
from gigamorph.engine.mammography.view.server import PageServer
from gigamorph.engine.mammography.view.site import ViewerFiles

FAST = ["--model", "lesionnet", "--mean", "0.3", "--std", "0.1", "--epochs", "1", "--accumulate", "4"]
chromium = pytest.mark.skipif(not browser.there(), reason="no chromium and chromedriver")


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """The folder of a table with findings, a trained network and its predictions."""
    folder = tmp_path_factory.mktemp("view")
    table = write_phantoms(folder / "phantoms", patients=6, height=600, width=440, seed=1)
    with table.open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        # Two phantoms are the exam of one patient, the first two of a right and a left breast.
        row["patient_id"] = row["exam_id"] = f"P{int(row['patient_id'].removeprefix('PHANTOM')) // 2}"
        del row["split"]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    assert run("train", table, *FAST, "--quiet", "--out", folder / "run") == 0
    assert run("predict", folder / "run" / "best.ckpt", table, "--out", folder / "predictions") == 0
    return folder


@pytest.fixture(scope="module")
def static(predicted):
    given = ["--table", predicted / "phantoms" / "phantoms.csv", "--evidence", predicted / "run" / "best.ckpt"]
    assert run("view", predicted / "predictions", *given, "--static", "--no-browser", "--out", predicted / "page") == 0
    return predicted / "page"


def test_what_is_there_and_current_is_not_written_again(predicted, static, tmp_path, monkeypatch, capsys):
    """Tiles by their images' files, evidence by its network too; what is no longer shown goes."""
    page, made = shutil.copytree(static, tmp_path / "page"), []
    tiles, evidence = ViewerFiles.tiles_of, ViewerFiles.evidence
    monkeypatch.setattr(
        ViewerFiles, "tiles_of", lambda site, number, which="": made.append(number) or tiles(site, number)
    )
    monkeypatch.setattr(
        ViewerFiles, "evidence", lambda site, number: made.append(str(number)) or evidence(site, number)
    )

    def view(*more):
        made.clear()
        given = ["--table", predicted / "phantoms" / "phantoms.csv", "--evidence", predicted / "run" / "best.ckpt"]
        assert run("view", predicted / "predictions", *given, "--static", "--no-browser", "--out", page, *more) == 0
        return capsys.readouterr().out

    first = (page / "tiles" / "5" / "0" / "0_0.png").read_bytes()
    assert "12 images, 12 of them already written; " in view() and not made
    (page / "tiles" / "5.made").unlink()  # as where it was stopped
    (page / "tiles" / "5" / "0" / "0_0.png").write_bytes(b"half")
    assert "12 images, 11 of them already written; " in view() and made == [5]
    assert (page / "tiles" / "5" / "0" / "0_0.png").read_bytes() == first
    image = read_exams(predicted / "predictions")[1].views[1].record.path
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    assert "11 of them already written; " in view() and made == [5, "5"]
    assert "4 images, 4 of them already written; " in view("--most", "1") and not made
    assert sorted(path.name for path in (page / "tiles").iterdir()) == [
        f"{n}{e}" for n in range(4) for e in ("", ".made")
    ]


def test_links_in_the_folder_are_replaced_and_not_written_through(predicted, static, tmp_path):
    page = shutil.copytree(static, tmp_path / "page")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("view.css", "view.js", "index.html"):
        (page / name).unlink()
        (page / name).symlink_to(mine)
    assert run("view", predicted / "predictions", "--static", "--no-browser", "--out", page) == 0
    assert mine.read_text() == "mine" and not (page / "view.css").is_symlink()


def test_evidence_is_of_the_network_that_predicted(predicted, tmp_path, capsys):
    other = tmp_path / "other.ckpt"
    other.write_bytes((predicted / "run" / "last.ckpt").read_bytes() + b"0")
    assert run("view", predicted / "predictions", "--static", "--evidence", other, "--out", tmp_path / "page") == 2
    assert "is not the network of the predictions" in capsys.readouterr().err and not (tmp_path / "page").exists()


def test_a_page_that_cannot_be_written_is_one_line(predicted, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("view", predicted / "predictions", "--static", "--out", tmp_path / "file" / "page") == 2
    error = capsys.readouterr().err
    assert "page: cannot be written (Not a directory); name another --out" in error and error.count("\n") == 1


def test_images_that_are_elsewhere_are_told_with_the_remedy(predicted, tmp_path, monkeypatch, capsys):
    """predict notes paths as it was given them; view is called in another folder."""
    table = tmp_path / "predictions.csv"
    table.write_text("image_path,p_0,p_1\nimages/a.dcm,0.2,0.8\n")
    assert run("view", table, "--static", "--out", tmp_path / "page") == 2
    error = capsys.readouterr().err
    assert "error: images/a.dcm: is not next to the predictions; the file does not exist" in error
    assert "relative to the folder where gigamorph predict ran; run it there" in error and error.count("\n") == 1
    assert not (tmp_path / "page").exists()  # so that the same command serves once the image is there
    (tmp_path / "images").mkdir()
    image = next((predicted / "phantoms" / "images").iterdir())
    (tmp_path / "images" / "a.dcm").write_bytes(image.read_bytes())
    assert run("view", table, "--static", "--out", tmp_path / "page") == 0  # beside the table


def test_the_page_names_nobody_unless_asked(static, predicted, capsys):
    text = (static / "index.html").read_text()
    assert "PHANTOM" not in text and '"P0' not in text and "Exam 1" in text
    data = shown(text)
    errors = [exam["error"] for exam in data["exams"]]
    assert errors == sorted(errors, reverse=True) and len(errors) == 3
    assert all([v["view"] for v in exam["views"]] == ["CC", "CC", "MLO", "MLO"] for exam in data["exams"])
    with_findings = [view for exam in data["exams"] for view in exam["views"] if view["boxes"]]
    assert with_findings and all(view["truth"]["1"] == 1 for view in with_findings)
    out = predicted / "named"
    out.mkdir()
    for name in ("index.html", "view.js", "data.js"):
        (out / name).write_text("")  # of an earlier version, with names
    assert run("view", predicted / "predictions", "--identifiers", "--most", "1", "--static", "--out", out) == 0
    assert "PHANTOM" in (out / "index.html").read_text() and not (out / "data.js").exists()
    assert made_by(out) == "view"  # so that it is left out of a folder of images
    assert (out / "openseadragon.LICENSE.txt").read_text().startswith("Copyright")
    (predicted / "other").mkdir()
    (predicted / "other" / "mine.txt").write_text("")
    assert run("view", predicted / "predictions", "--static", "--out", predicted / "other") == 2
    assert "has other files" in capsys.readouterr().err
    (predicted / "half").mkdir()
    (predicted / "half" / "view.css").write_text("")  # the disk was full
    assert run("view", predicted / "predictions", "--most", "1", "--static", "--out", predicted / "half") == 0
    capsys.readouterr()
    assert run("view", predicted / "run", "--static", "--out", predicted / "none") == 2
    assert "create it with gigamorph predict" in capsys.readouterr().err


PAINTED = "return state.shown.length > 0 && state.shown.every(s => s.viewer.world.getItemCount() && s.canvas)"
VISIBLE = """const c = state.shown[0].canvas, p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
let n = 0; for (let i = 3; i < p.length; i += 4) n += p[i] > 0; return n"""
# Every image is seen whole, with its chest wall in the middle of the page where there is room beside it.
WHOLE = (
    "return state.shown.every(({viewer, view}) => { "
    "const b = viewer.viewport.getBounds(), h = view.height / view.width; return b.y <= 1e-6 && "
    "b.y + b.height >= h - 1e-6 && b.width >= 1 - 1e-6 && "
    "Math.abs(view.side === 'R' ? b.x + b.width - 1 : b.x) < 1e-6; })"
)
LOADED = "return state.shown.every(s => s.viewer.world.getItemAt(0)?.getFullyLoaded())"


@chromium
def test_from_files_keys_and_sliders_do_what_they_say(static, predicted):
    with browser.browser() as page:
        page.open(f"file://{static}/index.html")
        page.wait(PAINTED)
        page.wait(LOADED)
        assert page.run("return document.getElementById('position').textContent") == "1 / 3"
        told = page.run("return document.querySelector('.told').textContent")
        assert re.search(r"p\(1\) = 0\.\d{3}, label [01]", told)
        if folder := os.environ.get("GIGAMORPH_SCREENSHOTS"):
            page.screenshot(Path(folder) / "view.png")
        assert page.run(WHOLE)
        # It stays so where the window becomes a phone's; what was zoomed in keeps its place.
        page.run("state.shown[0].viewer.viewport.zoomTo(5, null, true)")
        page.resize(390, 844)
        page.wait("return state.shown.every(s => s.viewer.viewport.getContainerSize().x < 200)")
        page.wait(WHOLE.replace("state.shown", "state.shown.slice(1)"))
        assert page.run("return state.shown[0].viewer.viewport.getZoom()") > 2
        page.press("0")
        assert page.run(WHOLE)
        page.resize(1200, 900)
        page.wait(WHOLE)
        before = page.run(VISIBLE)
        page.run("threshold.value = 90; threshold.dispatchEvent(new Event('input'))")
        assert page.run(VISIBLE) < before
        page.run("opacity.value = 20; opacity.dispatchEvent(new Event('input'))")
        assert page.run("return state.shown[0].canvas.style.opacity") == "0.2"
        page.press("e")
        assert page.run("return getComputedStyle(state.shown[0].canvas).display") == "none"
        page.press("e")
        page.press("ArrowRight")
        page.wait(PAINTED)
        assert page.run("return document.getElementById('position').textContent") == "2 / 3"
        page.press("ArrowLeft")
        page.press("ArrowLeft")
        assert page.run("return document.getElementById('position').textContent") == "1 / 3"
        # Grey values: darker, inverted, dragged; back to all of them. Overlays keep their colours.
        grey = "return [state.grey, state.shown[0].viewer.drawer.canvas.style.filter]"
        assert page.run(grey) == [{"centre": 0.5, "width": 1, "invert": False}, "none"]
        page.press("ArrowUp")
        page.press("i")
        assert page.run(grey) == [{"centre": 0.45, "width": 1, "invert": True}, 'url("#grey")']
        curve = "const f = document.querySelector('#grey feFuncR'); return [f.slope.baseVal, f.intercept.baseVal]"
        assert page.run(curve) == pytest.approx([-1, 0.95])
        drag = "state.shown[0].viewer.element.dispatchEvent(new PointerEvent('pointer{}', {{button: 2, clientX: {}}}))"
        page.run("Element.prototype.setPointerCapture = () => {}")
        for what, x in (("down", 0), ("move", 100), ("up", 100), ("move", 300)):
            page.run(drag.format(what, x))
        assert page.run(grey)[0]["width"] == pytest.approx(math.exp(-0.5))
        page.press("0")
        assert page.run(grey)[1] == "none" and not page.run("return invert.checked")
        # A bar of round length, in the pixels of the screen.
        said = page.run("return [...document.querySelectorAll('.scale')].map(s => [s.textContent, s.clientWidth])")
        length = page.run(
            "return state.shown.map(s => s.viewer.viewport.viewportToImageZoom(s.viewer.viewport.getZoom()))"
        )
        for (text, width), zoom, view in zip(
            said, length, page.run("return state.shown.map(s => s.view)"), strict=True
        ):
            assert re.fullmatch("([125]0*|0.[125]) mm", text)
            assert width == pytest.approx(float(text.removesuffix(" mm")) / view["mm"] * zoom, abs=2)
        # An exam by its name, or by the link to it.
        page.run("exam.value = 'Exam 3'; exam.dispatchEvent(new Event('change'))")
        found = "const {textContent, hash} = byId('name'); return [textContent.split(',')[0], hash]"
        assert page.run(found) == ["Exam 3", "#3"]
        page.run("exam.value = 'Exam 9'; exam.dispatchEvent(new Event('change'))")
        assert page.run("return [exam.placeholder, byId('name').hash]") == ["no Exam 9", "#3"]
        page.run("location.hash = '#1'")
        page.wait("return byId('name').textContent.startsWith('Exam 1')")
        page.wait(PAINTED)
        # The truth by the names of classes; a label is there or not.
        say = "return predictionLines({}).map((line) => line.textContent)"
        both = "{predicted: {benign: 0.3, malignant: 0.7}, truth: {benign: 1, malignant: 0}}"
        assert page.run(say.format(both)) == ["p(malignant) = 0.700, label benign"]
        labels = "{predicted: {mass: 0.3, cluster: 0.2}, truth: {mass: 1, cluster: 0}}"
        assert page.run(say.format(labels)) == ["p(mass) = 0.300, label yes", "p(cluster) = 0.200, label no"]
        # To the image's own pixels, a findings' box where it is in the file.
        page.run("order.value = 'score'; order.dispatchEvent(new Event('change'))")
        page.wait(PAINTED)
        page.run("const v = state.shown[0].viewer.viewport; v.zoomTo(v.imageToViewportZoom(1), null, true)")
        page.wait(LOADED)
        page.wait(
            "const s = state.shown[0]; return s.viewer.world.getItemAt(0).getTilesToDraw()"
            ".some(t => t.level === s.view.levels)"
        )
        boxes = page.run("return document.querySelectorAll('.box').length")
        assert boxes == sum(len(s["boxes"]) for s in page.run("return state.shown.map(s => s.view)"))
        # Of two images of one side and view both are seen.
        page.run("const {views} = DATA.exams[state.order[state.at]]; views.unshift({...views[0]}); show()")
        where = "const {x, y} = cell.getBoundingClientRect(); return `${x} ${y}`;"
        places = page.run(f"return [...document.querySelectorAll('.view')].map(cell => {{ {where} }})")
        assert len(places) == len(set(places)) == 5
        assert page.errors() == []


@chromium
def test_from_the_server_tiles_are_made_when_they_are_looked_at(predicted):
    exams = read_exams(predicted / "predictions", table=predicted / "phantoms" / "phantoms.csv", split="test")
    with served(ViewerFiles(exams, None, identifiers=False)) as address, browser.browser() as page:
        with urlopen(f"{address}tiles/0/0/0_0.png") as answer:
            assert answer.read().startswith(b"\x89PNG")
        for place in ("tiles/0/0/9_0.png", "tiles/99/0/0_0.png", "../run/best.ckpt", "evidence/0.png"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(address + place)
        page.open(address)
        page.wait(LOADED.replace("return ", "return state.shown.length > 0 && "))
        assert page.run("return getComputedStyle(document.querySelector('.evidence')).display") == "none"
        assert page.errors() == []


@chromium
def test_evidence_from_the_server_is_that_of_the_files(static, predicted):
    exams = read_exams(predicted / "predictions", table=predicted / "phantoms" / "phantoms.csv")
    maps = MapServer(predicted / "run" / "best.ckpt", memory_budget=None, device="cpu")
    painted = "const {values} = state.maps.get(0); return [values.length, ...values]"
    with served(ViewerFiles(exams, maps, identifiers=False)) as address, browser.browser() as page:
        found = []
        for place in (address, f"file://{static}/index.html"):
            page.open(place)
            page.wait(PAINTED)
            found.append(page.run(painted))
            assert page.errors() == []
            if place == address:
                page.reload()
                page.wait(PAINTED)
    assert found[0] == found[1] and found[0][0] > 1000 and max(found[0][1:]) > 0


@contextlib.contextmanager
def served(site):
    with PageServer(site, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.address
        finally:
            server.shutdown()


NAMES = "index.html data.js data.json view.js view.css evidence/0.js evidence/0.png tiles/0/0/0_0.png".split()


@chromium
def test_a_page_of_another_origin_reads_nothing(static, predicted):
    """Of the same site, which is this host at any port, and of another; without the token and with it.

    The same page reads files of its own origin in all its ways.
    """
    given = ["--table", predicted / "phantoms" / "phantoms.csv", "--evidence", predicted / "run" / "best.ckpt"]
    viewer = forked("view", predicted / "predictions", *given, "--no-browser", "--identifiers")
    with contextlib.ExitStack() as stack:
        stack.callback(viewer.end)
        port, page = (stack.enter_context(entered) for entered in (hostile(static), browser.browser()))
        address = printed_address(viewer)
        root = re.match(r"http://[^/]+/", address)[0]

        def reads(base, names):
            page.run(f"begin('{base}', ['', ...{names}])")
            (read,) = page.wait("return read && [read]")
            return read

        for host in ("127.0.0.1", "localhost"):
            page.open(f"http://{host}:{port}/")
            assert (reads(address, NAMES), reads(root, NAMES)) == ({}, {})
            page.errors()
        own = reads("/own/", ["view.js", "view.css", "tiles/0/0/0_0.png"])
        assert {name.split(" ")[0] for name in own} == set(page.run("return Object.keys(WAYS)"))
        page.errors()
        page.open(address)  # the user himself
        page.wait(PAINTED)
        assert re.match("P[0-2] ", page.run("return document.getElementById('name').textContent"))
        assert page.errors() == []


def printed_address(viewer):
    while "\n" not in viewer.output:
        assert viewer.poll() is None, viewer.error
        time.sleep(0.02)
    return re.search(r"http://127\.0\.0\.1:\d+/\S*", viewer.output)[0]


def test_ctrl_c_while_tiles_are_written_tells_how_far_they_are(predicted, tmp_path, monkeypatch, capsys):
    def pressed(site, number, which):
        if number == 2:
            raise KeyboardInterrupt
        return tiles(site, number, which)

    tiles = ViewerFiles.tiles_of
    monkeypatch.setattr(ViewerFiles, "tiles_of", pressed)
    assert run("view", predicted / "predictions", "--static", "--out", tmp_path) == 130
    told = f"stopped; {tmp_path / 'index.html'} shows 2 of 12 images, and the same command continues"
    assert capsys.readouterr().err.splitlines()[-1] == told


def test_the_command_serves_until_ctrl_c(predicted, tmp_path, capsys):
    """A process of its own, as at a shell: it says where the page is, and ends with nothing but that said."""
    process = forked("view", predicted / "predictions", "--no-browser")
    # An answer and the end take a second of computing; on a machine that others use as well that may be minutes.
    long = 600
    try:
        address, told = printed_address(process), process.output
        assert told.startswith("3 exams, 12 images; ") and "Ctrl-C stops it" in told
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{43}/", address)
        assert not (predicted / "predictions" / "view").exists()
        for place, begin in (("", b"<!doctype html>"), ("tiles/0/0/0_0.png", b"\x89PNG")):
            with urlopen(address + place, timeout=long) as answer:
                assert answer.read().startswith(begin)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(long) == 0
        assert (process.output, process.error) == (told, "")
    finally:
        process.end()
    assert run("view", predicted / "predictions", "--no-browser", "--out", tmp_path) == 2
    assert "--out needs --static" in capsys.readouterr().err
