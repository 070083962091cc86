"""The demonstration: the main job on phantom mammograms (`run.py`), beside a step of stock PyTorch, and its page."""
