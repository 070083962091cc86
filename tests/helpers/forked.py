"""Functions, commands and servers in processes of their own, forked from one that has imported all that takes long.

A new interpreter takes seconds to import PyTorch, Lightning and the rest; a fork takes them over.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "gigamorph.cli.train",
        "gigamorph.engine.train.fit",
        "gigamorph.engine.mammography.recipes.dvme",
        "gigamorph.engine.mammography.recipes.siamese",
        "gigamorph.engine.bench.work",
        "hypothesis",
        "sklearn.metrics",
        "tifffile",
        "timm",
        "torch._dynamo.repro.after_dynamo",  # these three are imported in the first recording of a process
        "torch.distributed.tensor.experimental._func_map",
        "torch.export._trace",
        "torch.distributed.optim",
        "torch.distributed.run",
    ]
)


class Forked:
    """`function(*args)` in a session of its own; what it prints goes to files.

    Args:
        function: of a module in tests/helpers, or of the package.
        env: what its environment has besides this one's.
        limit: the system refuses what goes beyond so many bytes of a file, as a full disk does.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *args: Any,
        env: Mapping[str, str] | None = None,
        limit: int | None = None,
    ):
        self._folder = tempfile.TemporaryDirectory()
        for number in ("1", "2"):
            (Path(self._folder.name) / number).touch()
        given = (Path(self._folder.name), {**os.environ, **(env or {})}, limit, function, args)
        self._process = _SERVER.Process(target=_work, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float = 240) -> int | None:
        """Its exit code, when it has ended; None if it has not in so many seconds."""
        self._process.join(timeout)
        return self._process.exitcode

    def end(self) -> None:
        """Have it end, and what it has started, if it has not."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    @property
    def output(self) -> str:
        """What it has printed."""
        return (Path(self._folder.name) / "1").read_text()

    @property
    def error(self) -> str:
        """What it has printed to its standard error."""
        return (Path(self._folder.name) / "2").read_text()


class Server:
    """Stands in for the `subprocess.Popen` of `gigamorph.engine.bench.process`: as that process, but forked.

    Args:
        words: of its command, `python -m gigamorph.engine.bench.process SERVER`.
        env: what its environment is.
    """

    def __init__(self, words: list[str], env: Mapping[str, str], **pipes: Any):
        ends = [_SERVER.Pipe(duplex=False) for _ in range(3)]
        theirs = [ends[0][0], ends[1][1], ends[2][1]]
        lean = "MALLOC_TRIM_THRESHOLD_" in env
        given = theirs, dict(env), lean, words[3]
        self._process = _SERVER.Process(target=_serve, args=given, daemon=True)  # it ends with this one
        self._process.start()
        for end in theirs:
            end.close()
        self.stdin: IO[str] = os.fdopen(os.dup(ends[0][1].fileno()), "w")
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end, _ in ends[1:])
        for end in (ends[0][1], ends[1][0], ends[2][0]):
            end.close()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode


def command(*words: object, **options: Any) -> Forked:
    """`gigamorph WORDS`."""
    return Forked(gigamorph, [str(word) for word in words], **options)


def gigamorph(words: list[str]) -> None:
    from gigamorph.cli.main import main

    main(words)


def own_imports(names: list[str]) -> None:
    """Print which modules of gigamorph importing these modules imports, as in a new interpreter."""
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "gigamorph"]:
        del sys.modules[name]
    torch.compiler.substitute_in_graph = lambda *args, **options: lambda function: function  # it allows no second one
    for name in names:
        importlib.import_module(name)
    print(*sorted(name for name in sys.modules if name.partition(".")[0] == "gigamorph"))


def devices(words: list[str]) -> None:
    """`gigamorph WORDS`, whose processes are forked from this one and not begun anew."""
    _fork_devices()
    gigamorph(words)


def with_forked_devices(folder: str, name: str, *args: str) -> None:
    """Print what the command of a module in a folder returns, whose processes are forked as well."""
    _fork_devices()
    sys.path.append(folder)
    print(importlib.import_module(name).main.callback(*(Path(arg) for arg in args)))


def _fork_devices() -> None:
    from torch import multiprocessing as torch_processes

    torch_processes.start_processes = functools.partial(_by_fork, torch_processes.start_processes)


def _by_fork(start: Callable[..., Any], *args: Any, start_method: str, **options: Any) -> Any:
    return start(*args, start_method="fork", **options)


def torchrun(options: list[str], words: list[str]) -> None:
    """`torchrun OPTIONS -m gigamorph.cli.main WORDS`, whose processes are forked as well and say which they are."""
    from torch.distributed import run
    from torch.distributed.launcher import api

    config, *_ = run.config_from_args(run.parse_args([*options, "-m", "gigamorph.cli.main", *words]))
    config.start_method = "fork"
    api.elastic_launch(config, _rank)(words)


def _rank(words: list[str]) -> None:
    print(f"rank {os.environ['RANK']} is process {os.getpid()}", flush=True)
    gigamorph(words)


def _serve(pipes: Sequence[Connection], env: dict[str, str], lean: bool, server: str) -> None:
    from gigamorph.engine.bench import roofline
    from gigamorph.engine.bench.process import serve

    # They take seconds; tests/engine/bench/test_roofline.py measures them.
    roofline.measure_ceilings = lambda device, seconds=0.0: {"gb_per_s": 10.0, "tflop_per_s fp32": 0.1}
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(env)
    if lean:  # what the C library takes from the environment where a process begins
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 65536)
    serve(server)


def _work(
    folder: Path, env: dict[str, str], limit: int | None, function: Callable[..., object], args: tuple[object, ...]
) -> None:
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(folder / str(number), os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[0] = "gigamorph"
    # A shell that runs tests in the background has switched Ctrl-C off for all that comes of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    function(*args)
