"""Benchmarks: largest image, speed and memory, compared with stock PyTorch and its usual remedies.

The step meter (`meter.py`) measures each figure in a separate process (`process.py`). All results share one format
(`results.py`), which `report.py` plots. `peers.py` defines what is compared; `step.py`, `limit.py`, `rows.py` and
`scripts.py` run it.
"""
