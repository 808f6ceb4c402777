"""How fast a compacted decoder makes one token after another."""

import statistics
from typing import Any

import torch
from transformers import StaticCache

from ..bench import Bench, bytes_read
from ..device_time import seconds_in_turns
from ..measuring import Rows, median_ratio, spread
from ..models import DEVICE, load_model
from .inference import Works, graphs, shrunk


def decode(bench: Bench) -> None:
    """One token after another of a decoder with a static cache, one by one and as a CUDA graph."""
    models, ranks = shrunk(load_model(bench.sizes.decoder, bench.seed), bench.sizes.decode_ratios)
    steps = {label: DecodingStep(model, bench.sizes.cache_length) for label, model in models.items()}
    bench.results["details"] = {"ranks": ranks}
    rows: Rows = []
    _time(bench, "eager", dict(steps), steps, rows)
    if DEVICE.type != "cuda":
        bench.results["left out"] = "CUDA graphs: there is no GPU"
        return
    with torch.inference_mode():
        for step in steps.values():
            step.cache.reset()
        works = graphs(dict(steps))
    _time(bench, "CUDA graph", works, steps, rows)


@torch.inference_mode()
def _time(bench: Bench, way: str, works: Works, steps: dict[str, "DecodingStep"], rows: Rows) -> None:
    def reset() -> None:
        for step in steps.values():
            step.cache.reset()

    # Each of them is many tokens.
    repeats = max(2, bench.sizes.repeats // 4)
    seconds = seconds_in_turns(works, repeats, bench.sizes.cache_length // 8, reset)
    for label, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            {
                "way": way,
                "param_ratio": label,
                "step, ms": spread(times),
                "tokens a second": 1 / median,
                "speed-up": median_ratio(seconds["dense"], times),
                "promised": steps["dense"].bytes_read / steps[label].bytes_read,
                "bytes / bandwidth, ms": 1000 * steps[label].bytes_read / bench.bandwidth,
                "time / that": median * bench.bandwidth / steps[label].bytes_read,
            }
        )
    bench.results["details"][way] = seconds
    bench.show("tokens", rows)


class DecodingStep:
    """
    The step from a token to the next, which it leaves in the place of the first.

    Args:
        model: a decoder.
        places: in its cache, all of which are read in each step.

    Attributes:
        bytes_read: of weights and cache.
    """

    def __init__(self, model: Any, places: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=places)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((1, 1), places // 2, device=model.device)
        # Given as it is used, so that nobody makes it anew, or waits to see what is in it.
        self.mask = torch.ones(1, 1, 1, places, dtype=torch.bool, device=model.device)
        config = model.config
        cache = 2 * config.num_hidden_layers * places * config.hidden_size * model.dtype.itemsize
        self.bytes_read = bytes_read(model) + cache

    def __call__(self) -> None:
        output = self.model(
            input_ids=self.token,
            position_ids=self.position,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
