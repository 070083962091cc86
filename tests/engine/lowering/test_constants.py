"""Numbers that rules know are copied to another device once, and kept there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gigamorph.engine.capture.call_trees import Ref
from gigamorph.engine.capture.program import Op, Program, Value
from gigamorph.engine.lowering.ops import Block, Local, Maps
from gigamorph.engine.lowering.ops.constants import Constants
from gigamorph.engine.lowering.ops.window import interpolate


def test_there_is_one_tensor_for_the_same_numbers():
    constants, away = Constants(), torch.empty(1, device="meta")
    with torch.inference_mode():
        made = constants.numbers([1, 2, 3], away)
    assert made.dtype == torch.int64 and made.device == away.device and not made.is_inference()
    assert constants.numbers([1, 2, 3], away) is made
    others = [
        constants.numbers([1, 2, 4], away),
        constants.numbers([1, 2, 3], away, torch.float32),
        Constants().numbers([1, 2, 3], away),
        constants.numbers([1, 2, 3], torch.empty(1)),
    ]
    assert all(other is not made for other in others) and others[1].dtype == torch.float32


def test_tensors_without_values_are_not_kept():
    constants = Constants()
    with FakeTensorMode():
        constants.numbers([1, 2, 3], torch.empty(1, device="meta"))
    assert not constants._made


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_interpolation_copies_nothing_to_the_device_again(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    values = [Value(shape, torch.float32, torch.device("meta")) for shape in ((1, 2, 9, 7), (1, 2, 13, 17))]
    op = Op(F.interpolate, "interpolate", (Ref(0),), {"size": (13, 17), "mode": mode}, (0,), (1,), (), "")
    local = interpolate(op, Maps(Program(0, values=values), {0: (2, 3)}))
    assert isinstance(local, Local)
    given = {0: torch.empty(1, 2, 9, 7, device="meta")}, Block((0, 13), (0, 17))
    (first,) = local.run(*given)

    def refused(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("a copy from the host")

    monkeypatch.setattr(torch, "tensor", refused)
    (second,) = local.run(*given)
    assert first.shape == second.shape == (1, 2, 13, 17)
