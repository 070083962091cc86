"""Functions and classes of the user, in a module of the working directory or an installed one."""

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
    """Put the working directory on Python's path, where a console script would not look for the user's modules."""
    added = str(Path.cwd())
    sys.path.insert(0, added)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(added)


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Let torch.hub and Hugging Face read their caches only, so that code cannot download pretrained weights."""
    try:
        import huggingface_hub.constants as hub
    except ImportError:  # it comes with timm; without it nothing can download
        hub = SimpleNamespace(HF_HUB_OFFLINE=True)
    fetch, offline = torch.hub.download_url_to_file, hub.HF_HUB_OFFLINE
    torch.hub.download_url_to_file, hub.HF_HUB_OFFLINE = _refuse_to_fetch, True
    try:
        yield
    finally:
        torch.hub.download_url_to_file, hub.HF_HUB_OFFLINE = fetch, offline


def _refuse_to_fetch(url: str, *_: Any, **__: Any) -> None:
    raise GigamorphError(f"it would download {url}, which is not allowed here; build it without pretrained weights")


def imported(what: str, module_name: str, name: str) -> Any:
    """Import ``name`` from a module; for the user's own modules, inside `working_directory_on_path`.

    Args:
        what: name for messages, as in "model 'nets:tiny'".

    Raises:
        GigamorphError: the module does not exist, raises, or has no such name.
    """
    try:
        if module_name.startswith("."):  # Python reads it as relative to a package
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
                f"{what} cannot be imported: {module_name!r} is a file; use its module, {module}:{name}{elsewhere}"
            ) from error
        raise GigamorphError(
            f"{what} cannot be imported: no module {error.name!r} in {Path.cwd()} or on Python's path; run this in the "
            "folder that contains it, or add that folder to PYTHONPATH"
        ) from error
    except Exception as error:
        # The module is the user's: its own error explains why it cannot be imported.
        raise GigamorphError(f"{what} cannot be imported: {first_line(error)}") from error
