"""What `benchmark.py` is made of: models, operation counts, timing, and the ways to train that it compares."""
