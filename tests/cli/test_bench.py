import functools
import json

import commands
import pytest
import torch
from bench_results import everything

from gigamorph.engine.bench import limit, process, step
from gigamorph.engine.bench.read import read
from gigamorph.engine.bench.results import OK, LimitRow, StepRow, Try

run = functools.partial(commands.run, "bench")


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch):
    monkeypatch.setattr(process.Child, "__init__", lambda self, longest=0: None)
    monkeypatch.setattr(process.Child, "__exit__", lambda self, *error: None)
    monkeypatch.setattr(process.Child, "ask", lambda self, do, device: {"status": "ok", "gb_per_s": 20.0})


def test_step_measures_every_model_and_size_and_keeps_them(monkeypatch, tmp_path, capsys):
    given = []

    def measure(task, options, ceilings, say, say_first):
        given.append((task, options, ceilings))
        row = StepRow(task, "stock", seconds=[2.0], peak_bytes=10**9)
        say(row)
        return [row]

    monkeypatch.setattr(step, "measure", measure)
    path = tmp_path / "steps.json"
    monkeypatch.setattr("sys.argv", ["gigamorph", "bench", "step", "--model", "a", "--json", str(path)])
    code = run(
        "step",
        "--model",
        "a",
        "--model",
        "b",
        "--size",
        "100x200",
        "--size",
        "300x300",
        "--peer",
        "stock",
        "--cap",
        "1GiB",
        "--inference",
        "--json",
        str(path),
    )
    assert code == 0
    assert [(task.model, task.image) for task, *_ in given] == [
        ("a", (1, 1, 100, 200)),
        ("a", (1, 1, 300, 300)),
        ("b", (1, 1, 100, 200)),
        ("b", (1, 1, 300, 300)),
    ]
    task, options, ceilings = given[0]
    assert not task.training and options.cap == 2**30 and options.peers == ("stock",) and ceilings == {"gb_per_s": 20.0}
    found = read(path)
    assert len(found.steps) == 4 and str(tmp_path) not in json.dumps(found.what)
    out = capsys.readouterr().out
    assert "a inference 100 x 200" in out and "1.00 GB" in out


def test_front_compares_with_the_best_way_of_stock_and_draws(monkeypatch, tmp_path, capsys):
    def measure(task, options, ceilings, say, say_first):
        seconds = {"stock": 4.0, "folded": 2.0, "gigamorph": 1.5, "gigamorph, 0.5 of stock": 3.0}
        sizes = {"stock": 4, "folded": 3, "gigamorph": 3, "gigamorph, 0.5 of stock": 2}
        assert set(seconds) < set(options.peers) and options.rounds == 2
        rows = [StepRow(task, peer, seconds=[seconds[peer]], peak_bytes=sizes[peer] * 10**9) for peer in seconds]
        for row in rows:
            row.first_seconds = 9.0
            say_first(row)
            say(row)
        return rows

    monkeypatch.setattr(step, "measure", measure)
    plot = tmp_path / "front.png"
    options = ["--model", "a", "--size", "100x200", "--rounds", "2", "--json", str(tmp_path / "front.json")]
    assert run("front", *options, "--plot", str(plot)) == 0
    shown = capsys.readouterr()
    assert "best way of stock: folded 2.00 s, gigamorph 1.50 s: 0.75 times its time" in shown.out
    assert "no way of stock; eager stock 4.00 s, gigamorph, 0.5 of stock 3.00 s: 0.75 times its time" in shown.out
    assert "  folded: first step 9.0 s" in shown.err
    assert plot.read_bytes().startswith(b"\x89PNG") and len(read(tmp_path / "front.json").steps) == 4
    assert run("front", *options, "--size", "300x300", "--plot", str(plot)) == 2


