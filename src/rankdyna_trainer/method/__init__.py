"""
Algorithm 1 of the paper: the scores of the singular groups, the schedule, the budget, which groups remain, and their
removal from model and optimizer. It knows layers and optimizers, but no `Trainer`; `schedule`, `budget` and
`allocation` are arithmetic that knows no `transformers`.
"""
