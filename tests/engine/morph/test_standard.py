"""A network that its library has a function for is named by it."""

from __future__ import annotations

from gigamorph.engine.models.resnet import BasicBlock, ResNet, resnet18, resnet34
from gigamorph.engine.morph.widen import standard_name


def test_a_network_is_named_by_the_function_that_builds_it() -> None:
    module = resnet18.__module__
    assert standard_name(resnet18(num_classes=3)) == f"{module}.resnet18"
    assert standard_name(resnet34(num_classes=2)) == f"{module}.resnet34"
    assert standard_name(ResNet(BasicBlock, (2, 2, 2, 1), 3, 1)) == ""
    assert standard_name(resnet18(num_classes=3, width=32)) == ""
