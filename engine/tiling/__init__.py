"""The pass over the tiles, forward and backward: halos, reductions, stored feature maps, memory."""
