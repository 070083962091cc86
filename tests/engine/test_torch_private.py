"""Private names of PyTorch: all are found, only one file has them, and a missing one is said on its first use."""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses import fake_tensor

from gigamorph import UnsupportedError
from gigamorph.engine import torch_private
from gigamorph.engine.capture.refusals import _NOT_FAKE, NEEDS_VALUES
from gigamorph.engine.torch_private import NAMES, PrivateName

ROOT = Path(__file__).parents[2]
BY_PATH = [path for path, name in NAMES.items() if name.look is None]


def test_all_names_are_found() -> None:
    assert torch_private.missing_names() == []


def without(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as if PyTorch did not have a name."""
    resolve: Callable[[str], Any] = pkgutil.resolve_name

    def resolved(name: str) -> Any:
        if name == path:
            raise AttributeError(name)
        return resolve(name)

    monkeypatch.setattr(pkgutil, "resolve_name", resolved)
    spec = importlib.util.spec_from_file_location("gigamorph.engine.copy_of_private", torch_private.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize("path", BY_PATH)
def test_a_missing_name_fails_on_its_first_use(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = without(path, monkeypatch)
    assert [name.path for name in copy.missing_names()] == [path]
    with pytest.raises(
        UnsupportedError, match=rf"PyTorch {torch.__version__.partition('+')[0]}.* has no {path}, which"
    ):
        copy.NAMES[path].find()


def stand_ins() -> list[tuple[str, Callable[[Any], Any]]]:
    fake = "torch._subclasses.fake_tensor."
    return [
        ("torch.utils._pytree.tree_map", lambda copy: copy.tree_map(abs, [1])),
        (fake + "FakeTensor", lambda copy: isinstance(1, copy.FakeTensor)),
        (fake + "FakeTensorMode", lambda copy: copy.FakeTensorMode()),
        (fake + "FakeTensorMode", lambda copy: copy.FakeTensorMode.cache),
        ("torch.utils._python_dispatch.TorchDispatchMode", lambda copy: type("Mode", (), {}) and _mode(copy)()),
        ("torch._C._autograd._top_saved_tensors_default_hooks", lambda copy: copy.saved_tensors_hooks()),
        ("torch._dynamo.config", lambda copy: copy.dynamo_config()),
    ]


def _mode(copy: ModuleType) -> type:
    class Mode(copy.TorchDispatchMode):
        pass

    return Mode


@pytest.mark.parametrize(("path", "use"), stand_ins())
def test_what_stands_for_a_missing_name_raises(
    path: str, use: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = without(path, monkeypatch)
    with pytest.raises(UnsupportedError, match=rf"has no {path}, which gigamorph needs to .+; install torch"):
        use(copy)


def test_some_missing_names_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = torch.zeros(3), torch.arange(3.0)
    without("torch._foreach_copy_", monkeypatch).foreach_copy([target], [source])
    assert torch.equal(target, source)
    without("torch._foreach_zero_", monkeypatch).foreach_zero([target])
    assert not target.any()
    assert without("torch._C._autograd._get_current_graph_task_keep_graph", monkeypatch).keeps_graph()
    assert without("torch._dynamo.eval_frame._stance", monkeypatch).stance() == "default"


def test_errors_that_are_found_by_name_have_it() -> None:
    assert all(issubclass(getattr(fake_tensor, name), Exception) for name in (*NEEDS_VALUES, *_NOT_FAKE))


def test_attributes_are_tried_on_an_example() -> None:
    """An attribute that PyTorch renames is found missing, and does not stop matching silently."""
    x = torch.ones(2, requires_grad=True)
    y = x * x
    assert not torch_private.is_used_up(y.grad_fn)
    y.sum().backward()
    assert torch_private.is_used_up(y.grad_fn)
    assert all(name.find_or(None) is not None for name in NAMES.values() if name.look is not None)

    def look() -> Any:
        return torch.empty(0).untyped_storage()._renamed  # pyright: ignore[reportAttributeAccessIssue]

    with pytest.raises(UnsupportedError, match="has no it, which gigamorph needs to see"):
        PrivateName("it", "see", look=look).find()


def test_private_names_elsewhere_fail_the_lint(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from gates import private_names
    finally:
        sys.path.remove(str(ROOT / "tests"))

    planted = {
        "import torch\nx = torch._C._select_conv_backend": "torch._C._select_conv_backend",
        "from torch._dynamo import config": "torch._dynamo.config",
        "from torch.utils import _pytree as trees\ntrees.tree_map": "torch.utils._pytree",
        "import torch._inductor.config as c": "torch._inductor.config",
        "from torch import nn as layers\nlayers.modules.batchnorm._BatchNorm": "torch.nn.modules.batchnorm._BatchNorm",
        "from triton.runtime._allocation import x": "triton.runtime._allocation.x",
        "from triton import knobs": "triton.knobs",
    }
    for text, name in planted.items():
        assert name in [found for _, found in private_names(text)], text
    allowed = "import torch\nfrom torch import nn\ntorch.__version__\nnn.Conv2d._conv_forward\nself._x\ntorch.nn.Module"
    assert private_names(allowed) == []
