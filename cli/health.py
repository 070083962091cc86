"""What this machine has, and which known problems it has."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from .. import kernels
from ..engine.self_test import missing, self_test
from ..engine.tiling import arena
from ..engine.tiling.memory import available_bytes, format_bytes
from ..engine.versions import TESTED, newer, release, versions
from ..kernels import winograd
from ..kernels.choice import failures
from .messages import counted

PACKAGES = ("gigamorph", "torch", "triton", "lightning", "torchvision", "timm", "pydicom", "imagecodecs", "numpy")
_SAFE_LIGHTNING = (2, 6, 6)


@dataclass(frozen=True)
class Machine:
    """The facts that `problems` checks; sizes in bytes."""

    versions: dict[str, str]
    """Versions of the installed packages among `PACKAGES`."""
    import_errors: dict[str, str]
    """First line of the error of each installed package that cannot be imported."""
    cuda_build: str | None
    """CUDA version that torch was built for; None for a CPU build."""
    gpus: tuple[str, ...]
    """GPUs that torch can use."""
    driver: str | None
    """Driver version and GPU as reported by nvidia-smi; None if it is missing or fails."""
    cores: int
    """CPU cores that this process may use."""
    threads: int
    """Threads that torch uses."""
    memory: int
    shm: int | None
    """Size of /dev/shm; None if it does not exist."""
    kernels_lack: str | None = None
    """What Triton lacks to compile kernels; None if it lacks nothing, or without a GPU."""
    failed_kernels: tuple[str, ...] = ()
    """Kernels that failed on this GPU before, with the cause."""
    arena_lacks: str | None = None
    """Why steps on the CPU cannot allocate in an arena; None if they do."""
    winograd_lacks: str | None = None
    """Why convolutions of 3 x 3 on the CPU are not computed by Winograd's filtering; None if they are."""
    missing_names: tuple[tuple[str, str], ...] = ()
    """Private names of PyTorch that it does not have, and what happens without each."""
    difference: str | None = None
    """What differs from stock PyTorch in the self-test; None if nothing does."""


@dataclass(frozen=True)
class HealthProblem:
    what: str
    fix: str
    level: str = "warning"
    """"error" prevents work; "warning" slows it down or disables a feature."""


