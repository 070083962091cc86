"""Shared by all tests: Triton's interpreter, threads, the operator that torchvision may lack, and the real data."""

import base64
import functools
import gc
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples at every run: what fails once fails again.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

# TorchDynamo composes a trace of each recording while its logger has a handler. pytest adds one to every logger that
# does not propagate, but nothing reads the trace here.
_trace = logging.getLogger("torch.__trace")
_trace.handlers.clear()
_trace.addHandler = lambda hdlr: None

# Tests share helpers by plain imports: `from exactness import assert_exact`.
sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parent)]

# Tests name networks of their own modules in options and checkpoints; test_trust.py has its own setting.
os.environ.setdefault("GIGAMORPH_TRUST", "*")

# Without a GPU, kernels run in Triton's interpreter. It is chosen when Triton is imported, for the whole process, and
# torchvision and TorchDynamo import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import torch._dynamo  # noqa: E402

# A CUDA build of torchvision on a CPU build of torch lacks this operator and cannot be imported (nor timm or
# lightning after it). Defining it makes the import succeed; nothing here calls it.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A look at all objects for garbage takes a fifth of a second or more here, where so much is imported: a few times less
# often than usually.
gc.set_threshold(10_000, 20, 200)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """With PyTorch 2.11 and 2.12, whose TorchDynamo supports less of Python, its refusals do not count as failures."""
    report = yield
    if report.failed and call.excinfo is not None and torch.__version__ < "2.13":
        kind, error = call.excinfo.typename, str(call.excinfo.value)
        older = "cannot be recorded by TorchDynamo" in error or "or use PyTorch 2." in error
        if kind == "UnsupportedError" and older:
            report.outcome, report.longrepr = "skipped", (__file__, 0, f"refused: {error}")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of tests/slow.txt, which `make quick` leaves out."""
    from slow import read

    slow, root = read(), Path(__file__).parents[1]
    for item in items:
        if item.name.partition("[")[0] in slow.get(str(item.path.relative_to(root)), ()):
            item.add_marker("slow")


@pytest.fixture(scope="module", autouse=True)
def few_recordings() -> Iterator[None]:
    """What TorchDynamo keeps of the networks of a test file is dropped; what is left is not looked at for garbage."""
    yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


PICTURE = base64.b64decode(  # of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
RATES = {"gb_per_s": 10.0, "tflop_per_s fp32": 0.1}


@pytest.fixture
def named_rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The rates of this machine for `gigamorph plan`, which measures them; tests/engine/bench does so for itself."""
    monkeypatch.setattr("gigamorph.engine.bench.roofline.measure_ceilings", lambda device, seconds: RATES)
    return RATES


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of runs are composed, but not drawn, which takes a fifth of a second each.

    They are drawn in tests/engine/train/test_curves.py and on the pages that tests/test_docs.py runs.
    """
    monkeypatch.setattr("gigamorph.engine.report.figure.png", lambda figure: PICTURE)


@pytest.fixture
def forked_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes in which peers are measured are forked; some tests begin them as users do."""
    import forked

    stand_in = types.SimpleNamespace(Popen=forked.Server, PIPE=subprocess.PIPE)
    monkeypatch.setattr("gigamorph.engine.bench.process.subprocess", stand_in)


@pytest.fixture
def untiled_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports compare logits with those of the untiled network, not with those by tiles, which are two recordings.

    tests/engine/published/test_importing.py and tests/engine/mammography/layouts compare them by tiles.
    """

    def untiled(network: torch.nn.Module, image: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
        with torch.no_grad():
            return network(image)

    monkeypatch.setattr("gigamorph.engine.published.reference._by_tiles", untiled)


@pytest.fixture
def no_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on the CPU allocate in the C library's heap, as they do where no compiler is."""
    reason = functools.cache(lambda: "a test leaves it out")
    monkeypatch.setattr("gigamorph.engine.tiling.arena._found", reason)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real mammograms and tables, or skip."""
    folder = Path(os.environ.get("GIGAMORPH_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set GIGAMORPH_REAL_DATA")
    return folder
