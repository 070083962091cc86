"""Functions and classes of the user's own, in a module of the working directory or an installed one."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import GigamorphError
from .weights import first_line


@contextlib.contextmanager
def working_directory_on_path() -> Iterator[None]:
    """A console script does not have the working directory on its path; a user's own module lies there."""
    added = str(Path.cwd())
    sys.path.insert(0, added)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(added)


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """torch.hub and Hugging Face give what is in their caches: code that asks for pretrained weights fetches none."""
    try:
        import huggingface_hub.constants as hub
    except ImportError:  # it comes with timm, and without it nobody asks it for anything
        hub = SimpleNamespace(HF_HUB_OFFLINE=True)
    fetch, offline = torch.hub.download_url_to_file, hub.HF_HUB_OFFLINE
    torch.hub.download_url_to_file, hub.HF_HUB_OFFLINE = _refuse_to_fetch, True
    try:
        yield
    finally:
        torch.hub.download_url_to_file, hub.HF_HUB_OFFLINE = fetch, offline


def _refuse_to_fetch(url: str, *_: Any, **__: Any) -> None:
    raise GigamorphError(f"it would fetch {url}, and nothing is downloaded here; build it without pretrained weights")


def imported(what: str, module_name: str, name: str) -> Any:
    """``name`` of a module; for the user's own, within `working_directory_on_path`.

    Args:
        what: for messages, as in "model 'nets:tiny'".

    Raises:
        GigamorphError: if there is no such module, it raises, or has no such name.
    """
    try:
        if module_name.startswith("."):  # to Python that is relative to a package
            raise ModuleNotFoundError(name=module_name)
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):  # the module was found
            raise GigamorphError(f"{what} cannot be imported: {first_line(error)}") from error
        if module_name.endswith(".py"):
            path = Path(module_name).with_suffix("")
            path = path.resolve() if ".." in path.parts else path
            elsewhere = f", in its folder {path.parent}" if path.is_absolute() else ""
            module = path.name if elsewhere else ".".join(path.parts)
            raise GigamorphError(
                f"{what} cannot be imported: {module_name!r} is a file; name its module, {module}:{name}{elsewhere}"
            ) from error
        raise GigamorphError(
            f"{what} cannot be imported: there is no module {error.name!r} in {Path.cwd()} or on Python's "
            "path; run this in the folder that holds it, or put that folder into PYTHONPATH"
        ) from error
    except Exception as error:
        # The module is the user's: whatever it raises is the answer to "why can it not be imported".
        raise GigamorphError(f"{what} cannot be imported: {first_line(error)}") from error
