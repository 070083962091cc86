"""In a process of its own, where no conftest has declared the operators before."""

import subprocess
import sys

import pytest

CODE = """
import sys
try:
    import torchvision
    print('sound')
except ImportError:
    print('absent')
except RuntimeError:
    from gigamorph.engine.models.compat import make_torchvision_importable
    assert make_torchvision_importable() and make_torchvision_importable()
    import torchvision
    import lightning.pytorch
    print('repaired')
"""


def test_lightning_imports_beside_a_torchvision_of_another_build():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != "repaired":
        pytest.skip(f"torchvision is {done.stdout.strip()} here")


def test_nothing_is_declared_where_torchvision_is_sound_or_absent(monkeypatch):
    import torch

    from gigamorph.engine.models import compat

    monkeypatch.setattr(compat, "_libraries", [])
    monkeypatch.setattr(torch.library, "Library", lambda *a: pytest.fail("declared"))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # import gives ImportError
    assert compat.make_torchvision_importable() is False
