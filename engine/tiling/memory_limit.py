"""What a step may take of this process's memory on the CPU."""

from __future__ import annotations

from .memory import return_free_pages, used_bytes
from .page_pool import PagePool

_NEW_SHARE = 0.7  # of a piece of work, what does not find room among the heap's free pages


class MemoryLimit:
    """Keeps what a step adds to this process within a limit, on the CPU.

    Memory that goes back to the system costs time to get again. So what nothing uses goes back only where the next
    tile would not fit otherwise: first the pages of maps that are gone, then those of the C library's heap, which may
    hold as much as is in use once more (its aligned blocks do not fit into holes of their own size).

    Args:
        limit: bytes for `held` and all that is added from now on.
        held: bytes of the limit that are in use already.
        work: bytes that are allocated at a time between two calls of `keep`.
        spare: pages of maps that are gone.
        strict: whether the heap gives back what it has; else only the spare pages go.

    Attributes:
        near: whether there was no room for more than one further piece of work at the last call of `keep`.
    """

    def __init__(self, limit: int, held: int, work: int, page_pool: PagePool, strict: bool):
        if strict:
            return_free_pages()
        self.page_pool, self.work, self.strict, self.near = page_pool, work, strict, False
        self.bytes = used_bytes() - page_pool.bytes - held + limit - int(_NEW_SHARE * work)

    def keep(self) -> None:
        """Give back what nothing uses if the process holds more than it should before the next piece of work."""
        over = used_bytes() - self.bytes
        self.near = over > -self.work
        if over > 0:
            self.page_pool.shrink(self.page_pool.bytes - over)
            if self.strict and used_bytes() > self.bytes:
                return_free_pages()
