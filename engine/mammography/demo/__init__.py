"""The demonstration: training on phantom mammograms (`run.py`), compared with a step of stock PyTorch; its page."""
