"""The folder of a run: what it is, who works in it, and what is refused there.

``run.json`` says what the run is, ``parts/N-of-M/`` holds results and ``quarantine/N-of-M/`` images that failed. Shards
share a folder; each writes to its own parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from ..files import write_atomically
from .job import Job
from .lock import cannot_write, held, hold
from .options import RunOptions


class RunFolder:
    """A folder for the results of a job, of which this process has a shard."""

    def __init__(self, path: Path, job: Job, options: RunOptions) -> None:
        self.path, self._job, self._options = path, job, options

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def shard(self) -> str:
        return self._options.shard_name

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While this process alone writes to the shard.

        Raises:
            GigamorphError: naming the process that does, or what else is in the folder.
        """
        with hold(self.parts / self.shard / "_lock", self.path):
            self.refuse(ours=True)
            yield

    def finishing(self) -> contextlib.AbstractContextManager[None]:
        """While this process alone writes the tables of all shards; waits for others."""
        return hold(self.parts / "_finish", self.path, wait=True)

    def refuse(self, *, ours: bool) -> None:
        """Refuse a folder that holds something else, or is in use.

        Args:
            ours: this process holds the shard.
        """
        job, options, out = self._job, self._options, self.path
        for lock in self._locks():
            mine = lock.parent.name == self.shard
            clash = mine or lock.parent.name.partition("-of-")[2] != str(options.shard[1])
            if clash and not (mine and ours) and (holder := held(lock)):
                raise GigamorphError(f"{out}: {holder} writes to it; wait for it, or name another --out")
        found = _read_description(out / "run.json")
        if found is None or not self._begun("*-of-*"):
            if found is None and job.product and (out / job.product).exists():
                raise GigamorphError(f"{out / job.product}: already exists; name another --out")
            return
        if found["kind"] != job.kind:
            raise GigamorphError(f"{out}: is of gigamorph {found['kind']}; name another --out")
        if found["model"] != options.model:
            raise GigamorphError(
                f"{out}: holds results of another model ({found['checkpoint']}, SHA-256 {found['model'][:12]}...); "
                "name another --out"
            )
        if not options.resume and (options.shard[1] == 1 or self._begun(self.shard)):
            raise GigamorphError(f"{out}: already holds {job.made}; go on with --resume, or name another --out")
        for name, value in job.described().items():
            if found.get(name) != value:
                raise GigamorphError(f"{out}: {job.differs(name, found.get(name))}")

    def join(self, rows: int, table: str, warn: Callable[[str], object]) -> None:
        """Say in the folder what the run is, or see that it is the same.

        Args:
            rows, table: how many images there are, and a digest of which.
        """
        out, options = self.path, self._options
        path = out / "run.json"
        own = {
            "format": 1,
            "kind": self._job.kind,
            "model": options.model,
            "checkpoint": options.checkpoint,
            **self._job.described(),
            "rows": rows,
            "table": table,
        }
        text = json.dumps(own, indent=2) + "\n"
        others = [told for lock in self._locks() if lock.parent.name != self.shard and (told := held(lock))]
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                _write_once(path, text.encode())
        elif not others and not self._begun("*-of-*"):  # of a run that came to nothing
            write_atomically(path, lambda p: p.write_text(text), "note")
        found = _read_description(path)
        if found is not None and (found["rows"], found["table"]) != (rows, table):
            if others:
                raise GigamorphError(f"{out}: {others[0]} works on another table of images; wait for it")
            told = f"{found['rows']} rows then, {rows} now"
            warn(f"{out}: the table is not the one that the run began with ({told}); results are by image")
            write_atomically(path, lambda p: p.write_text(text), "note")

    def secret(self) -> bytes:
        """By which patients are renamed, the same for all shards."""
        path = self.parts / "_patients.key"
        with contextlib.suppress(FileExistsError):
            _write_once(path, secrets.token_bytes(32), 0o600)
        return path.read_bytes()

    def _begun(self, shards: str) -> bool:
        """Whether there is any result or failure of these shards."""
        found = (path for kept in (self.parts, self.quarantine) for path in kept.glob(f"{shards}/*"))
        return any(path.name != "_lock" for path in found)

    def _locks(self) -> list[Path]:
        return sorted(self.parts.glob("*-of-*/_lock"))


def _read_description(path: Path) -> dict[str, Any] | None:
    try:
        found = {"kind": "predict", "flip": [], **json.loads(path.read_text(encoding="utf-8"))}
        return found | {name: found[name] for name in ("model", "checkpoint", "rows", "table")}
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise GigamorphError(f"{path.parent}: cannot be written: it is a file; name a folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GigamorphError(f"{path}: cannot be read ({error}); name another --out") from error


def _write_once(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file that several processes may write first, whole. `FileExistsError` if one has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}.{os.getpid()}")
        handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            os.write(handle, data)
            os.fsync(handle)
            os.link(own, path)
        finally:
            os.close(handle)
            own.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise cannot_write(path, error, "name another --out") from error
