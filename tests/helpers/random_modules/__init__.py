"""Random modules for the soundness trial: small networks that do whatever a forward may do, and what is done to them.

`draw(seed)` gives a `Spec`: plain data, printable, and smaller when parts of it are left out. Its `build()` makes the
network, always the same one.
"""

from .foreign import draw_foreign, foreign_names
from .spec import Spec, Visit, draw

__all__ = ["Spec", "Visit", "draw", "draw_foreign", "foreign_names"]
