"""On a GPU: memory that captured graphs hold is in use, though the allocator calls it free."""

from __future__ import annotations

import pytest
import torch

from gigamorph.engine.cuda_graphs.buffers import CudaGraphs
from gigamorph.engine.tiling.memory import peak_bytes, reset_peak, used_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SIZE = 64 << 20


def test_what_a_graph_works_in_is_in_use_while_it_lives() -> None:
    device = torch.device("cuda", 0)
    total = torch.zeros((), device=device)
    before, allocated = used_bytes(device), torch.cuda.memory_allocated(device)
    replay = CudaGraphs(device).capture(lambda: total.add_(torch.ones(SIZE // 4, device=device).sum()))
    assert torch.cuda.memory_allocated(device) - allocated < SIZE <= used_bytes(device) - before < 2 * SIZE
    reset_peak(device)
    replay()
    assert total.item() == SIZE // 4 and SIZE <= peak_bytes(device) - before < 2 * SIZE
    del replay
    torch.cuda.empty_cache()
    assert used_bytes(device) - before < SIZE
