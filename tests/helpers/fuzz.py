"""How many damaged files tests make: GIGAMORPH_FUZZ=20 makes twenty times as many as a usual run."""

import os

DEPTH = int(os.environ.get("GIGAMORPH_FUZZ", "1"))
