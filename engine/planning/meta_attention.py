"""Attention on meta tensors with the memory of the CPU's kernel.

    softmax(Q K^T * scale + mask) V

PyTorch's CPU kernel goes through the keys in blocks, with a running maximum and sum, and saves one number per query. On
meta tensors PyTorch allocates all scores, and scaled copies of queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..torch_private import FakeTensorMode, cpu_attention, without_dispatch_modes


class AttentionOfTheCPU(TorchFunctionMode):
    """Calls the CPU's blockwise kernel for `scaled_dot_product_attention` on meta tensors, if the CPU would use it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    plain = not options.get("enable_gqa") and (attn_mask is None or attn_mask.dtype != torch.bool)
    if not plain or any(not t.is_meta for t in tensors) or not _by_blocks(tensors, dropout_p, is_causal):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    return cpu_attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0]


def _by_blocks(tensors: list[Tensor], dropout: float, causal: bool) -> bool:
    """Whether the CPU uses its blockwise kernel for these tensors, from the backward node's name for fake tensors."""
    with without_dispatch_modes(), FakeTensorMode(), torch.enable_grad():
        query, key, value, *masks = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu", requires_grad=t.requires_grad)
            for t in tensors
        )
        mask = masks[0] if masks else None
        made = F.scaled_dot_product_attention(query.requires_grad_(), key, value, mask, dropout, causal)
    return type(made.grad_fn).__name__.startswith("ScaledDotProductFlashAttentionForCpu")
