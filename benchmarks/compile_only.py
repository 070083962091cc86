"""Compile kernels as their launchers launch them, on a machine without a GPU, and read what came out.

Inside `compile_only(90)` every `kernel[grid](...)` is compiled and not run: a stand-in for the driver names the chip,
and the launchers get meta tensors of real sizes. So the code is specialised as it will be on the GPU (alignment,
32-bit or 64-bit integers, descriptors), and the grid is the real one. Triton must have been imported without
TRITON_INTERPRET.

`faults` says what cannot run on a chip, and what cannot be fast there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gigamorph.kernels.tuning import SHARED_LIMIT

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of one multiprocessor: shared memory in bytes (a block takes 1024 more than it asks for) and warps; registers.
MULTIPROCESSOR = dict.fromkeys((90, 100), (233_472, 64)) | dict.fromkeys((86, 89, 120), (102_400, 48))
MULTIPROCESSOR[80] = 167_936, 64
REGISTERS = 65_536
# AMD's MI300 by the digits of its name gfx942: of one compute unit, memory in bytes, registers of a lane, waves.
MI300 = 942
MI300_SHARED, MI300_REGISTERS, MI300_SIMDS, MI300_WAVES = 65_536, 512, 4, 8


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch: the compiled kernel, its grid, and the integers that each parameter was given."""

    name: str
    grid: tuple[int, ...]
    integers: dict[str, list[int]]
    kernel: Any
    log: str  # of ptxas
    seconds: float  # to compile; 0 if an earlier launch compiled it


class _Driver:
    """What JITFunction asks of a driver before it launches."""

    def __init__(self, chip: int):
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", f"gfx{self.chip}", 64) if self.chip == MI300 else GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        return self.chip  # kernels are cached per device: one cache per chip

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _integers(value: Any) -> list[int]:
    """The integers of an argument, those in a tuple too."""
    if isinstance(value, tuple):
        return [number for part in value for number in _integers(part)]
    return [int(value)] if isinstance(value, int) else []


@contextlib.contextmanager
def on_chip(chip: int) -> Iterator[None]:
    """Triton takes this chip for the machine's."""
    active = driver._active
    driver.set_active(_Driver(chip))
    try:
        yield
    finally:
        driver._active = active


@contextlib.contextmanager
def compile_only(chip: int) -> Iterator[list[CompiledLaunch]]:
    """Launches become compilations for a chip (10 * major + minor, or `MI300`); the list grows by one for each."""
    launches: list[CompiledLaunch] = []
    logs: dict[int, str] = {}
    before, dump = JITFunction.run, knobs.nvidia.dump_ptxas_log

    def run(self, *args, grid, warmup=False, **options):
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = before(self, *args, grid=grid, warmup=True, **options)
        fresh = id(kernel) not in logs
        logs.setdefault(id(kernel), log.getvalue())
        given = dict(zip(self.arg_names, args, strict=False)) | options
        if callable(grid):
            grid = grid(given)
        integers = {name: _integers(value) for name, value in given.items()}
        seconds = time.perf_counter() - began if fresh else 0.0
        launches.append(CompiledLaunch(self.__name__, tuple(grid), integers, kernel, logs[id(kernel)], seconds))
        return kernel

    with on_chip(chip):
        JITFunction.run, knobs.nvidia.dump_ptxas_log = run, True
        try:
            yield launches
        finally:
            JITFunction.run, knobs.nvidia.dump_ptxas_log = before, dump


