"""Which modules of the user's own are imported for a name: those that the user has named, not those of any file.

``nets:tiny`` names a function of a Python module, and to import it runs the module. Such a name may stand in a file
that anybody has made: a checkpoint, a folder of `gigamorph import`, a configuration. Of a file only networks that a
registry holds are built (our own, timm's, torchvision's), and modules that the user trusts:

- by an argument: a model, logger or callback that was typed on the command line, or given to `create_model`;
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

VARIABLE = "GIGAMORPH_TRUST"  # processes that are started have it too
ALL = "*"

_all = contextvars.ContextVar("gigamorph trusts all modules", default=False)


def trust(*modules: str) -> None:
    """Modules that may be imported in this process and those that it starts, with what is in them; "*" is all."""
    known = _listed(os.environ.get(VARIABLE, ""))
    os.environ[VARIABLE] = ",".join(dict.fromkeys((*known, *modules)))


def trust_named(*texts: str) -> None:
    """`trust` for the modules in texts such as ``nets:tiny?width=32`` that the user has typed."""
    for text in texts:
        module, colon, _ = text.partition("?")[0].partition(":")
        if colon and module not in ("", "timm", "hf-hub", "hf_hub"):
            trust(module)


@contextlib.contextmanager
def trusted(whether: bool = True) -> Iterator[None]:
    """All modules may be imported meanwhile, in this thread."""
    token = _all.set(_all.get() or whether)
    try:
        yield
    finally:
        _all.reset(token)


def require_trusted(what: str, module: str) -> None:
    """Refuse to import a module that only a file names.

    Args:
        what: names it, as in "model 'nets:tiny'".

    Raises:
        UntrustedError: it is none of those that the user trusts.
    """
    if _all.get():
        return
    allowed = _listed(os.environ.get(VARIABLE, ""))
    if ALL in allowed or any(_within(module, one) for one in allowed):
        return
    path = _configuration()
    if path is not None and any(_within(module, one) for one in _configured(path)):
        return
    place = f'write trust = ["{module}"] into {path}' if path is not None else f"set {VARIABLE}={module}"
    raise UntrustedError(
        f"{what} comes from a file and would import the module '{module}', which runs its code; if you trust who made "
        f"the file, pass --trust (in Python trust=True), or {place}"
    )


def _within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _configuration() -> Path | None:
    """Path of the user's configuration file, or None if the account has no home directory."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base, "gigamorph", "config.toml") if os.path.isabs(base) else None


def _configured(path: Path) -> list[str]:
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
