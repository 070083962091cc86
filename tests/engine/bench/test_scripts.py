"""Kernels are measured by the script of the checkout."""

import pytest
import torch

from gigamorph.engine.bench.results import OK
from gigamorph.engine.errors import GigamorphError


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
