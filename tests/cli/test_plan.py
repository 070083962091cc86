import functools
import json
import re
from io import StringIO

import commands
import pytest
from rich.console import Console

from gigamorph.cli.main import main

run = functools.partial(commands.run, "plan")

MODEL = "tiny_nets:wide"
NET = ["--model", MODEL, "--size", "2048x1536"]


@pytest.fixture
def table():
    """For tests that look at the table of budgets."""


@pytest.fixture(autouse=True)
def rates(request, monkeypatch, named_rates):
    """The table of budgets is made for the tests that look at it."""
    if "table" not in request.fixturenames:
        monkeypatch.setattr("gigamorph.cli.plan._compared", lambda *args: [])


def test_plan_prints_tile_and_memory_of_the_step_that_training_takes(capsys):
    import torch

    from gigamorph import accelerate
    from gigamorph.engine.models import create_model

    assert run(*NET, "--batch-norm", "frozen", "--memory-budget", "1GiB") == 0
    out, err = capsys.readouterr()
    net = accelerate(create_model(MODEL), memory_budget="1GiB", batch_norm="frozen")
    with torch.enable_grad():
        assert out.startswith(str(net.plan_for((1, 1, 2048, 1536))))
    assert re.search(r"stock PyTorch +\S+ MiB of tensors alone \(\S+ times this\)", out) and err == ""


def test_live_batch_norm_takes_several_stages(capsys):
    assert run(*NET, "--memory-budget", "1GiB") == 0
    out, err = capsys.readouterr()
    assert "training, two passes" in out and "stages" in out and not err


def test_inference_takes_less_and_needs_no_frozen_statistics(capsys):
    def peak(budget, *more):
        assert run(*NET, "--memory-budget", f"{budget}MiB", *more) == 0
        out, err = capsys.readouterr()
        return float(re.search(r"predicted peak +([\d.]+) MiB", out)[1]), err

    more, _ = peak(500, "--batch-norm", "frozen")
    less, err = peak(int(0.6 * more), "--inference")
    assert less < 0.6 * more and err == ""


def test_mixed_precision_halves_a_tile(capsys):
    def tile(precision):
        assert run(*NET, "--batch-norm", "frozen", "--precision", precision, "--memory-budget", "100MiB") == 0
        return float(re.search(r"one tile +([\d.]+) MiB", capsys.readouterr().out)[1])

    assert tile("bf16") < 0.75 * tile("fp32")


def test_a_terminal_gets_bars_on_one_scale():
    import torch

    from gigamorph import plan
    from gigamorph.cli.table import show_plan

    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
    made = plan(net, (1, 1024, 1024), "12MiB", tile=64)
    console = Console(file=StringIO(), force_terminal=True, width=100, highlight=False)
    show_plan(made, "net", console)
    lines = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
    bars = {line.split("  ")[0]: line.count("█") for line in lines}
    assert max(bars.values()) == next(n for name, n in bars.items() if name.startswith("stock PyTorch")) == 32
    assert bars["budget (kept)"] == round(32 * 12 * 2**20 / made.stock_bytes)
    assert lines[0] == "a training step of net on 1024 x 1024 pixels (1.0 Mpx)"


def test_bars_are_of_one_moment():
    """The most whole maps, strips and tile are of different stages; what is shown adds up to the peak."""
    from gigamorph import create_model, plan
    from gigamorph.cli.table import show_plan
    from gigamorph.engine.tiling.memory import format_bytes

    made = plan(create_model("resnet18", num_classes=2, in_channels=1), (1, 1024, 768), "310MiB")
    assert made.apart_bytes and made.retained and made.halos == "device"
    console = Console(file=StringIO(), force_terminal=True, width=100, highlight=False)
    show_plan(made, "net", console)
    shown = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
    parts, sums = shown.split("at the moment of the peak:\n")[1].split("predicted peak")
    sizes = re.findall(r" ([\d.]+) ([KMG])iB ", parts)
    total = sum(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit] for number, unit in sizes)
    assert "whole maps" in parts and "libraries" in parts
    assert (
        total == pytest.approx(made.peak_bytes, rel=5e-3) and sums.split()[:2] == format_bytes(made.peak_bytes).split()
    )


