"""
What was kept, where, and what it brought: tables, sizes, operations, times, pictures and the model card. It reads
models, and changes none.
"""
