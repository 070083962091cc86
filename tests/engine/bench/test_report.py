"""The page says what the results say, with machine and versions, in one file."""

import itertools
import re
from dataclasses import replace

import pytest
from bench_results import everything, gpu_file

from gigamorph.engine.bench import plots
from gigamorph.engine.bench.report import write_report
from gigamorph.engine.bench.results import EQUAL_MEMORY, OK, OUT_OF_MEMORY, REFUSED, BenchTask, Check, Results, StepRow
from gigamorph.engine.errors import GigamorphError


def comparison() -> Results:
    """Stock runs out at 9 megapixels under a cap of 4 GB, gigamorph does not."""
    rows = []
    for side, stock, ours in ((1000, 1e9, 0.5e9), (2000, 3e9, 0.6e9), (3000, None, 0.8e9)):
        task = BenchTask("resnet18", (1, 3, side, side))
        if stock is None:
            rows.append(StepRow(task, "stock", OUT_OF_MEMORY, "killed", cap_bytes=4 * 10**9))
        else:
            rows.append(
                StepRow(
                    task,
                    "stock",
                    OK,
                    seconds=[side / 500] * 3,
                    peak_bytes=int(stock),
                    cap_bytes=4 * 10**9,
                    roofline_seconds=1.0,
                )
            )
        check = Check("stock", 1e-7, 3e-5) if stock else None
        rows.append(
            StepRow(
                task,
                "gigamorph",
                OK,
                seconds=[side / 1000] * 3,
                peak_bytes=int(ours),
                check=check,
                cap_bytes=4 * 10**9,
                predicted_bytes=int(ours),
                roofline_seconds=1.0,
            )
        )
    rows.append(StepRow(BenchTask("resnet18", (1, 3, 1000, 1000)), "lightstream", REFUSED, "no tile | <here>"))
    machine = {
        "torch": "2.13.0",
        "cpu": "Some CPU",
        "threads": 2,
        "commit": "0123456789abcdef",
        "date": "2026-11-20T10:00:00",
    }
    return Results("gigamorph bench step --size 1000x1000", machine, {"gb_per_s": 20.0}, steps=rows)


@pytest.fixture
def page(tmp_path):
    comparison().write(tmp_path / "a.json")
    everything().write(tmp_path / "b.json")
    path = write_report([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "out")
    return path.read_text(), (tmp_path / "out" / "report.md").read_text(), tmp_path / "out"


def test_the_page_needs_nothing_else(page):
    text, _, folder = page
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text
    assert text.count("data:image/png;base64,") == len(list(folder.glob("*.png"))) >= 4


def test_the_page_names_sizes_failures_machine_and_versions(page):
    for text in page[:2]:
        for word in (
            "out of memory",
            "refused",
            "killed",
            "Some CPU",
            "2.13.0",
            "0123456789ab",
            "2026-11-20",
            "gigamorph bench step --size 1000x1000",
            "not run",
            "no GPU",
            "3000 × 3000",
        ):
            assert word in text, word
    assert "2 times as fast as stock PyTorch and takes 0.2 times its memory" in page[1]


def test_what_lightstream_cannot_do_in_gigamorphs_memory_is_said(tmp_path):
    made = comparison()
    task = BenchTask("resnet18", (1, 3, 2000, 2000))
    made.steps.append(StepRow(task, EQUAL_MEMORY, OUT_OF_MEMORY, "no tile", cap_bytes=600_000_000))
    made.write(tmp_path / "a.json")
    text = write_report([tmp_path / "a.json"], tmp_path / "out").with_suffix(".md").read_text()
    assert "With gigamorph's memory, lightstream cannot run at 2000 × 2000." in text


def test_the_headline_compares_with_what_kept_to_the_cap(tmp_path):
    made = comparison()
    stock = next(row for row in made.steps if row.peer == "stock" and row.status == OUT_OF_MEMORY)
    stock.seconds, stock.peak_bytes = [9.0], 5 * 10**9  # a step that ended, but took more than it may
    made.write(tmp_path / "a.json")
    text = write_report([tmp_path / "a.json"], tmp_path / "out").with_suffix(".md").read_text()
    assert "At 2000 × 2000 gigamorph is 2 times as fast as stock PyTorch" in text and "At 3000" not in text


def test_what_is_nearly_as_fast_is_not_told_as_equal_nor_no_difference_as_a_power(tmp_path):
    made = comparison()
    for row in made.steps:
        if row.peer == "gigamorph" and row.seconds:
            row.seconds = [0.97 * seconds * 2 for seconds in row.seconds]
        if row.check is not None:
            row.check = replace(row.check, outputs=0.0, gradients=0.0)
    made.write(tmp_path / "a.json")
    text = write_report([tmp_path / "a.json"], tmp_path / "out").with_suffix(".md").read_text()
    assert "gigamorph is 1.03 times as fast as stock PyTorch" in text and "0e+00" not in text


def test_the_headline_is_of_the_fullest_run(tmp_path):
    """Not of a later one that has a small size or two."""
    full, small = comparison(), comparison()
    small.steps = [row for row in small.steps if row.task.image[2] == 1000]
    full.write(tmp_path / "a.json")
    small.write(tmp_path / "b.json")
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    text = write_report(paths, tmp_path / "out").with_suffix(".md").read_text()
    assert "At 2000 × 2000 gigamorph is" in text and "At 1000" not in text


def test_exactness_names_the_peer_and_says_gigamorphs_largest_error_once(tmp_path):
    made = comparison()
    task = BenchTask("resnet18", (1, 3, 113, 97), batch_norm="live", precision="fp64")
    for peer, error in (("checkpoint", 0.5), ("gigamorph", 1e-15), ("gigamorph", 4e-14)):
        made.steps.append(StepRow(task, peer, check=Check("stock", error, error), settings={"tile": [64, 64]}))
    made.write(tmp_path / "a.json")
    text = write_report([tmp_path / "a.json"], tmp_path / "out").with_suffix(".md").read_text()
    assert text.count("In float64 its gradients differ from stock's by 4e-14 at most.") == 1 and "by 5e-01" not in text
    assert "| resnet18 | training | 113 × 97 | live | checkpoint per block | tile 64 × 64 | 5e-01 |" in text


def test_markdown_tables_have_equal_rows(page):
    rows = [line for line in page[1].splitlines() if line.startswith("|")]
    assert rows and "no tile \\| &lt;here>" in page[1]
    widths = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    tables = re.split(r"\n(?!\|)", page[1])
    for table in tables:
        found = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines() if row.startswith("|")}
        assert len(found) <= 1
    assert widths