def test_images_of_any_number_of_channels(tmp_path, monkeypatch, capsys):
    """As many as a network of one's own takes; files of images have one or three."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "band_nets.py").write_text(
        "from torch import nn\n"
        "def bands(num_classes=2, in_channels=5):\n"
        "    c = nn.Conv2d(in_channels, 2, 3)\n"
        "    return nn.Sequential(c, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, num_classes))\n"
    )
    assert run("--model", "band_nets:bands", "--size", "64x48", "--channels", "5") == 0
    assert capsys.readouterr().out.startswith("image           1 x 5 x 64 x 48 ")
    assert run("--model", "band_nets:bands", "--size", "64x48", "--channels", "0") == 2


def test_no_number_of_the_budgets_is_cut_off_in_a_narrow_terminal():
    from gigamorph import create_model, plan
    from gigamorph.cli.table import BudgetRow, show_budgets

    console = Console(file=StringIO(), width=30)
    made = plan(create_model("lesionnet"), (1024, 768), "64MiB")
    show_budgets([BudgetRow("stock's memory", 1 << 26, made, 1.2), BudgetRow("1/2", 1 << 25, None, None)], "", console)
    shown = console.file.getvalue()
    assert "…" not in shown and "does not fit" in shown and "1.2 s" in shown and "64.0 MiB" in shown
    assert f"{made.tile[0]} x {made.tile[1]}" in shown


def test_five_budgets_and_their_least_times(table, named_rates, capsys):
    """Shares of stock's memory; the time is the floor of stock's step, times the work of the plan."""
    import torch

    from gigamorph import accelerate, create_model, plan
    from gigamorph.engine.bench.results import BenchTask
    from gigamorph.engine.bench.roofline import count

    assert run("--model", MODEL, "--size", "2048x1536", "--views", "2", "--batch-norm", "frozen") == 0
    out = capsys.readouterr().out
    assert out.startswith("image           2 x 1 x 2048 x 1536 (6.3 Mpx)") and "every cut" not in out
    net = accelerate(create_model(MODEL), batch_norm="frozen")
    whole = plan(net, (2, 1, 2048, 1536))
    row = next(line for line in out.splitlines() if line.startswith("1/2 of it"))
    half = plan(net, (2, 1, 2048, 1536), whole.stock_bytes // 2)
    with torch.enable_grad():
        floor = count(net._network, BenchTask("", (2, 1, 2048, 1536))).seconds(named_rates, "fp32")
    wanted = [f"{half.tile[0]} x {half.tile[1]}", f"{half.work:.2f}", f"{floor * half.work:.2g} s"]
    assert re.split(r"  +", row.strip())[-3:] == wanted
    assert (
        sum(re.match(r"(stock's memory|1/\d+ of it) +[\d.]+ \wiB ", line) is not None for line in out.splitlines()) == 5
    )
    assert "smallest sufficient budget: 1/" in out
    assert out.rstrip().endswith("rates: this machine's, measured now: 10 GB/s, 0.1 TFLOP/s")


@pytest.mark.parametrize("more", [[], ["--batch-norm", "frozen", "--precision", "bf16"], ["--inference"]])
def test_which_gpu_of_those_that_are_not_here(more, table, capsys):
    assert run("--model", MODEL, "--size", "1024x1024", "--views", "4", "--device", "cuda", *more) == 0
    out = capsys.readouterr().out
    (answer,) = (line for line in out.splitlines() if line.startswith("smallest sufficient budget"))
    assert re.fullmatch(r".*: T4, 16 GB \(peak [\d.]+ [MG]iB, at best [\d.]+ s a step\)", answer)
    assert out.count(" GB ") >= 5 and "data sheets" in out


def test_a_gpu_s_memory_is_the_budget(capsys):
    assert run(*NET, "--device", "cuda:1GiB", "--batch-norm", "frozen") == 0
    assert re.search(r"budget +819 MiB \(fits\)", capsys.readouterr().out)


def test_a_budget_above_the_gpu_s_memory_is_refused(capsys):
    assert run(*NET, "--device", "cuda:1GiB", "--memory-budget", "2GiB") == 2
    assert "--memory-budget exceeds the memory of --device" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "cuda:lots", "cpu:4GiB", "cuda:0GiB"])
def test_devices_that_are_none(device, capsys):
    assert run(*NET, "--device", device) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_the_network_refuses_is_one_line(capsys):
    pytest.importorskip("timm")
    assert run("--model", "timm:vit_tiny_patch16_224", "--size", "512x512") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot take an image of 1 x 512 x 512" in error
    assert "Input height (512) doesn't match model (224)" in error


def test_plan_of_a_budget_below_every_tile_fails_in_one_line(capsys):
    assert run(*NET, "--batch-norm", "frozen", "--memory-budget", "1MB") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no tile fits") and "budget" in error and error.count("\n") == 1


@pytest.mark.parametrize("size", ["2048", "0x5", "ax b", "-3x4"])
def test_a_size_that_is_none(size, capsys):
    assert run("--size", size) == 2


def test_a_size_with_a_capital_x_is_one(capsys):
    assert run("--model", "lesionnet", "--size", "256X192", "--memory-budget", "64MiB") == 0
    assert "1 x 1 x 256 x 192" in capsys.readouterr().out


def test_a_budget_that_is_none(capsys):
    assert run("--size", "10x10", "--memory-budget", "lots") == 2
    assert "lots" in capsys.readouterr().err


def test_the_largest_that_fits_cards(table, capsys) -> None:
    assert run(*NET[:2], "--size", "512x384", "--largest", "size", "--device", "cuda:1GiB,2GiB", "--json") == 0
    small, large = json.loads(capsys.readouterr().out)
    assert small["budget"] == "cuda:1.00 GiB" and small["work"] <= 2
    assert 0.85 < small["peak GiB"] / 0.8 <= 1 and 1.3 < large["Mpx"] / small["Mpx"] < 3
    sides = [int(side) for side in small["largest size"].split(" x ")]
    assert abs(sides[0] / sides[1] - 4 / 3) < 0.1 and small["stock PyTorch, GiB"] > small["peak GiB"]
    assert run(*NET, "--largest", "batch", "--device", "cuda:2MiB") == 0
    assert "does not fit" in capsys.readouterr().out


def test_the_largest_in_python() -> None:
    from gigamorph import BudgetError, GigamorphError, plan
    from gigamorph.engine.models import create_model

    net = create_model("tiny_nets:wide")
    found = plan(net, (1, 512, 384), "800MiB", device="cuda", largest="size")
    assert found.image[2] > 512 and found.peak_bytes <= 800 * 2**20 < found.stock_bytes
    batch = plan(net, (1, 512, 384), "800MiB", device="cuda", largest="batch")
    assert batch.image[2:] == (512, 384) and 0.85 < batch.peak_bytes / (800 * 2**20) <= 1
    with pytest.raises(BudgetError, match=r"not even a small image fits 2.00 MiB"):
        plan(net, (1, 512, 384), "2MiB", device="cuda", largest="size")
    with pytest.raises(GigamorphError, match="largest must be"):
        plan(net, (1, 512, 384), "2MiB", largest="all")  # pyright: ignore[reportArgumentType]


def test_stock_with_folded_norms_is_beside_stock(table, capsys) -> None:
    given = ["--size", "512x512", "--memory-budget", "300MiB", "--device", "cpu", "--batch-norm", "frozen"]
    assert run("--model", "resnet18", *given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.4 < found["folded_bytes"] / found["stock_bytes"] < 0.9  # no map between a convolution and its norm
    assert run("--model", "resnet18", *given) == 0
    assert "norms folded" in capsys.readouterr().out


def test_the_largest_where_memory_does_not_grow(table, capsys) -> None:
    """A prediction with frozen norms stores nothing of the image."""
    given = ["--size", "512x512", "--largest", "batch", "--inference", "--memory-budget", "100GiB", "--device", "cpu"]
    assert run(*NET[:2], *given, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert 1 < int(found["largest batch"].split(" x ")[0]) <= 4096


def test_a_plan_as_json(table, capsys):
    given = ["--model", "lesionnet", "--size", "512x512", "--memory-budget", "1GiB", "--device", "cuda"]
    with pytest.raises(SystemExit) as caught:
        main(["plan", *given, "--json"])
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image"] == [1, 1, 512, 512] and found["budget"] == 2**30 and found["fits"] is True
    assert 0 < found["peak_bytes"] <= found["budget"] and len(found["budgets"]) > 3
    assert all(row["plan"] is None or row["plan"]["peak_bytes"] <= row["budget"] for row in found["budgets"])


def test_the_loss_of_masks_is_taken_by_tiles(capsys):
    def whole(*more):
        assert run("--model", "unet?width=2&depth=2", "--size", "600x500", "--classes", "8", "--json", *more) == 0
        return json.loads(capsys.readouterr().out)["stored_bytes"]

    frozen = "--batch-norm", "frozen"
    assert whole(*frozen, "--task", "masks") < 8 * 600 * 500 * 4 <= whole(*frozen)
