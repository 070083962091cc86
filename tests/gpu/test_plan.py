"""On a GPU: a plan needs no more than the network, wherever that lies."""

from __future__ import annotations

import pytest
import torch
from exactness import randomize

from gigamorph import plan
from gigamorph.engine.models import create_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_plan_does_not_depend_on_where_the_network_lies(training: bool, autocast: bool) -> None:
    net = randomize(create_model("resnet18", num_classes=8, in_channels=1)).eval()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        away = plan(net, (1, 1024, 1024), "4GiB", tile=256, device="cuda", training=training)
        net = net.cuda()
        there = plan(net, (1, 1024, 1024), "4GiB", tile=256, training=training)
        other = plan(net, (1, 1024, 1024), "4GiB", tile=256, device="cpu", training=training)
    assert away == there
    assert other.peak_bytes and other.record_bytes > 0 and there.record_bytes == 0  # of the CPU alone
