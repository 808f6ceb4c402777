"""The parts of `fuzz.py`: random models, random settings, and what must hold of a run with both."""
