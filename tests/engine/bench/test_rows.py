"""The declared list is whole, and what this machine cannot run says so."""

import pytest
import torch

from gigamorph.engine.bench import rows
from gigamorph.engine.bench.results import NOT_RUN, OK, WRONG, Check, StepRow
from gigamorph.engine.errors import GigamorphError


@pytest.fixture
def pretended(monkeypatch):
    """Steps that are not measured, on a machine with memory for all of them; gigamorph's status can be chosen."""
    status = {"gigamorph": OK}

    def measure(task, options, ceilings, say):
        check = Check("stock", 1e-15, 2e-15, buffers=3e-16)
        return [
            StepRow(task, "stock", seconds=[1.0]),
            StepRow(task, "gigamorph", status["gigamorph"], seconds=[1.0], check=check, first_seconds=2.0),
        ]

    monkeypatch.setattr(rows, "measure", measure)
    monkeypatch.setattr(rows, "available_bytes", lambda device: 2**40)
    return status


def test_the_list_has_fifteen_rows_in_order():
    assert [row.number for row in rows.ROWS] == list(range(1, 16))
    assert all("gigamorph" in row.peers and row.tasks and row.text and row.aim for row in rows.ROWS)
    assert all((task.device == "cuda") == (row.gpu > 0) for row in rows.ROWS for task in row.tasks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_rows_for_a_gpu_say_what_is_missing(pretended):
    outcomes = {outcome.row.number: outcome for outcome in rows.run({})}
    assert len(outcomes) == 15
    for declared in rows.ROWS:
        row = outcomes[declared.number].row
        if declared.gpu:
            assert row.status == NOT_RUN and f"GPU of {declared.gpu} GiB" in (row.reason or "")
        else:
            assert row.status == OK and row.found and "2e-15" in row.found
    assert len(outcomes[10].steps) == 8


def test_a_row_is_wrong_if_gigamorph_is(pretended):
    pretended["gigamorph"] = WRONG
    (outcome,) = rows.run({}, (11,))
    assert outcome.row.status == WRONG


def test_a_machine_without_memory_says_so(pretended, monkeypatch):
    monkeypatch.setattr(rows, "available_bytes", lambda device: 2**30)
    (outcome,) = rows.run({}, (10,))
    assert outcome.row.status == NOT_RUN and "4 GiB" in (outcome.row.reason or "") and not outcome.steps


def test_a_script_that_is_not_there_is_told(monkeypatch, tmp_path):
    from gigamorph.engine.bench import scripts

    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    with pytest.raises(GigamorphError, match=r"benchmarks/gpu_ops\.py not found"):
        scripts.script("gpu_ops")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_kernels_need_a_gpu():
    from gigamorph.engine.bench.scripts import measure_kernels

    with pytest.raises(GigamorphError, match="needs a GPU"):
        measure_kernels()


def test_kernels_are_timed_by_the_code_of_the_gpu_script(monkeypatch):
    from gigamorph.engine.bench import scripts
    from gigamorph.engine.bench.results import FAILED

    class Timer:
        def row(self, case):
            return {"flops": 1.0, "bytes": 2.0, "ms": {"ours": 3.0}, **case}

    class Ops:
        def op_cases(self, dry):
            return {"3x3": dict, "1x1": lambda: {"failed": {"cudnn": "no plan"}}, "7x7": lambda: 1 / 0}

    Ops.Timer = Timer  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(scripts, "script", lambda name: Ops())
    (three,), (one,) = scripts.measure_kernels("3x3"), scripts.measure_kernels("1x1")
    assert (three.op, three.status, three.ms) == ("3x3", OK, {"ours": 3.0})
    assert (one.status, one.reason) == (FAILED, "cudnn: no plan")


def test_morphs_are_compared_at_the_accuracy_of_training_from_scratch():
    from gigamorph.engine.bench.scripts import morph_rows

    def curve(*accuracies):
        return [{"seconds": 10.0 * n, "epoch": n, "test_accuracy": a} for n, a in enumerate(accuracies)]

    curves = {name: curve(0.1, 0.8, 0.95) for name in ("widened", "deepened")}
    curves |= {f"{name}, from scratch, same epochs": curve(0.1, 0.5, 0.7, 0.9) for name in ("widened", "deepened")}
    curves["deepened"] = curve(0.1, 0.2)
    curves["widened, from scratch, same time"] = curve(1.0)
    checks = {name: {"seconds": 0.5} for name in ("widened", "deepened")}
    found = morph_rows({"seeds": [{"seed": 4, "curves": curves, "checks": checks}]})
    assert [(row.how, row.accuracy, row.seconds, row.epochs, row.morph_seconds) for row in found] == [
        ("widened", 0.9, 20.0, 2, 0.5),
        ("widened, from scratch, same epochs", 0.9, 30.0, 3, None),
        ("deepened", 0.9, None, None, 0.5),
        ("deepened, from scratch, same epochs", 0.9, 30.0, 3, None),
    ]
