"""What every report is made with: HTML pages from templates (`page.py`), and figures (`figure.py`)."""