def test_every_picture_in_the_markdown_exists(page):
    _, text, folder = page
    named = re.findall(r"\]\(([^)]+)\)", text)
    assert named and all((folder / name).is_file() for name in named)


def test_the_same_results_give_the_same_files(page, tmp_path):
    again = write_report([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "again").parent
    for path in page[2].iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_stock_ends_in_a_marked_point():
    figure = plots.memory_figure(comparison().steps, "title")
    (axes,) = figure.axes
    said = [text.get_text() for text in axes.texts]
    assert "stock PyTorch: out of memory" in said and any(text.startswith("gigamorph, ") for text in said)
    cross = next(line for line in axes.lines if line.get_marker() == "x")
    assert list(cross.get_xdata()) == [9.0] and list(cross.get_ydata()) == [4.0]
    assert "GB" in axes.get_ylabel() and "megapixels" in axes.get_xlabel()
    assert axes.get_legend() is None


def test_what_exceeded_the_cap_has_no_bar():
    made = comparison()
    stock = next(row for row in made.steps if row.peer == "stock" and row.status == OUT_OF_MEMORY)
    stock.seconds, stock.roofline_seconds = [9.0], 3.0
    (axes,) = plots.roofline_figure(made.steps, "title").axes
    assert axes.get_title(loc="left") == "title, 4 megapixels" and len(axes.patches) == 2


def test_names_do_not_touch():
    figure = plots.memory_figure(comparison().steps, "title")
    (axes,) = figure.axes
    ends = sorted(text.xyann[1] for text in axes.texts if hasattr(text, "xyann"))
    gaps = [b - a for a, b in itertools.pairwise(ends)]
    assert min(gaps) >= 0.05 * axes.get_ylim()[1]


def test_results_of_the_gpu_script_are_drawn(tmp_path):
    import json

    (tmp_path / "gpu.json").write_text(json.dumps(gpu_file()))
    text = write_report([tmp_path / "gpu.json"], tmp_path / "out").with_suffix(".md").read_text()
    assert "some GPU" in text and "Kernels" in text and "3x3 forward" in text and "tried to allocate" in text


def test_nothing_to_show_is_an_error(tmp_path):
    Results("nothing", {}).write(tmp_path / "empty.json")
    with pytest.raises(GigamorphError, match="no rows"):
        write_report([tmp_path / "empty.json"], tmp_path / "out")


def test_of_one_size_there_is_a_bar_for_each_peer():
    task = BenchTask("resnet18", (1, 1, 512, 384))
    rows = [
        StepRow(task, "stock", seconds=[2.0], peak_bytes=4 * 10**9),
        StepRow(task, "compile", status="out of memory"),
        StepRow(task, "checkpoint", status="not run"),
        StepRow(task, "gigamorph", seconds=[1.0], peak_bytes=10**9),
    ]
    for make, lengths, unit in (
        (plots.memory_figure, [0, 1, 4], "GB"),
        (plots.throughput_figure, [0, 0.1, 0.2], "Mpx/s"),
    ):
        (axes,) = make(rows, "title").axes
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(lengths, abs=0.01)
        assert any("512 × 384 pixels" in text for text in (axes.get_title(), axes.get_title("left")))
        texts = [text.get_text().strip() for text in axes.texts]
        assert texts[0] == "out of memory" and all(text.endswith(unit) for text in texts[1:])


def test_large_numbers_stand_there_as_they_are():
    task = BenchTask("resnet18", (1, 1, 1000, 1000))
    rows = [StepRow(task, peer, seconds=[seconds]) for peer, seconds in (("stock", 0.5), ("gigamorph", 0.002))]
    (axes,) = plots.throughput_figure(rows, "title").axes
    assert [text.get_text().strip() for text in axes.texts] == ["2 Mpx/s", "500 Mpx/s"]
