"""The parts of `benchmark.py suite`."""