def test_infer_compares_predictions_with_the_runtimes(monkeypatch, tmp_path):
    given = []

    def measure(task, options, ceilings, say, say_first):
        given.append((task, options))
        return [StepRow(task, "onnxruntime", seconds=[2.0], cpu_seconds=[3.0], peak_bytes=10**9)]

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "exactness", lambda task: [StepRow(task, "gigamorph")])
    path = tmp_path / "infer.json"
    assert run("infer", "--model", "a", "--size", "100x200", "--peer", "onnxruntime", "--json", str(path)) == 0
    assert run("infer", "--model", "a", "--size", "100x200") == 0
    assert run("infer", "--model", "a", "--size", "100x200", "--peer", "onyx") == 2
    ((task, options), *_, (_, default)) = given
    assert not task.training and options.peers == ("onnxruntime",)
    assert default.peers == ("stock", "compile", "onnxruntime", "openvino", "gigamorph")
    assert read(path).steps[0].cpu_seconds == [3.0]


def test_limit_prints_what_was_found(monkeypatch, tmp_path, capsys):
    def find(task, peer, search, say):
        say(Try(64, OK, 9, 1.0))
        return LimitRow(task, peer, search.cap, side=64, predicted_side=96)

    monkeypatch.setattr(limit, "find", find)
    assert run("limit", "--memory-budget", "2GiB", "--peer", "stock", "--json", str(tmp_path / "l.json")) == 0
    assert read(tmp_path / "l.json").limits[0].cap_bytes == 2**31
    assert "largest 64 x 64, plan() predicts 96" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "code"), [(OK, 0), ("out of memory", 0), ("not run", 0), ("wrong", 1), ("failed", 1)]
)
def test_the_exit_code_says_whether_something_failed(monkeypatch, tmp_path, status, code):
    """All others are measured and kept first."""

    def measure(task, *_):
        return [StepRow(task, "stock", status=status), StepRow(task, "gigamorph")]

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(limit, "find", lambda task, peer, search, say: LimitRow(task, peer, search.cap, status=status))
    path = tmp_path / "kept.json"
    sizes = ("--size", "64x64", "--size", "96x96")
    assert run("step", *sizes, "--peer", "stock", "--json", str(path)) == code
    assert len(read(path).steps) == 4
    assert run("limit", "--memory-budget", "2GiB", "--peer", "stock", "--json", str(path)) == code


def test_report_names_the_page(tmp_path, capsys):
    everything().write(tmp_path / "a.json")
    assert run("report", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert run("report", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")) == 2
    assert "not results of gigamorph bench" in capsys.readouterr().err
    assert run("step", "--size", "100x100", "--peer", "nobody") == 2
    assert "choose from stock, channels-last" in capsys.readouterr().err
    assert run("step", "--size", "100") == 2 and "height x width" in capsys.readouterr().err


def test_a_network_that_does_not_take_the_images_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colour_nets.py").write_text(
        "from torch import nn\n"
        "def colour(num_classes=2):\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))\n"
    )
    assert run("step", "--model", "colour_nets:colour", "--size", "64x48", "--peer", "stock") == 2
    error = capsys.readouterr().err
    assert "its first convolution takes 3 channels, use images with as many (--channels)" in error
    assert error.startswith("error: model 'colour_nets:colour' cannot take an image of 1 x ") and error.count("\n") == 1


@pytest.mark.parametrize("given", [("step", "--size", "9x9"), ("limit", "--memory-budget", "1MiB")])
def test_where_no_results_can_be_written_is_told_before_they_are_measured(given, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(process.Child, "ask", lambda self, do, device: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert run(*given, "--json", tmp_path / "file" / "out.json") == 2
    assert "out.json: the file cannot be written: Not a directory; choose a writable folder" in capsys.readouterr().err


def test_results_go_to_a_folder_that_is_not_there_yet(tmp_path):
    everything().write(tmp_path / "new" / "a.json")
    assert read(tmp_path / "new" / "a.json").steps == everything().steps
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "given", [("step", "--size", "9x9", "--box"), ("limit", "--memory-budget", "1MiB", "--longest")]
)
def test_no_time_is_no_time_to_measure_in(given, capsys):
    assert run(*given, "-1") == 2
    assert "-1.0 is not in the range x>0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_kernels_need_a_gpu(capsys):
    assert run("kernels") == 2
    assert "needs a GPU" in capsys.readouterr().err
