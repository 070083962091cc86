"""Messages for calls that cannot be recorded: refused by name, or recognised by errors of fake tensors."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedError

SPARSE = "makes a sparse tensor; make it dense"
REFUSED = {
    # PyTorch reads the indices, which have no values in a recording.
    **{f"sparse_{kind}_tensor": SPARSE for kind in ("coo", "compressed", "csr", "csc", "bsr", "bsc")},
    "_version": "reads the version counter of a tensor (_version), which differs by tiles; use a counter",
    "set_": "replaces the memory of a tensor; write values with copy_",
    "resize_": "changes the size of a tensor in place; make a new tensor",
    "resize_as_": "changes the size of a tensor in place; make a new tensor",
    "native_group_norm": "calls native_group_norm with the image's size as numbers; use F.group_norm",
}
# Classes of PyTorch's errors about fake tensors. Without these names, such a call has PyTorch's own message.
NEEDS_VALUES = ("DataDependentOutputException", "DynamicOutputShapeException")
_NOT_FAKE = ("UnsupportedFakeTensorException", "UnsupportedOperatorException")
BACKBONE = "accelerate the part that needs the memory: net.backbone = accelerate(net.backbone, ...)"
# Texts that occur in errors about fake tensors.
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
    """The error for a call that needs a tensor's value, which is unknown without the image."""
    return UnsupportedError(
        f"{where} takes a Python value or a shape from the image or another tensor ({call}); data-dependent control "
        "flow cannot be recorded; use torch.where, or do it outside of the forward"
    )


def as_refusal(error: Any, where: str) -> Exception:
    """The network's own error unchanged; an error that only fake tensors raise becomes a refusal."""
    if type(error).__name__ in NEEDS_VALUES:
        return data_dependent(where, str(error.func))
    text = str(error).strip().splitlines()[:1] or [type(error).__name__]
    if type(error).__name__ in _NOT_FAKE:
        return UnsupportedError(f"{where} makes a call that cannot be recorded ({text[0]}); use plain PyTorch ops")
    if "Runtime assertion failed for expression" in str(error):  # an assumption of TorchDynamo about unknown sizes
        return data_dependent(where, "a size that depends on a mask")
    if "functions with out=" in str(error):
        return UnsupportedError(f"{where} writes a tensor that requires gradients to out=; remove that argument")
    if "data is not allocated" in str(error):
        return UnsupportedError(
            f"{where} reads values of tensors, which are unknown in a recording; combine tensors by torch.stack, not "
            "by torch.tensor"
        )
    if isinstance(error, UnsupportedError) or not any(word in str(error) for word in _FAKE):
        return error
    return UnsupportedError(f"{where} makes a call that cannot be recorded ({text[0]}); use plain PyTorch ops")
