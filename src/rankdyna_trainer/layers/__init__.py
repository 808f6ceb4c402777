"""
The forms of a compressed layer, and how a model's layers come into each: which are chosen, how they are factored,
exchanged and compacted. It knows models and their configuration, but no budget, no training and no files.
"""
