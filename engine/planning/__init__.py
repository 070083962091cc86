"""Predicts the memory of a step and searches for the plan that fits: tile size, retained tiles, halo storage."""
