"""Arithmetic and traffic are counted, and the floor follows from them."""

import pytest
import torch
from torch import nn

from gigamorph.engine.bench.results import BenchTask
from gigamorph.engine.bench.roofline import StepWork, count, measure_ceilings

BF16 = {"precision": "bf16"}


def test_a_convolution_and_its_gradients_are_counted_by_hand():
    net = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    forward = 2 * 8 * 27 * 20 * 30  # an image that needs no gradient: the backward has the weight's alone
    task = BenchTask("-", (1, 3, 20, 30), training=False)
    infer, train = count(net, task), count(net, BenchTask("-", (1, 3, 20, 30)))
    assert infer.flops == forward and train.flops == 2 * forward
    image, weight, output = 3 * 600 * 4, net.weight.nbytes, 8 * 600 * 4
    assert (forward, image + weight + output, 1) in infer.ops


def test_a_step_of_a_gpu_in_16_bits_is_counted_on_the_network_of_the_cpu():
    """`gigamorph bench` counts there; autocast of the GPU does not cast what is computed on the CPU."""
    net = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    full, cpu, gpu = (
        count(net, BenchTask("-", (1, 3, 20, 30), **more)) for more in ({}, BF16, BF16 | {"device": "cuda"})
    )
    assert gpu == cpu != full


def test_the_floor_is_the_larger_of_arithmetic_and_traffic_op_by_op():
    work = StepWork(((2e9, 1e6, 1), (0.0, 4e9, 2)))
    ceilings = {"tflop_per_s fp32": 1e-3, "gb_per_s": 1.0}
    assert work.seconds(ceilings, "fp32") == 2.0 + 2 * 4.0
    assert work.seconds({}, "fp32") is None and work.seconds(ceilings, "bf16") is None


def test_views_cost_nothing():
    class Views(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)[:, ::2].unsqueeze(0)

    assert count(Views(), BenchTask("-", (1, 3, 8, 8), training=False)).ops == ()


@pytest.mark.parametrize("product, convolution", [(1.0, 1e9), (1e9, 1.0)])
def test_the_ceiling_is_the_faster_of_product_and_convolution(monkeypatch, product, convolution):
    seconds = iter((1.0, product, convolution))
    monkeypatch.setattr("gigamorph.engine.bench.roofline._min_seconds", lambda run, device, longest: next(seconds))
    flops = 2 * 2048**3 if product < convolution else 2 * 9 * 256 * 256 * 256**2  # 3x3, 256 to 256 channels, 256 x 256
    assert measure_ceilings("cpu")["tflop_per_s fp32"] == flops / 1e12


def test_ceilings_are_rates():
    found = measure_ceilings("cpu", seconds=0.01)
    assert found.keys() == {"gb_per_s", "tflop_per_s fp32"} and all(rate > 0 for rate in found.values())
    assert torch.get_num_threads() > 0


def test_other_work_on_the_cores_is_not_counted(monkeypatch):
    threads = torch.get_num_threads()
    taken = {"busy": (10.0, 0.5 * threads), "alone": (0.5, 0.5 * threads)}
    found = {}
    for name, times in taken.items():
        monkeypatch.setattr("gigamorph.engine.bench.roofline.time_call", lambda run, device, times=times: times)
        found[name] = measure_ceilings("cpu", seconds=0.3)
    assert found["busy"] == found["alone"]
