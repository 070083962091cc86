"""The folder of a run: what it is, who works in it, and what is refused there.

``run.json`` says what the run is, ``parts/N-of-M/`` holds results and ``quarantine/N-of-M/`` images that failed. Shards
share a folder; each writes to its own parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from ..files import temporary_name, write_atomically
from ..parallel.lock import cannot_write, held, hold
from ..parsing import parse_json
from .job import Job
from .options import RunOptions
from .parts import read_results

_OF_TRAINING = ("last.ckpt", "log.csv", "folds.json")
"""What tells a folder of `gigamorph train`, whose quarantine.csv is of its own images."""


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
        """While this process alone writes to the shard. An error before there is any result leaves nothing behind.

        Raises:
            GigamorphError: naming the process that does, or what else is in the folder.
        """
        made, said = not self.path.exists(), (self.path / "run.json").exists()
        with hold(self.parts / self.shard / "_lock", self.path):
            self.refuse(ours=True)
            try:
                yield
            except BaseException:
                if not said and self._options.shard[1] == 1 and not self.begun():  # another shard may just begin
                    with contextlib.suppress(OSError):
                        self._empty(made)
                raise

    def _empty(self, made: bool) -> None:
        """Take away what this process has put here, and the folder if it has made it."""
        for path in (self.path / "run.json", self.parts / "_patients.key", self.parts / "_finish"):
            path.unlink(missing_ok=True)
        for kept in (self.parts, self.quarantine):
            shutil.rmtree(kept / self.shard, ignore_errors=True)
            with contextlib.suppress(OSError):  # it was there, with something else in it
                kept.rmdir()
        if made:
            self.path.rmdir()

    def finishing(self) -> contextlib.AbstractContextManager[None]:
        """While this process alone writes the tables of all shards; waits for others."""
        return hold(self.parts / "_finish", self.path, wait=True)

    def refuse(self, *, ours: bool) -> None:
        """Refuse a folder that holds something else, or is in use.

        Args:
            ours: this process holds the shard.
        """
        job, options, out = self._job, self._options, self.path
        self._refuse_others(ours)
        found = self._refuse_foreign()
        if found is None or options.overwrite:
            return
        if found["model"] != options.model:
            raise GigamorphError(
                f"{out}: holds results of another model ({found['checkpoint']}, SHA-256 {found['model'][:12]}...); "
                f"name another --out{self._or_overwrite}"
            )
        if not options.resume and (options.shard[1] == 1 or self._begun(self.shard)):
            raise GigamorphError(
                f"{out}: already holds {job.made}; go on with --resume, or name another --out{self._or_overwrite}"
            )
        for name, value in job.described().items():
            if found.get(name) != value:
                raise GigamorphError(f"{out}: {job.differs(name, found.get(name))}")

    @property
    def _or_overwrite(self) -> str:
        return ", or give --overwrite" if self._job.files else ""

    def _refuse_others(self, ours: bool) -> None:
        """Refuse a folder that another process writes to."""
        options, out = self._options, self.path
        for lock in self._locks():
            mine = lock.parent.name == self.shard
            clash = mine or lock.parent.name.partition("-of-")[2] != str(options.shard[1])
            if clash and not (mine and ours) and (holder := held(lock)):
                raise GigamorphError(f"{out}: {holder} writes to it; wait for it, or name another --out")

    def _refuse_foreign(self) -> dict[str, Any] | None:
        """What `run.json` says of the run that the folder holds, if any; refuse what is of another command."""
        job, out = self._job, self.path
        found = _read_description(out / "run.json")
        if found is None or not self.begun():
            if found is None and job.product and (out / job.product).exists():
                raise GigamorphError(
                    f"{out / job.product}: already exists, and no run.json says of which run; name another --out"
                )
            trained = next((name for name in _OF_TRAINING if (out / name).exists()), None)
            if trained is not None:
                raise GigamorphError(f"{out}: holds a run of gigamorph train ({trained}); name another --out")
            return None
        if found["kind"] != job.kind:
            raise GigamorphError(f"{out}: is of gigamorph {found['kind']}; name another --out")
        return found

    def clear(self) -> None:
        """Take a run of this kind away, with all that it wrote; nothing else that lies in the folder.

        Raises:
            GigamorphError: as `refuse`, or what cannot be removed.
        """
        self.refuse(ours=False)
        job, out = self._job, self.path
        try:
            of_images = [pattern for pattern in job.files if "{name}" in pattern]
            for rows in read_results(self.parts, [job.named]) if of_images else ():
                for name in (pattern.format(name=row[job.named]) for row in rows for pattern in of_images):
                    (out / name).unlink(missing_ok=True)
            own = [name for name in job.files if name not in of_images]
            for name in (*own, "quarantine.csv", "stored", "quarantine", "parts", "run.json"):
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(out, error, "name another --out") from error

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
        elif not others and not self.begun():  # of a run that came to nothing
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

    def begun(self) -> bool:
        """Whether there is any result or failure."""
        return self._begun("*-of-*")

    def _begun(self, shards: str) -> bool:
        """Whether there is any result or failure of these shards."""
        found = (path for kept in (self.parts, self.quarantine) for path in kept.glob(f"{shards}/*"))
        return any(path.name != "_lock" for path in found)

    def _locks(self) -> list[Path]:
        return sorted(self.parts.glob("*-of-*/_lock"))


def _read_description(path: Path) -> dict[str, Any] | None:
    try:
        found = {"kind": "predict", "flip": [], "white": None, **parse_json(path.read_text(encoding="utf-8"))}
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
        own = temporary_name(path)
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
