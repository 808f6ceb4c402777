"""The part of `rankdyna inspect` that tells what training would hold in memory."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..baselines.replacement import ranks_to_factor, truncated
from ..checkpoint.empty_model import empty_model
from ..config import RankDynaConfig
from ..layers.architecture import module_places
from ..layers.dense import in_features, out_features
from ..layers.injection import inject_without_values
from ..layers.low_rank import LowRankLinear
from ..layers.targets import find_targets
from ..report.printed import print_table
from ..report.random_inputs import random_inputs
from ..report.training_memory import ADAM, ADAM_OF_8_BITS, checkpoint_activations, training_memory

LORA_RANK = 8
NOTES = (
    "step: the most that forward and backward pass hold, gradients included, beside weights and optimizer.",
    f"LoRA: of rank {LORA_RANK} on P and Q of the compacted model, which are frozen.",
    "Groups of the inputs (the default) come near the end of the warm-up, which trains the dense model until then.",
)
PARTS = ("weights", "gradients", "optimizer", "step", "peak")


@dataclass(frozen=True)
class Recipe:
    """
    A way to train.

    Attributes:
        name: of the row.
        in_groups: whether the target layers are singular groups.
        start_ratio: with how many of them each begins.
        optimizer: bytes of it for each number that is trained.
        checkpointing: whether activations are computed again in the backward pass.
    """

    name: str
    in_groups: bool = True
    start_ratio: float | None = None
    optimizer: float = ADAM
    checkpointing: bool = False


RECIPES = (
    Recipe("dense", in_groups=False),
    Recipe("all groups"),
    Recipe("start_ratio 1.0", start_ratio=1.0),
    Recipe("start_ratio 0.7", start_ratio=0.7),
    Recipe("1.0, 8-bit Adam", start_ratio=1.0, optimizer=ADAM_OF_8_BITS),
    Recipe("and checkpointing", start_ratio=1.0, optimizer=ADAM_OF_8_BITS, checkpointing=True),
)


def memory_of_recipes(
    model_config: Any, config: RankDynaConfig, batch_size: int, length: int, trusts: bool
) -> list[dict[str, Any]]:
    """
    What a step of each way to train a model holds, by its configuration alone.

    Args:
        model_config: of the dense model.
        config: chooses the layers, and the size of the compacted model that a LoRA adapts.
        batch_size: examples of a step.
        length: of a text in tokens, or of a sound in samples.
        trusts: whether code that lies beside the model is run.

    Raises:
        ValueError: a layer has no room for a group, or the model cannot be run without values.
    """
    rows = []
    for recipe in RECIPES:
        model = _without_values(model_config, trusts)
        if recipe.in_groups:
            start = recipe.start_ratio
            inject_without_values(model, replace(config, rank_ratio=None, param_ratio=start or 1.0, start_ratio=start))
        if recipe.checkpointing:
            if not model.supports_gradient_checkpointing:
                continue
            checkpoint_activations(model)
        rows.append(_row(recipe.name, model, random_inputs(model, batch_size, length), recipe.optimizer))
    compacted = _compacted(_without_values(model_config, trusts), config)
    if factors := _factors(compacted):
        inputs = random_inputs(compacted, batch_size, length)
        rows.append(_row(f"LoRA, {config.ratio_name} {config.ratios[0]:g}", _with_lora(compacted, factors), inputs))
    return rows


def print_memory(rows: list[dict[str, Any]], batch_size: int, length: int) -> None:
    """
    The rows as a table.

    Args:
        rows: from [`memory_of_recipes`].
        batch_size: as there.
        length: as there.
    """
    columns = ["", "weights", "gradients", "optimizer", "step", "peak", "/ dense"]
    dense = rows[0]["peak"]
    print_table(
        columns,
        [[row["recipe"], *(_gigabytes(row[part]) for part in PARTS), f"{row['peak'] / dense:.2f}"] for row in rows],
        f"Memory of training in float32, {batch_size} x {length}, GB (1e9 bytes)",
    )
    print("\n".join(NOTES))


def _gigabytes(held: int) -> str:
    """With three digits at least, and so short that the table fits into 80 columns."""
    size = held / 1e9
    return f"{size:,.{2 if size < 10 else 1 if size < 100 else 0}f}"


def _row(name: str, model: Any, inputs: dict[str, Tensor], optimizer: float = ADAM) -> dict[str, Any]:
    try:
        memory = training_memory(model, inputs, optimizer)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            "What a step of training holds cannot be told by the configuration: the model's forward pass fails "
            f"without values ({error}). Leave --training out, or try another --length."
        ) from error
    return {"recipe": name} | asdict(memory) | {"peak": memory.peak}


def _without_values(model_config: Any, trusts: bool) -> Any:
    # Some models make a part of their parameters with values all the same.
    return empty_model(model_config, trusts).to("meta").float().train()


def _compacted(model: PreTrainedModel, config: RankDynaConfig) -> PreTrainedModel:
    """P and Q without values, in the place of each layer that they make smaller."""
    places, targets = module_places(model), find_targets(model, config)
    for name, rank in ranks_to_factor(targets, config).items():
        layer = targets[name]
        p, q = (layer.weight.new_empty(size) for size in ((out_features(layer), rank), (rank, in_features(layer))))
        for parent, attribute in places[layer]:
            setattr(parent, attribute, truncated(layer, p, q, rank).train())
    return model


def _factors(model: PreTrainedModel) -> list[str]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear) and layer.rank}
    return [f"{name}.{factor}" for name in layers for factor in "qp"]


def _with_lora(model: PreTrainedModel, factors: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=factors))
