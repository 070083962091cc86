"""Foreign pieces: a convolution and one kind of Python code around it, as authors of networks write it.

Each piece has variations. A scenario calls the network three times, and the user changes something between the calls.
`benchmarks/soundness.py --foreign` runs them.
"""

from .. import spec  # noqa: F401  first: `draw` depends on the order in which pieces are registered
from . import contexts, functions, language, layers, overrides, results, settings
from .scenario import draw_foreign, foreign_names

FAMILIES = (functions, settings, overrides, contexts, language, layers, results)  # imported for their pieces

__all__ = ["draw_foreign", "foreign_names"]
