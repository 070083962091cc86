"""Processes that work on one batch, or train together: how they start, and their group."""
