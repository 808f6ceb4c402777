"""The encoder's inference and training once more, with a compiled forward pass."""

import torch

from ..bench import Bench
from .fine_tuning import compiled_train
from .inference import compiled_inference


def compiled(bench: Bench) -> None:
    """Inference, and training if there is time left for it: to compile either takes a minute or more."""
    # Of all these models the same function is compiled.
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled_inference(bench)
        torch._dynamo.reset()
        if bench.remaining > bench.sizes.compiled_seconds / 2:
            compiled_train(bench)
        else:
            bench.results["left out"] = f"training: {max(0, bench.remaining):.0f} s of the budget were left"
