"""What the parts of `benchmark.py` share: models, random batches, operation counts, timing, other processes."""

import multiprocessing
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.method.schedule import final_parameter_budget, final_rank_budget

Batch = dict[str, Tensor]
Rows = list[dict[str, Any]]
Results = dict[str, Any]  # the tables, as lists of rows by name under "tables", and what else is kept
Cost: TypeAlias = Callable[[int, int, int, int], int]

# Layers, hidden size, size of the feed-forward layer, heads.
SHAPES = {"minilm": (6, 384, 1536, 12), "bert-base": (12, 768, 3072, 12), "tiny": (2, 32, 64, 4)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(name: str, seed: int) -> PreTrainedModel:
    """A classifier, or of a decoder the language model; of a shape, with random weights."""
    torch.manual_seed(seed)
    shape = tuple(map(int, name.split("x"))) if re.fullmatch(r"\d+(x\d+){3}", name) else SHAPES.get(name)
    if shape is not None:
        layers, hidden, feed_forward, heads = shape
        config = BertConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=feed_forward, num_attention_heads=heads
        )
        if name == "tiny":
            config.vocab_size = 96
        return BertForSequenceClassification(config).to(DEVICE)
    architectures = AutoConfig.from_pretrained(name).architectures or []
    decoder = any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in architectures)
    auto: Any = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    return auto.from_pretrained(name, dtype=torch.float32).to(DEVICE)


def random_batch(model: PreTrainedModel, size: int, length: int) -> Batch:
    """Random tokens, with random labels of the kind that the model learns."""
    tokens = torch.randint(model.config.get_text_config().vocab_size, (size, length), device=DEVICE)
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return {"input_ids": tokens, "labels": torch.randint(2, (size,), device=DEVICE) if classifies else tokens}


def uniform_rank(config: RankDynaConfig, out: int, into: int) -> int:
    """The groups that a layer keeps if each layer is brought to the same ratio."""
    if config.param_ratio is not None:
        return final_parameter_budget(config.param_ratio, out * into) // (out + into)
    return final_rank_budget(config.rank_ratio or 1.0, min(out, into))


def truncate(model: nn.Module, config: RankDynaConfig) -> nn.Module:
    """Plain SVD: compact an injected model to the same ratio in each layer, by the singular values."""
    for layer in singular_group_layers(model):
        kept = uniform_rank(config, layer.out_features, layer.in_features)
        layer.set_remaining(torch.arange(layer.width, device=layer.remaining.device) < kept)
    return compact(model)


def singular_group_layers(model: nn.Module) -> list[SingularGroupLinear]:
    """In the model's order, which is that of the target layers."""
    return [module for module in model.modules() if isinstance(module, SingularGroupLinear)]


def in_factors(rank: int, rows: int, out: int, into: int) -> int:
    """Multiply-adds of a layer on so many vectors, through P and Q."""
    return rows * rank * (out + into)


def in_training(rank: int, rows: int, out: int, into: int) -> int:
    """Likewise, or through the rebuilt weight where that is cheaper."""
    return min(in_factors(rank, rows, out, into), (rank + rows) * out * into)


def compacted(rank: int, rows: int, out: int, into: int) -> int:
    """Likewise, or through the dense weight that a compacted layer keeps where that is smaller."""
    return rows * min(rank * (out + into), out * into)


@dataclass(frozen=True)
class Workload:
    """
    Multiply-adds of a forward pass on a batch, embeddings aside.

    Args:
        layers: of each target layer how many vectors it gets, and its output and input size.
        rest: multiply-adds of all other products, attention included.
    """

    layers: list[tuple[int, int, int]]
    rest: int

    @property
    def dense(self) -> int:
        """Of the dense target layers."""
        return sum(rows * out * into for rows, out, into in self.layers)

    def of_targets(self, cost: Cost, ranks: Iterable[int]) -> int:
        """Of the target layers at these ranks."""
        return sum(cost(rank, *layer) for rank, layer in zip(ranks, self.layers, strict=True))


@torch.no_grad()
def count_operations(model: PreTrainedModel, config: RankDynaConfig, batch: Batch) -> Workload:
    """Of the dense model, by running it once."""
    calls: dict[nn.Module, tuple[int, int, int]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        into = inputs[0].shape[-1]
        before = calls[layer][0] if layer in calls else 0
        calls[layer] = (before + inputs[0].numel() // into, output.shape[-1], into)

    targets = list(find_targets(model, config).values())
    hooks = [layer.register_forward_hook(note) for layer in targets]
    # The fused attention of a CPU is not among the operations that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    for hook in hooks:
        hook.remove()
    layers = [calls[layer] for layer in targets]
    return Workload(layers, counter.get_total_flops() // 2 - Workload(layers, 0).dense)


def product_seconds(work: Callable[[], object]) -> float:
    """How long the device is busy with matrix products meanwhile, which operation counts speak of: a median of 3."""
    on_gpu = DEVICE.type == "cuda"
    products = {f"aten::{operator.__name__}" for operator in flop_registry}
    seconds = []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            work()
        events = [event for event in profiler.key_averages() if event.key in products]
        seconds.append(sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events) / 1e6)
    return statistics.median(seconds)


def spread(seconds: Sequence[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = (shown(value) for value in np.percentile(np.array(seconds) * 1000, [25, 50, 75]))
    return f"{median} [{low}, {high}]"


def shown(number: float) -> str:
    """To four digits."""
    return np.format_float_positional(number, precision=4, fractional=False, trim="-")


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Of the two medians."""
    return float(np.median(seconds) / np.median(others))


def started(target: Callable[..., None], *arguments: Any) -> Connection:
    """The connection to a new process, whose function gets the other end as its last argument."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=target, args=(*arguments, there), daemon=True).start()
    there.close()  # so that a process that dies is noticed here
    return here
