"""The paper's tables and figures, made by `reproduce.py`."""
