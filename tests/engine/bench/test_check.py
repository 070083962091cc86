"""A result that is wrong is called wrong."""

import torch

from gigamorph.engine.bench.check import compare, complaint


def results(**changes):
    torch.manual_seed(0)
    made = {
        "outputs": {"output": torch.randn(1, 5)},
        "gradients": {"conv.weight": torch.randn(4, 3), "norm.weight": torch.randn(4)},
        "buffers": {"norm.running_mean": torch.randn(4)},
    }
    for kind, name, value in changes.values():
        made[kind][name] = value
    return made


def verdict(found, precision="fp32", **more):
    return complaint(compare(found, results(), "stock", **more), precision)


def test_the_same_is_right():
    check = compare(results(), results(), "stock")
    assert (check.outputs, check.gradients, check.buffers, check.missing) == (0, 0, 0, 0)
    assert complaint(check, "fp64") is None


def test_each_kind_of_mistake_is_found():
    right = results()
    assert "the output differs" in verdict(results(a=("outputs", "output", right["outputs"]["output"] * 1.002)))
    assert "gradients" in verdict(results(a=("gradients", "conv.weight", right["gradients"]["conv.weight"] * 1.01)))
    assert "running" in verdict(results(a=("buffers", "norm.running_mean", torch.zeros(4))))
    assert "inf" in verdict(results(a=("outputs", "output", torch.zeros(1, 4))))
    nan = results(a=("outputs", "output", torch.full((1, 5), float("nan"))))
    assert verdict(nan) is not None


def test_a_gradient_that_is_missing_is_wrong_unless_the_peer_says_so():
    found = results()
    del found["gradients"]["norm.weight"]
    assert "gradients differ" in verdict(found)
    assert verdict(found, untrained=frozenset({"norm.weight"})) is None
    assert compare(found, results(), "stock", frozenset({"norm.weight"})).missing == 1


def test_float64_is_held_to_float64():
    found = results()
    found["gradients"]["conv.weight"] = found["gradients"]["conv.weight"] * (1 + 1e-6)
    assert verdict(found) is None and verdict(found, "fp64") is not None


def test_the_worst_parameter_has_a_name():
    found = results()
    found["gradients"]["norm.weight"] = found["gradients"]["norm.weight"] * 1.5
    worst = compare(found, results(), "stock").worst
    assert worst is not None and worst[0] == "norm.weight" and abs(worst[1] - 0.5) < 1e-6
