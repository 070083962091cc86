"""The memory of networks, measured, is what was predicted, and kept to; to all but ResNet-18 no constant was fitted."""

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
    net = create_model("timm:{name}", in_channels=3, num_classes=1000).train("{mode}" == "live")
    image = torch.rand(1, 3, 1024, 1024)
    fast = accelerate(net, memory_budget={budget})
    gc.collect()
    return_free_pages()
    before = used_bytes()
    reset_peak()
    with torch.set_grad_enabled("{mode}" != "inference"):
        for _ in range(2):
            net.zero_grad()
            result = fast(image).sum()
            if "{mode}" != "inference":
                result.backward()
    measured = peak_bytes() - before + sum(t.nbytes for t in net.state_dict().values())
    print(json.dumps([measured, plan(net, image.shape, {budget}, training="{mode}" != "inference").peak_bytes]))
"""
ROWS = [  # network, norms in training or inference, budget
    ("resnet18", "frozen", 420_000_000),
    ("mobilenetv3_large_100", "live", 343_000_000),
    ("regnety_004", "inference", 64_000_000),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("name", "mode", "budget"), ROWS)
def test_predicted_is_measured_and_budgets_are_kept(name: str, mode: str, budget: int) -> None:
    """Each in a process of its own: in one after another the heap has room from those before."""
    code = textwrap.dedent(MEASURE.format(name=name, mode=mode, budget=budget))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured, predicted = json.loads(run.stdout)
    assert measured <= 1.05 * budget
    assert 0.88 <= predicted / measured <= 1.12, (predicted, measured)
