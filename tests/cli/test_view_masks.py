"""`gigamorph view` of predicted masks: areas and outlines over the images, looked at in headless Chromium."""

import os
from pathlib import Path

import browser
import pytest
from commands import run
from predicted_masks import write_predicted
from viewed import shown


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view_masks")
    table, predictions = write_predicted(folder)
    assert run("view", predictions, "--table", table, "--static", "--no-browser", "--out", folder / "page") == 0
    return folder / "page"


def test_the_page_has_masks_beside_its_images(static):
    data = shown((static / "index.html").read_text())
    assert list(data["classes"]) == ["mass", "cyst"] and len(set(data["classes"].values())) == 2
    views = [view for exam in data["exams"] for view in exam["views"]]
    for view in views:
        assert view["masks"] == ["predicted", "reference"]
        for which in view["masks"]:
            names = {
                path.relative_to(static / "masks" / str(view["number"]) / which)
                for path in static.glob(f"masks/{view['number']}/{which}/*/*.png")
            }
            assert names == {
                path.relative_to(static / "tiles" / str(view["number"]))
                for path in static.glob(f"tiles/{view['number']}/*/*.png")
            }
    assert [bool(view["dice"]) for view in views].count(False) == 1


READY = """return state.shown.length > 0 && state.shown.every(s => s.viewer.world.getItemCount() === 3 &&
[0, 1, 2].every(i => s.viewer.world.getItemAt(i).getFullyLoaded()))"""
OPACITIES = "return state.shown.map(s => [s.masks.predicted.getOpacity(), s.masks.reference.getOpacity()])"


@pytest.mark.skipif(not browser.there(), reason="no chromium and chromedriver")
def test_keys_and_slider_show_and_hide_masks(static):
    with browser.browser() as page:
        page.open(f"file://{static}/index.html")
        page.wait(READY)
        if folder := os.environ.get("GIGAMORPH_SCREENSHOTS"):
            page.screenshot(Path(folder) / "view_masks.png")
        assert page.run(OPACITIES) == [[0.6, 1]] * 2
        page.press("m")
        assert page.run(OPACITIES) == [[0, 1]] * 2
        page.press("r")
        assert page.run(OPACITIES) == [[0, 0]] * 2
        page.press("m")
        page.run("opacity.value = 30; opacity.dispatchEvent(new Event('input'))")
        assert page.run(OPACITIES) == [[0.3, 0]] * 2
        shown = "return ['predicted', 'evidence'].map(id => getComputedStyle(byId(id).parentNode).display)"
        assert page.run(shown) == ["flex", "none"]
        text = page.run("return document.querySelector('.told').textContent")
        assert "mass: " in text and "% of the image, Dice 0." in text
        page.press("r")  # what is hidden is not loaded
        page.press("ArrowRight")
        page.wait(READY)
        assert page.run(OPACITIES) == [[0.3, 1]] * 2
        assert page.errors() == []
