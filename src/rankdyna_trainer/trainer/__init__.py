"""
The plugin: the callback conducts, and what it needs of a `Trainer` stands beside it. It may know everything but the
command line.
"""
