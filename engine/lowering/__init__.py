"""From the recorded forward to stages by tiles: the geometry of one axis, the graph, a rule per op, rewrites."""