@dataclass(frozen=True)
class Code:
    """What one compiled kernel needs and contains.

    Attributes:
        registers: of a thread.
        shared: dynamic shared memory of a block, bytes.
        spilled: stores of registers to local memory.
        wgmma, mma, descriptor_loads: instructions of the matrix units and the tensor memory accelerator.
    """

    registers: int
    shared: int
    warps: int
    spilled: int
    wgmma: int
    mma: int
    descriptor_loads: int

    def blocks(self, chip: int) -> int:
        """Blocks that one multiprocessor holds at a time."""
        if chip == MI300:
            waves = MI300_SIMDS * min(MI300_WAVES, MI300_REGISTERS // max(self.registers, 1))
            return min(waves // self.warps, MI300_SHARED // max(self.shared, 1))
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared, warps = MULTIPROCESSOR[chip]
        return min(REGISTERS // registers, shared // (self.shared + 1024), warps // self.warps)


@functools.cache
def read_code(kernel: Any) -> Code:
    """Disassemble a compiled kernel."""
    if "amdgcn" in kernel.asm:
        return _read_amd(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )

    def count(instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", sass))

    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Code(
        int(registers[1]),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        count("STL"),
        count("HGMMA"),
        count("HMMA") + count("UTCHMMA"),
        count("UTMALDG"),
    )


def _read_amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]

    def told(what: str) -> int:
        found = re.search(rf"\.{what}: +(\d+)", text)
        assert found is not None, what
        return int(found[1])

    # The matrix units' own registers are a part of the same file. Scalars that spill go to vector registers.
    registers, spilled = told("vgpr_count") + told("agpr_count"), told("vgpr_spill_count")
    products = len(re.findall(r"\bv_mfma_\w+", text))
    return Code(registers, kernel.metadata.shared, kernel.metadata.num_warps, spilled, 0, products, 0)


_OPERATION = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+) ?(.*?)(?: loc\(.*\))?$")
_LOOP = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+) step")
_ARGUMENT = re.compile(r"(%\w+): i\d+ (?:{[^}]*} )?loc\(\"(\w+)\"")  # name in the code, parameter
_NAMES = re.compile(r"%[\w#]+")
_SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.index_cast"}

Interval = tuple[int, int]


def overflows(launch: CompiledLaunch) -> list[str]:
    """Operations on 32-bit integers whose result may not fit, for the grid and the integers of a launch.

    Intervals are carried through the kernel's intermediate code. What is loaded from memory or carried around a loop is
    unknown, and so is what depends on it; unknown results are not reported.
    """
    text = launch.kernel.asm["ttir"]
    known: dict[str, Interval] = {}
    header = next(line for line in text.splitlines() if "tt.func public" in line)
    arguments: dict[str, list[str]] = {}
    for name, parameter in _ARGUMENT.findall(header):
        arguments.setdefault(parameter, []).append(name)
    for parameter, names in arguments.items():
        given = launch.integers.get(parameter, [])
        passed = given if len(given) == len(names) else [n for n in given if n != 1]  # 1 may be compiled in
        if len(passed) == len(names):  # not so for a descriptor, whose integers are not known here
            known.update((name, (number, number)) for name, number in zip(names, passed, strict=True))
    grid = dict(zip("xyz", (*launch.grid, 1, 1), strict=False))
    found = []
    for line in text.splitlines():
        if loop := _LOOP.search(line):
            index, first, end = loop.groups()
            if first in known and end in known:
                known[index] = known[first][0], max(known[end][1] - 1, known[first][0])
        if (match := _OPERATION.match(line)) is None:
            continue
        result, operation, rest = match.groups()
        interval = _interval(operation, rest, known, grid)
        if interval is None:
            continue
        if rest.endswith(("i32", "i32>")):
            low, high = interval
            if low < -(2**31) or high >= 2**31:
                found.append(f"{result[1:]} = {operation} may reach {max(-low, high):,}")
                continue
        known[result] = interval
    return found


def _interval(operation: str, rest: str, known: dict[str, Interval], grid: dict[str, int]) -> Interval | None:
    """The values an operation may have, or None if nothing is known."""
    if operation == "arith.constant":
        value = re.match(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]*)?i\d+", rest)
        return (int(value[1]),) * 2 if value else None
    if operation == "tt.get_program_id":
        return 0, grid[rest[0]] - 1
    if operation == "tt.get_num_programs":
        return (grid[rest[0]],) * 2
    if operation == "tt.make_range":
        end, start = (int(re.search(rf"{word} = (\d+)", rest)[1]) for word in ("end", "start"))  # pyright: ignore
        return start, end - 1
    operands = [known.get(name) for name in _NAMES.findall(rest)]
    if operation == "arith.select" and len(operands) == 3:
        operands = operands[1:]
    if not operands or None in operands:
        return None
    (a, b), *others = operands  # pyright: ignore
    if operation in _SAME:
        return a, b
    if len(others) != 1:
        return None
    c, d = others[0]
    match operation.removeprefix("arith."):
        case "addi":
            return a + c, b + d
        case "subi":
            return a - d, b - c
        case "muli":
            corners = [a * c, a * d, b * c, b * d]
            return min(corners), max(corners)
        case "shli" if c >= 0:
            corners = [a << c, a << d, b << c, b << d]
            return min(corners), max(corners)
        case "shrsi" if c >= 0:
            corners = [a >> c, a >> d, b >> c, b >> d]
            return min(corners), max(corners)
        case "divsi" if c > 0:
            corners = [v // w if v >= 0 else -(-v // w) for v in (a, b) for w in (c, d)]  # towards zero
            return min(corners), max(corners)
        case "remsi" if c > 0:
            return (0 if a >= 0 else max(a, 1 - d)), (min(b, d - 1) if b >= 0 else 0)
        case "andi" if a >= 0 and c >= 0:
            return 0, min(b, d)
        case "minsi":
            return min(a, c), min(b, d)
        case "maxsi":
            return max(a, c), max(b, d)
        case "select":
            return min(a, c), max(b, d)
    return None


def plain_left_operands(ttir: str) -> bool:
    """Whether every product takes its left operand from a descriptor load, unchanged but for its shape.

    A transposed float32 operand does not count: wgmma transposes 16-bit operands only.
    """
    source = {m[1]: (m[2], m[3]) for m in re.finditer(r"(%\w+) = (tt\.[\w]+) (%\w+)", ttir)}
    lefts = re.findall(r"= tt\.dot (%\w+),.*? : tensor<(?:\d+x)+(\w+)> \*", ttir)
    for name, kind in lefts:
        while source.get(name, ("", ""))[0] in ("tt.reshape", "tt.trans"):
            if source[name][0] == "tt.trans" and kind == "f32":
                return False
            name = source[name][1]
        if source.get(name, ("", ""))[0] != "tt.descriptor_load":
            return False
    return bool(lefts)


def in_flight(ttgir: str) -> bool:
    """Whether a loop may rewrite registers while a product of its last turn still reads its left operand there.

    That is so if the operand is computed in the loop and the loop ends without a wait for the product: a wait leaves
    the last `pendings` products unfinished. Only what stands no deeper than the product runs after it for certain.
    """
    ends: list[int] = []  # indentation of the loops around a line
    home: dict[str, int] = {}  # number of loops around the definition of a name
    flying: list[list[int]] = []  # home of the operand, indentation of the product, products issued since
    for line in ttgir.splitlines():
        depth = len(line) - len(line.lstrip())
        if ends and depth == ends[-1] and line.lstrip().startswith("}"):
            if any(other[0] == len(ends) for other in flying):
                return True
            ends.pop()
        results, _, operation = line.partition(" = ")
        if results.lstrip().startswith("%"):
            same = re.match(r"tt\.(?:reshape|trans|split) (%\w+)", operation)  # other names for the same registers
            loops = home[same[1]] if same else len(ends)
            home.update((name, loops) for name in re.findall(r"%\w+", results))
        if "scf.for " in line:
            ends.append(depth)
            carried = re.search(r"iter_args\((.*?)\)", line)
            home.update((name, len(ends)) for name in re.findall(r"(%\w+) =", carried[1] if carried else ""))
        product = re.match(r"ttng\.warp_group_dot (%\w+).* : (!ttg|tensor)\b.* \* ", operation)
        wait = re.match(r"ttng\.warp_group_dot_wait .*pendings = (\d+)", operation)
        for other in flying:
            other[2] += product is not None and depth <= other[1]
        if wait or (product and "isAsync = true" not in operation):
            pendings = int(wait[1]) if wait else 0
            flying = [other for other in flying if depth > other[1] or other[2] < pendings]
        elif product and product[2] == "tensor":
            flying.append([home[product[1]], depth, 0])
    return False


def wants_wgmma(ttir: str) -> bool:
    """Whether a product is one that wgmma can do: of 16-bit numbers, or of TF32 with a transposed right operand.

    wgmma takes 64 rows at least. Kernels with pointers may have fewer, for the channels of small groups.
    """
    transposed = re.findall(r"(%\w+) = tt\.trans", ttir)
    products = re.findall(r"= tt\.dot %\w+, (%\w+),.*? : tensor<(\d+)x(?:\d+x)*(\w+)> \*", ttir)
    tf32, described = "inputPrecision = tf32" in ttir, "tt.descriptor_load" in ttir
    return any(
        (kind in ("bf16", "f16") or (tf32 and right in transposed)) and (described or int(rows) >= 64)
        for right, rows, kind in products
    )


def faults(launch: CompiledLaunch, chip: int) -> tuple[str, ...]:
    """What is wrong with a launch, in a few words each."""
    code, asm, limit = read_code(launch.kernel), launch.kernel.asm, SHARED_LIMIT[0 if chip == MI300 else chip]
    ttir, (x, y, z) = asm["ttir"], (*launch.grid, 1, 1)[:3]
    serialized = re.search(r"\((C\d+)\).*wgmma.* serialized", launch.log)
    # max.f32 of NaN and a number is the number; integers have other names (max.s32).
    drops = r"arith\.(max|min)numf|tt\.clampf .*propagateNan = none|\b(max|min)(\.ftz)?\.b?f\d+\w*"
    busy = code.warps * code.blocks(chip)
    dropped = re.search(drops, ttir + asm.get("ptx", ""))
    found = {
        f"shared memory {code.shared:,} > {limit:,}": code.shared > limit,
        f"{code.spilled} spills": code.spilled,
        f"grid {launch.grid}": x >= 2**31 or max(y, z) > 65535 or min(x, y, z) < 1,
        "no wgmma": chip == 90 and wants_wgmma(ttir) and not code.wgmma,
        "no mma": re.search(r"tt\.dot .*(inputPrecision = tf32|x(bf16|f16)> \*)", ttir) and not code.wgmma + code.mma,
        "no TMA load": chip in (90, 100) and "tt.descriptor_load" in ttir and not code.descriptor_loads,
        "left operand in registers": chip == 90
        and plain_left_operands(ttir)
        and re.search(r"warp_group_dot %.* : tensor<", asm["ttgir"]),
        "register operand in flight": chip == 90 and in_flight(asm["ttgir"]),
        f"wgmma serialized ({serialized and serialized[1]})": chip == 90 and serialized,
        f"{dropped and dropped[0].split()[0]} drops NaN": dropped,
        f"{busy} of 48 warps": "conv2d_pointer" in launch.name and chip in (86, 89, 120) and busy < 12,
    }
    return (*(text for text, wrong in found.items() if wrong), *overflows(launch))
