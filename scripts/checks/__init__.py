"""
Checks of the library that are run now and then, each a program of its own: `python scripts/checks/NAME.py`. None of
them imports another script.
"""
