"""The memory of networks, measured, is what was predicted, and kept to; to two of the three no constant was fitted."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

MEASURE = """
    import gc, json
    import torch
    from gigamorph import accelerate, plan
    from gigamorph.engine.models import create_model
    from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, return_free_pages, used_bytes
    torch.set_num_threads(1)
    accelerate(create_model("lesionnet", in_channels=1).eval(), tile=32)(torch.rand(1, 1, 64, 64)).sum().backward()
    found = {{}}
    for name, live, budget in {rows!r}:
        net = create_model("timm:" + name, in_channels=3, num_classes=1000).train(live)
        image = torch.rand(1, 3, {side}, {side})
        fast = accelerate(net, memory_budget=budget)
        gc.collect()
        return_free_pages()
        before = used_bytes()
        reset_peak()
        for _ in range(2):
            net.zero_grad()
            fast(image).sum().backward()
        measured = peak_bytes() - before + sum(t.nbytes for t in net.state_dict().values())
        found[name] = measured, plan(net, image.shape, budget).peak_bytes, budget
        del net, fast, image
    print(json.dumps(found))
"""
ROWS = [  # network, live norms, budget
    ("resnet18", False, 420_000_000),
    ("regnety_004", False, 490_000_000),
    ("mobilenetv3_large_100", True, 343_000_000),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_predicted_is_measured_and_budgets_are_kept() -> None:
    code = textwrap.dedent(MEASURE.format(rows=ROWS, side=1024))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, (measured, predicted, budget) in json.loads(run.stdout).items():
        assert measured <= 1.05 * budget, name
        assert 0.88 <= predicted / measured <= 1.12, (name, predicted, measured)
