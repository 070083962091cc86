import re
from io import StringIO

import pytest
from rich.console import Console

from gigamorph.cli.main import main

RESNET = ["--model", "resnet18", "--size", "2048x1536"]


def run(*args):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *args])
    return exit_.value.code


def test_plan_prints_tile_and_memory_of_the_step_that_training_takes(capsys):
    import torch

    from gigamorph import accelerate
    from gigamorph.engine.models import create_model

    assert run(*RESNET, "--batch-norm", "frozen", "--memory-budget", "1GiB") == 0
    out, err = capsys.readouterr()
    net = accelerate(create_model("resnet18"), memory_budget="1GiB", batch_norm="frozen")
    with torch.enable_grad():
        assert out.startswith(str(net.plan_for((1, 1, 2048, 1536))))
    assert re.search(r"stock PyTorch +\S+ GiB \(\S+ times this\)", out) and err == ""


def test_live_batch_norm_takes_several_stages(capsys):
    assert run(*RESNET, "--memory-budget", "1GiB") == 0
    out, err = capsys.readouterr()
    assert "training, two passes" in out and "stages" in out and not err


def test_inference_takes_less_and_needs_no_frozen_statistics(capsys):
    def peak(*more):
        assert run(*RESNET, "--memory-budget", "500MiB", *more) == 0
        out, err = capsys.readouterr()
        return float(re.search(r"predicted peak +([\d.]+) MiB", out)[1]), err

    (less, err), (more, _) = peak("--inference"), peak("--batch-norm", "frozen")
    assert less < 0.7 * more and err == ""


def test_mixed_precision_halves_a_tile(capsys):
    def tile(precision):
        assert run(*RESNET, "--batch-norm", "frozen", "--precision", precision) == 0
        return float(re.search(r"one tile +([\d.]+) MiB", capsys.readouterr().out)[1])

    assert tile("bf16") < 0.75 * tile("fp32")


def test_a_terminal_gets_bars_on_one_scale():
    import torch

    from gigamorph import plan
    from gigamorph.cli.table import show_plan

    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
    made = plan(net, (1, 512, 512), "2MiB", tile=64)
    console = Console(file=StringIO(), force_terminal=True, width=100, highlight=False)
    show_plan(made, "net", console)
    lines = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
    bars = {line.split("  ")[0]: line.count("█") for line in lines}
    assert max(bars.values()) == next(n for name, n in bars.items() if name.startswith("stock PyTorch")) == 32
    assert bars["budget (kept)"] == round(32 * 2**21 / made.stock_bytes)
    assert lines[0] == "a training step of net on 512 x 512 pixels (0.3 Mpx)"


def test_plan_of_a_budget_below_every_tile_fails_in_one_line(capsys):
    assert run(*RESNET, "--batch-norm", "frozen", "--memory-budget", "20MB") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no tile fits") and "budget" in error and error.count("\n") == 1


@pytest.mark.parametrize("size", ["2048", "0x5", "ax b", "-3x4"])
def test_a_size_that_is_none(size, capsys):
    assert run("--size", size) == 2


def test_a_budget_that_is_none(capsys):
    assert run("--size", "10x10", "--memory-budget", "lots") == 2
    assert "lots" in capsys.readouterr().err


def test_without_a_gpu_kernels_are_said_to_be_pytorch_s(capsys):
    assert run(*RESNET, "--inference", "--kernels", "--device", "cpu") == 0
    assert "PyTorch's own ops run" in capsys.readouterr().out


def test_choices_are_listed_with_their_times():
    from gigamorph.cli.table import show_choices
    from gigamorph.kernels.choice import Choice

    out = StringIO()
    show_choices(
        [
            Choice("conv2d_forward", '["bfloat16"]', 4096, "stock", {"stock": 1.0, "triton": 1.25}, 1.25),
            Choice("conv2d_dgrad", '["bfloat16"]', 4096, "triton", {"stock": 2.0, "triton": 1.0}, 0.5),
        ],
        Console(file=out, width=120),
    )
    lines = out.getvalue().splitlines()
    assert "0.50" in lines[2] and lines[2].rstrip().endswith("triton")
    assert "1.250" in lines[3] and lines[3].rstrip().endswith("stock")
