"""Runs the steps of a forward in order, and recomputes ranges of steps in the backward."""
