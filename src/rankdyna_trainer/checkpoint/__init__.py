"""
Compacted models and running compressions on disk: written whole or not at all, checked when they are read. It knows
files and `from_pretrained`, but no `Trainer`.
"""
