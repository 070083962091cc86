"""Lowers a recorded forward to stages that run tile by tile: axis geometry, the graph, one rule per op, rewrites."""
