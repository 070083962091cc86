"""The passes over the tiles, forward and backward: halos, reductions, stored feature maps and memory limits."""
