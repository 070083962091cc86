"""An optimizer whose state is dealt to several processes trains the accelerated network as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_optimizer
from exactness import errors
from processes import in_processes

NAMES = ["zero", "fsdp2"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, list[Any]]:
    tasks = [(getattr(sharded_optimizer, name),) for name in NAMES]
    return dict(zip(NAMES, in_processes(2, tmp_path_factory.mktemp("two"), tasks), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_one_process(name, two):
    wanted = sharded_optimizer.alone(2)
    for found in two[name]:
        assert not isinstance(found, str), found
        parameters = {key.removeprefix("module."): value for key, value in found[0].items()}
        assert max(errors(wanted, parameters).values()) < 1e-10
    whole = 2 * sum(value.numel() for value in wanted.values())
    held = [found[1] for found in two[name]]
    assert sum(held) == whole and max(held) < 0.75 * whole
