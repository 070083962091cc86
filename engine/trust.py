"""Trust in Python modules that a file names: only modules that the user trusts are imported.

``nets:tiny`` names a function of a Python module; importing it runs the module. A name of this form can come from an
untrusted file: a checkpoint, a folder of `gigamorph import`, a configuration. A file may use networks of a registry
(gigamorph's, timm's, torchvision's) and modules that the user trusts:

- by an argument: a model, logger or callback named on the command line, or passed to `create_model`;
- by ``--trust``, or ``trust=True`` of `load`, for one command or call;
- in the environment, ``GIGAMORPH_TRUST=nets,others``;
- in ``gigamorph/config.toml`` of ``XDG_CONFIG_HOME`` or ~/.config: ``trust = ["nets"]``.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

from .errors import UntrustedError

VARIABLE = "GIGAMORPH_TRUST"  # child processes inherit it
ALL = "*"

_all = contextvars.ContextVar("gigamorph trusts all modules", default=False)


def trust(*modules: str) -> None:
    """Allow imports of modules and their submodules in this process and its children; "*" allows all modules."""
    known = _split(os.environ.get(VARIABLE, ""))
    os.environ[VARIABLE] = ",".join(dict.fromkeys((*known, *modules)))


def trust_named(*texts: str) -> None:
    """`trust` the modules in texts such as ``nets:tiny?width=32`` that the user typed."""
    for text in texts:
        module, colon, _ = text.partition("?")[0].partition(":")
        if colon and module not in ("", "timm", "hf-hub", "hf_hub"):
            trust(module)


@contextlib.contextmanager
def trusted(whether: bool = True) -> Iterator[None]:
    """Allow imports of all modules in this thread, inside the `with` block."""
    token = _all.set(_all.get() or whether)
    try:
        yield
    finally:
        _all.reset(token)


def require_trusted(what: str, module: str) -> None:
    """Raise an error if the user does not trust a module that a file names.

    Args:
        what: description for the message, as in "model 'nets:tiny'".
        module: dotted name of the module.

    Raises:
        UntrustedError: the user does not trust the module.
    """
    if _all.get():
        return
    allowed = _split(os.environ.get(VARIABLE, ""))
    if ALL in allowed or any(_is_inside(module, one) for one in allowed):
        return
    path = _configuration()
    if path is not None and any(_is_inside(module, one) for one in _trusted_in(path)):
        return
    remedy = f'write trust = ["{module}"] into {path}' if path is not None else f"set {VARIABLE}={module}"
    raise UntrustedError(
        f"{what} comes from a file and would import the module '{module}', which runs its code; if you trust the "
        f"file's author, pass --trust (in Python trust=True), or {remedy}"
    )


def _is_inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _split(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _configuration() -> Path | None:
    """Path of the user's configuration file; None if the account has no home directory."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base, "gigamorph", "config.toml") if os.path.isabs(base) else None


def _trusted_in(path: Path) -> list[str]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return []
    except ValueError as error:
        raise UntrustedError(f"{path}: is not valid TOML ({error}); correct or remove it") from error
    names = found.get("trust", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UntrustedError(f'{path}: trust must be a list of modules, as in trust = ["nets"]')
    return names
