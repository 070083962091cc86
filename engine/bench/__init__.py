"""Benchmarks: how large an image, how fast, in how much memory; against stock PyTorch and its usual remedies.

Each figure comes from a process of its own (`child.py`). All results have one format (`results.py`), which `report.py`
draws. What is compared is in `peers.py`, what is run in `step.py`, `limit.py`, `rows.py`, `kernels.py` and `morph.py`.
"""
