"""What is wrong with a compiled kernel: what cannot run on a chip, and what cannot be fast there."""

from __future__ import annotations

import re

from compile_only import MI300, CompiledLaunch, overflows, read_code

from gigamorph.kernels.tuning import SHARED_LIMIT


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
    code, ttir = read_code(launch.kernel), launch.kernel.asm["ttir"]
    found, limit = [], SHARED_LIMIT[0 if chip == MI300 else chip]
    if code.shared > limit:
        found.append(f"shared memory {code.shared:,} > {limit:,}")
    if code.spilled:
        found.append(f"{code.spilled} spills")
    x, y, z = (*launch.grid, 1, 1)[:3]
    if x >= 2**31 or max(y, z) > 65535 or min(x, y, z) < 1:
        found.append(f"grid {launch.grid}")
    if chip == 90 and wants_wgmma(ttir) and not code.wgmma:
        found.append("no wgmma")
    if re.search(r"tt\.dot .*(inputPrecision = tf32|x(bf16|f16)> \*)", ttir) and not code.wgmma + code.mma:
        found.append("no mma")
    if chip in (90, 100) and "tt.descriptor_load" in ttir and not code.descriptor_loads:
        found.append("no TMA load")
    if chip == 90:
        if plain_left_operands(ttir) and re.search(r"warp_group_dot %.* : tensor<", launch.kernel.asm["ttgir"]):
            found.append("left operand in registers")
        if in_flight(launch.kernel.asm["ttgir"]):
            found.append("register operand in flight")
        if serialized := re.search(r"\((C\d+)\).*wgmma.* serialized", launch.log):
            found.append(f"wgmma serialized ({serialized[1]})")
    return (*found, *overflows(launch))
