"""Building blocks of all reports: HTML pages from templates (`page.py`), and figures (`figure.py`)."""
