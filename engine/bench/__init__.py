"""Benchmarks: how large an image, how fast, in how much memory; against stock PyTorch and its usual remedies.

Each figure is taken by the step meter (`meter.py`) in a process of its own (`process.py`). All results have one format
(`results.py`), which `report.py` draws. What is compared is in `peers.py`, what is run in `step.py`, `limit.py`,
`rows.py` and `scripts.py`.
"""
