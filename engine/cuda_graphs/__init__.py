"""Tiles recorded once as CUDA graphs and replayed: what makes two tiles alike, and fixed buffers."""
