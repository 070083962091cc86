"""What a call writes at its end: together, but for tensors that share memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gigamorph.engine.execution import forward


@pytest.mark.parametrize("case", ["apart", "one is another's value", "one is part of another"])
def test_in_few_launches(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    a, b, c, d = (torch.full((4,), float(n)) for n in range(4))
    pairs = {
        "apart": [(a, b), (c, d)],
        "one is another's value": [(a, b), (b, c)],
        "one is part of another": [(a, b), (a[:2], c[:2])],
    }[case]
    groups: list[int] = []
    copy_all = forward.copy_all

    def noted(part: list[tuple[Tensor, Tensor]]) -> None:
        groups.append(len(part))
        copy_all(part)

    monkeypatch.setattr(forward, "copy_all", noted)
    forward._write(pairs)
    assert groups == ([2] if case == "apart" else [1, 1])
    expected = {"apart": [1.0, 3.0], "one is another's value": [1.0, 2.0], "one is part of another": [2.0, 2.0]}[case]
    assert [float(target[0]) for target, _ in pairs] == expected
