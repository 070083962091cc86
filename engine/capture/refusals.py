"""Why a call of a forward cannot be recorded, in words: what is refused by name, and what only fake tensors raise."""

from __future__ import annotations

import sys
from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from ..errors import UnsupportedError

SPARSE = "makes a sparse tensor; make it dense"
PLACES = frozenset({"data_ptr", "untyped_storage", "storage", "is_set_to"})
REFUSED = {
    "register_hook": "registers a hook on a tensor that it has not made; do so outside of the forward",
    "register_post_accumulate_grad_hook": "registers a hook on a tensor; do so outside of the forward",
    "_version": "asks how often a tensor was written to (_version), which is another number by tiles; keep a counter",
    **dict.fromkeys(
        PLACES,
        "asks where a tensor lies in memory (data_ptr, copy.copy), which is elsewhere by tiles; use 'is' and clone()",
    ),
    # PyTorch looks at the indices, which have no values here.
    **{f"sparse_{kind}_tensor": SPARSE for kind in ("coo", "compressed", "csr", "csc", "bsr", "bsc")},
    "grad_fn": "looks at the graph of a tensor (grad_fn), which is another one by tiles; register hooks on the tensor",
    "backward": "differentiates inside the forward; do so outside of it",
    "grad": "reads or takes a gradient inside the forward; do so outside of it",
    "set_": "puts another memory under a tensor; write values with copy_",
    "resize_": "changes the size of a tensor in place; make a new one",
    "resize_as_": "changes the size of a tensor in place; make a new one",
    "native_group_norm": "calls native_group_norm with the image's size as numbers; use F.group_norm",
    "__dlpack__": "hands a tensor's memory to other code; use PyTorch ops, or .numpy() for the values of a buffer",
    "__reduce_ex__": "copies or pickles a tensor (copy.copy, torch.save); use clone(), and save outside of the forward",
    "share_memory_": "moves a tensor to shared memory; do so outside of the forward",
}
# What errors about tensors without values have in them.
_FAKE = (
    "FakeTensor",
    "fake tensor",
    "fake mode",
    "Fake",
    "meta tensor",
    "Meta tensor",
    "data_ptr",
    "data pointer",
    "doesn't have storage",
    "numpy",
)


def data_dependent(where: str, call: str) -> UnsupportedError:
    """That a call takes a value out of a tensor which only the image gives."""
    frame: Any = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("torch/distributions/distribution.py"):
        frame = frame.f_back
    own = "use torch.where, or do it outside of the forward"
    return UnsupportedError(
        f"{where} takes a Python value or a shape from the image or another tensor ({call}); such data-dependent "
        f"control flow cannot be recorded; {own if frame is None else 'give the distribution validate_args=False'}"
    )


def as_refusal(error: Exception, where: str) -> Exception:
    """The network's own error as it is; one that only tensors without values raise as a refusal."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return data_dependent(where, str(error.func))
    text = str(error).strip().splitlines()[:1] or [type(error).__name__]
    if isinstance(error, (UnsupportedFakeTensorException, UnsupportedOperatorException)):
        return UnsupportedError(f"{where} calls what cannot be recorded ({text[0]}); use plain PyTorch")
    if "functions with out=" in str(error):
        return UnsupportedError(f"{where} writes to out= what gradients flow through; drop that argument")
    if "data is not allocated" in str(error):
        return UnsupportedError(
            f"{where} takes the values of tensors, which a recording has not; make one tensor of several by "
            "torch.stack, not by torch.tensor"
        )
    if isinstance(error, UnsupportedError) or not any(word in str(error) for word in _FAKE):
        return error
    return UnsupportedError(f"{where} calls what cannot be recorded ({text[0]}); use plain PyTorch ops")
