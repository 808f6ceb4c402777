"""
What the scripts of the tasks, `run_*.py`, share: their options and data, the rounds of training, and the tiny models
and tasks of `--tiny`.
"""
