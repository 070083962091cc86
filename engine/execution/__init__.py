"""The steps of one forward in order, and the ranges that are computed again."""
