import pytest

from gigamorph.cli.main import main


def run(*args):
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    return exit_.value.code


def test_plan_prints_tile_and_memory(capsys):
    args = ["--model", "resnet18", "--size", "2048x1536", "--batch-norm", "frozen", "--memory-budget", "1GiB"]
    assert run("plan", *args) == 0
    out = capsys.readouterr().out
    assert "tile" in out and "stock" in out


def test_plan_of_a_budget_below_every_tile_fails_in_one_line(capsys):
    args = ["--model", "resnet18", "--size", "2048x1536", "--batch-norm", "frozen", "--memory-budget", "20MB"]
    assert run("plan", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "budget" in error and error.count("\n") == 1


@pytest.mark.parametrize("size", ["2048", "0x5", "ax b", "-3x4"])
def test_a_size_that_is_none(size, capsys):
    assert run("plan", "--size", size) == 2


def test_a_budget_that_is_none(capsys):
    assert run("plan", "--size", "10x10", "--memory-budget", "lots") == 2
    assert "lots" in capsys.readouterr().err
