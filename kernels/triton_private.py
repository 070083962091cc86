"""What the kernels use of Triton that a release may change; no other file has it (tests/gates.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
from triton import knobs

try:
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
except ImportError:
    TensorDescriptor = None

HAS_DESCRIPTORS = TensorDescriptor is not None
# Since Triton 3.7 descriptors round loaded values; before, tensor cores truncated the lower bits of float32.
ROUNDS_TO_TF32 = "round_f32_to_tf32" in getattr(TensorDescriptor, "__dataclass_fields__", ())


def jit_kernel(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for a kernel that is launched.

    A multiplication and the addition after it become one instruction in every release. Triton 3.10 changes the default,
    and with it speed and the last bits of results.

    Args:
        do_not_specialize: integer arguments whose value does not change the code.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        made: Any = triton.jit(function, do_not_specialize=do_not_specialize)

        def run(*args: Any, **options: Any) -> Any:
            return type(made).run(made, *args, enable_fp_fusion=True, **options)

        made.run = run
        return made

    return decorate


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return knobs.runtime.interpret


def compile_target() -> Any:
    """The GPU that the active driver compiles for (`backend`, `arch`); None without a driver."""
    try:
        return triton.runtime.driver.active.get_current_target()
    except (RuntimeError, AttributeError):
        return None
