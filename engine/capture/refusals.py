"""Why a call of a forward cannot be recorded, in words: what is refused by name, and what only fake tensors raise."""

from __future__ import annotations

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from ..errors import UnsupportedError

SPARSE = "makes a sparse tensor; make it dense"
REFUSED = {
    # PyTorch looks at the indices, which have no values here.
    **{f"sparse_{kind}_tensor": SPARSE for kind in ("coo", "compressed", "csr", "csc", "bsr", "bsc")},
    "_version": "asks how often a tensor was written to (_version), which is another number by tiles; keep a counter",
    "set_": "puts another memory under a tensor; write values with copy_",
    "resize_": "changes the size of a tensor in place; make a new one",
    "resize_as_": "changes the size of a tensor in place; make a new one",
    "native_group_norm": "calls native_group_norm with the image's size as numbers; use F.group_norm",
}
BACKBONE = "accelerate the part that takes the memory: net.backbone = accelerate(net.backbone, ...)"
# What errors about tensors without values have in them.
_FAKE = (
    "FakeTensor",
    "fake tensor",
    "fake mode",
    "Fake",
    "meta tensor",
    "Meta tensor",
    "must be 'meta'",
    "data_ptr",
    "data pointer",
    "doesn't have storage",
    "numpy",
)


def data_dependent(where: str, call: str) -> UnsupportedError:
    """That a call takes a value out of a tensor which only the image gives."""
    return UnsupportedError(
        f"{where} takes a Python value or a shape from the image or another tensor ({call}); such data-dependent "
        "control flow cannot be recorded; use torch.where, or do it outside of the forward"
    )


def as_refusal(error: Exception, where: str) -> Exception:
    """The network's own error as it is; one that only tensors without values raise as a refusal."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return data_dependent(where, str(error.func))
    text = str(error).strip().splitlines()[:1] or [type(error).__name__]
    if isinstance(error, (UnsupportedFakeTensorException, UnsupportedOperatorException)):
        return UnsupportedError(f"{where} calls what cannot be recorded ({text[0]}); use plain PyTorch")
    if "Runtime assertion failed for expression" in str(error):  # what TorchDynamo has supposed of unknown sizes
        return data_dependent(where, "a size that a mask gives")
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
