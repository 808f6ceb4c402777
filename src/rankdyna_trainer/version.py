"""The version, for whatever names it: nothing else of ours is imported with it."""

__version__ = "0.1.0"