def probe() -> Machine:
    """Collect the facts of this machine; imports torch, torchvision, timm and imagecodecs."""
    import torch

    installed = versions(*PACKAGES)
    errors = {}
    for name in ("torchvision", "timm", "imagecodecs", "triton", "lightning"):
        if name in installed:
            try:
                importlib.import_module(name)
            except Exception as error:  # any error is a result to report
                errors[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append(f"{gpu.name}, {format_bytes(gpu.total_memory)}, sm_{gpu.major}{gpu.minor}")
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    lacks = kernels.missing() if gpus else None
    failed = {} if lacks or not gpus else failures()
    return Machine(
        versions=installed,
        import_errors=errors,
        cuda_build=torch.version.cuda,
        gpus=tuple(gpus),
        driver=_driver(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=available_bytes(),
        shm=shm,
        kernels_lack=lacks,
        arena_lacks=arena.missing(),
        winograd_lacks=winograd.missing(),
        missing_names=tuple((name.path, name.without) for name in missing()),
        difference=self_test(),
        failed_kernels=tuple(f"{op}: {cause}" for op, causes in failed.items() for cause in causes.values()),
    )


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None


def facts(machine: Machine) -> list[tuple[str, str]]:
    """Return pairs of name and text; the last pair states which device will be used and why."""
    rows = [
        (
            "system",
            f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
        ),
        ("CPU", f"{counted(machine.cores, 'core')} usable, torch uses {counted(machine.threads, 'thread')}"),
        ("memory", f"{format_bytes(machine.memory)} available"),
        ("CPU steps", "allocate in an arena" if machine.arena_lacks is None else "allocate in the C library's heap"),
        ("CPU 3 x 3", f"oneDNN: {machine.winograd_lacks}" if machine.winograd_lacks else "Winograd's filtering"),
        (
            "self-test",
            "equal to stock PyTorch (float64)" if machine.difference is None else "differs from stock PyTorch",
        ),
        ("GPU", "; ".join(machine.gpus) or "none that torch can use"),
        ("driver", machine.driver or "nvidia-smi not found"),
    ]
    rows += [(name, machine.versions.get(name, "not installed")) for name in PACKAGES]
    if machine.gpus:
        why = "cuda: torch can use a GPU"
    elif machine.cuda_build is None:
        why = "cpu: this torch is a CPU build"
    else:
        why = f"cpu: torch is built for CUDA {machine.cuda_build}, but no GPU can be used"
    rows.append(("will use", why))
    return rows


def problems(machine: Machine) -> list[HealthProblem]:
    """Return the known problems of this machine."""
    return [
        *_torchvision_problems(machine),
        *_gpu_problems(machine),
        *_host_problems(machine),
        *_package_problems(machine),
        *_version_problems(machine),
        *_pytorch_problems(machine),
    ]


def _torchvision_problems(machine: Machine) -> Iterator[HealthProblem]:
    torch_version = machine.versions.get("torch", "")
    vision = machine.import_errors.get("torchvision")
    if vision is not None:
        matched = "torchvision::nms" in vision
        what = (
            f"torchvision {machine.versions['torchvision']} was not built for torch {torch_version} "
            "(operator torchvision::nms does not exist); timm and Lightning fail with it"
            if matched
            else f"torchvision cannot be imported: {vision}"
        )
        index = "https://download.pytorch.org/whl/" + ("cpu" if machine.cuda_build is None else "cu" + _digits(machine))
        yield HealthProblem(
            what + "; gigamorph works because it declares the missing operator, but other programs fail",
            f"pip install --force-reinstall --no-deps torchvision --index-url {index} (or uninstall torchvision)",
        )


def _gpu_problems(machine: Machine) -> Iterator[HealthProblem]:
    """Yield GPUs that torch cannot use, and kernels that cannot run on them."""
    if machine.cuda_build is not None and not machine.gpus:
        fix = (
            "update the driver to one that supports CUDA " + machine.cuda_build
            if machine.driver
            else "none needed if this machine has no GPU (a CPU build is smaller); otherwise install the NVIDIA "
            "driver, and in a container pass the GPU through (docker run --gpus all)"
        )
        yield HealthProblem(f"torch is built for CUDA {machine.cuda_build}, but finds no GPU", fix)
    if machine.cuda_build is None and machine.driver is not None:
        yield HealthProblem(
            f"the NVIDIA GPU ({machine.driver}) is unused: torch {machine.versions.get('torch', '')} is a CPU build",
            "pip install --force-reinstall torch (from PyPI: the CUDA build on Linux)",
        )
    if machine.kernels_lack is not None:
        what, _, fix = machine.kernels_lack.partition("; ")
        yield HealthProblem(f"kernels cannot be compiled, so PyTorch's own ops run on the GPU: {what}", fix)
    if machine.failed_kernels:
        first, *others = machine.failed_kernels
        several = f", and {len(others)} more" if others else ""
        yield HealthProblem(
            f"kernels failed on this GPU, so PyTorch's own ops replace them: {first}{several}",
            "report it with the output of gigamorph bench kernels; "
            "they are tried again after an update of torch, triton or gigamorph",
        )


def _host_problems(machine: Machine) -> Iterator[HealthProblem]:
    """Yield problems of threads, of the CPU allocator and of shared memory."""
    if machine.threads < machine.cores and machine.threads == 1:
        yield HealthProblem(
            f"torch uses 1 thread on {machine.cores} cores", f"unset OMP_NUM_THREADS, or set it to {machine.cores}"
        )
    if machine.threads > machine.cores:
        yield HealthProblem(
            f"torch uses {machine.threads} threads on {counted(machine.cores, 'usable core')}, which slows every step",
            f"export OMP_NUM_THREADS={machine.cores}",
        )
    if machine.arena_lacks is not None:
        what, _, fix = machine.arena_lacks.partition("; ")
        yield HealthProblem(
            f"steps on the CPU cannot allocate in an arena and take up to 1.5 times as long under a budget: {what}",
            fix or "apt install g++, or conda install -c conda-forge gxx",
        )
    if machine.shm is not None and machine.shm < 2**30:
        yield HealthProblem(
            f"/dev/shm has {format_bytes(machine.shm)}; DataLoader workers die with 'bus error' when it is full",
            "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm",
        )


def _package_problems(machine: Machine) -> Iterator[HealthProblem]:
    """Yield missing or broken packages that commands need."""
    lightning = machine.versions.get("lightning")
    if lightning is None:
        yield HealthProblem("lightning is not installed; training needs it", "pip install 'lightning>=2.6.6'", "error")
    elif release(lightning) < _SAFE_LIGHTNING:
        yield HealthProblem(
            f"lightning {lightning}: before 2.6.6, checkpoints can run hidden code; 2.6.2 and 2.6.3 were malware",
            "pip install 'lightning>=2.6.6'",
            "error",
        )
    elif "lightning" in machine.import_errors and "torchvision" not in machine.import_errors:
        what = f"lightning cannot be imported: {machine.import_errors['lightning']}"
        yield HealthProblem(what, "pip install --force-reinstall 'lightning>=2.6.6'", "error")
    if "imagecodecs" not in machine.versions or "imagecodecs" in machine.import_errors:
        yield HealthProblem(
            "imagecodecs is missing or broken; compressed DICOM, TIFF and PNG cannot be read",
            "pip install --force-reinstall imagecodecs",
            "error",
        )


def _version_problems(machine: Machine) -> Iterator[HealthProblem]:
    """Yield packages that are newer than the tested versions; their behaviour may have changed."""
    found = newer(machine.versions)
    if found:
        full = ", ".join(f"{name} {tested.oldest} to {tested.newest}" for name, tested in found.items())
        named = " and ".join(f"{name} {machine.versions[name]}" for name in found)
        former = " ".join(f"'{name}=={tested.newest}.*'" for name, tested in found.items())
        yield HealthProblem(
            f"{named}: newer than the tested versions ({full})",
            "none needed while results are correct: accelerate(network, verify=True) compares a network with ordinary "
            "PyTorch, as does gigamorph bench step --model NAME --size 512x512 --peer stock --peer gigamorph; if they "
            f"differ, report it, and pip install {former}",
        )


def _pytorch_problems(machine: Machine) -> Iterator[HealthProblem]:
    """Yield what the installed PyTorch does not have, and a failed self-test."""
    tested = TESTED["torch"]
    fix = f"install torch {tested.oldest} to {tested.newest}, with which gigamorph is tested, and report this"
    for path, without in machine.missing_names:
        yield HealthProblem(f"PyTorch {machine.versions.get('torch', '')} has no {path}: {without}", fix)
    if machine.difference is not None:
        yield HealthProblem(f"the self-test fails: {machine.difference}", fix, "error")


def _digits(machine: Machine) -> str:
    return (machine.cuda_build or "").replace(".", "")
