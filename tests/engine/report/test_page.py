"""A page holds all that it shows, and what comes from users' files is text in it, whatever it says."""

import json

import browser
import numpy as np
import pytest
from bench_results import everything
from jinja2 import UndefinedError
from matplotlib.text import Text

from gigamorph.engine.bench.report import write_report as write_bench
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.evaluate.evaluate import Settings, evaluate
from gigamorph.engine.evaluate.report import write_report as write_evaluation
from gigamorph.engine.report.figure import panel, png
from gigamorph.engine.report.page import TextTable, render, write_page

BAD = "<img src=x onerror=alert(1)>\"'&"
ESCAPED = "&lt;img src=x onerror=alert(1)&gt;&#34;&#39;&amp;"


def test_a_table_omits_empty_columns_and_tells_words_from_numbers():
    rows = [{"peer": "stock", "time": "1.5 (9%)", "first": "", "remark": "tile 64"}] * 2
    table = TextTable.of([*rows, {"peer": "7", "time": "never", "first": "", "remark": ""}])
    assert table.head == ["peer", "time", "remark"] and table.rows[2] == ["7", "never", ""]
    assert table.styles == ["words", "number", "words"]
    assert TextTable(["", "a"], [["x" * 20, "y" * 50]]).styles == ["words broad", "words wide"]
    assert TextTable(["", "a"], [["x", "0.5"], ["y", "above all scores"]]).styles == ["words", "number"]
    commits = TextTable(["", "commit"], [["1", "9528d9e984a3"], ["2", "270409fa7f07, with changes"]])
    assert commits.styles == ["words", "words broad"]
    assert TextTable.of([]).rows == []


def test_pictures_lie_in_the_page_and_beside_it(tmp_path):
    content = {"intro": "", "sections": []}
    page = write_page(tmp_path / "new" / "page.html", "bench.html", {"one": b"\x89PNG"}, **content)
    assert (tmp_path / "new" / "one.png").read_bytes() == b"\x89PNG" and page.read_text().startswith("<!doctype html>")
    (tmp_path / "file").touch()
    with pytest.raises(GigamorphError, match="cannot be written"):
        write_page(tmp_path / "file" / "page.html", "bench.html", {}, **content)


def test_a_template_with_nothing_to_show_is_an_error():
    with pytest.raises(UndefinedError):
        render("bench.html", sections=[])


def test_what_results_of_benchmarks_say_is_text(tmp_path):
    made = everything()
    made.what, made.steps[1].reason, made.kernels[0].op = BAD, BAD, BAD
    made.write(tmp_path / "a.json")
    text = write_bench([tmp_path / "a.json"], tmp_path / "out").read_text()
    assert BAD not in text and text.count(ESCAPED) == 3


def test_what_predictions_and_tables_say_is_text(tmp_path):
    random = np.random.default_rng(0)
    names = tuple(map(str, range(40)))
    cases = Cases(
        outputs=(BAD,),
        truth=(random.random((40, 1)) < 0.5).astype(float),
        scores=random.normal(size=(40, 1)),
        names=names,
        patients=names,
        exams=names,
        sides=("L",) * 40,
        columns={BAD: (BAD,) * 40},
    )
    found = evaluate(cases, Settings(by=(BAD,), resamples=5))
    noted = found | {"predictions": BAD, "date": "2026-11-21", "predictions_sha256": "0123456789abcdef" * 4}
    page = write_evaluation(tmp_path, cases, noted)
    text = page.read_text()
    assert "<img src=x" not in text and text.count(ESCAPED) > 8 and "2026-11-21" in text
    assert json.loads((tmp_path / "metrics.json").read_text())["outputs"] == [BAD]
    if browser.there():
        with browser.browser() as window:
            window.resize(390, 800)  # a phone: only tables may be wider than it
            window.open(page.as_uri())
            assert window.run("return document.documentElement.scrollWidth") <= 390 and window.errors() == []


@pytest.mark.parametrize("name", ["$x_{", "$\\frac$", "\\$5", "US$ or A$"])
def test_names_are_text_in_figures(name):
    """To matplotlib what is between two dollars is a formula, and a faulty one an error."""
    figure, axes = panel(4, 3, f"{name} $")
    axes.plot([1, 1000], [0, 1], label=f"{name} $")
    axes.set(xscale="log", xlabel=f"{name} $")
    axes.set_yticks([0, 1], [f"{name} $", "b"])
    axes.legend()
    assert png(figure)[:4] == b"\x89PNG"
    shown = {text.get_text() for text in figure.findobj(Text) if text.get_parse_math()}
    assert "$\\mathdefault{10^{2}}$" in shown and f"{name} $" not in shown
