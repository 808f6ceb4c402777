"""The part of `rankdyna inspect` that tells what training would hold in memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.empty_model import empty_model
from ..config import RankDynaConfig
from ..layers.architecture import module_places
from ..layers.injection import inject_without_values
from ..layers.low_rank import LowRankLinear
from ..layers.targets import dense_shape, find_targets
from ..method.budget import uniform_rank
from ..report.printed import print_table
from ..report.random_inputs import random_inputs
from ..report.training_memory import ADAM, ADAM_OF_8_BITS, TrainingMemory, checkpoint_activations, training_memory

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
    model_config: Any, modules: Mapping[str, Any], ratio: float, batch_size: int, length: int, trusts: bool
) -> list[dict[str, Any]]:
    """
    What a step of each way to train a model holds, by its configuration alone.

    Args:
        model_config: of the dense model.
        modules: `target_modules` and `exclude_modules` of the compression.
        ratio: the part of the target layers' parameters of the compacted model that a LoRA adapts.
        batch_size: examples of a step.
        length: of a text in tokens, or of a sound in samples.
        trusts: whether code that lies beside the model is run.
    """
    rows = []
    for recipe in RECIPES:
        model = _without_values(model_config, trusts)
        if recipe.in_groups:
            inject_without_values(model, RankDynaConfig(param_ratio=ratio, start_ratio=recipe.start_ratio, **modules))
        if recipe.checkpointing:
            if not model.supports_gradient_checkpointing:
                continue
            checkpoint_activations(model)
        inputs = random_inputs(model, batch_size, length)
        rows.append(_row(recipe.name, training_memory(model, inputs, recipe.optimizer)))
    compacted = _compacted(_without_values(model_config, trusts), RankDynaConfig(param_ratio=ratio, **modules))
    inputs = random_inputs(compacted, batch_size, length)
    return [*rows, _row(f"LoRA at {ratio:g}", training_memory(_with_lora(compacted), inputs))]


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
        [
            [row["recipe"], *(f"{row[part] / 1e9:,.2f}" for part in PARTS), f"{row['peak'] / dense:.2f}"]
            for row in rows
        ],
        f"Memory of training in float32, {batch_size} x {length}, GB (1e9 bytes)",
    )
    print("\n".join(NOTES))


def _row(name: str, memory: TrainingMemory) -> dict[str, Any]:
    return {"recipe": name} | asdict(memory) | {"peak": memory.peak}


def _without_values(model_config: Any, trusts: bool) -> Any:
    # Some models make a part of their parameters with values all the same.
    return empty_model(model_config, trusts).to("meta").float().train()


def _compacted(model: PreTrainedModel, config: RankDynaConfig) -> PreTrainedModel:
    """P and Q without values, in the place of each layer that they make smaller."""
    places = module_places(model)
    for layer in find_targets(model, config).values():
        out_features, in_features = dense_shape(layer)
        rank = uniform_rank(config, out_features, in_features)
        if rank * (out_features + in_features) > out_features * in_features:
            continue
        low_rank = LowRankLinear(
            in_features, out_features, rank, layer.bias is not None, type(layer), "meta", layer.weight.dtype
        )
        for parent, attribute in places[layer]:
            setattr(parent, attribute, low_rank.train())
    return model


def _with_lora(model: PreTrainedModel) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear) and layer.rank}
    lora = LoraConfig(r=LORA_RANK, target_modules=[f"{name}.{factor}" for name in layers for factor in "qp"])
    with torch.device("meta"):
        return get_peft_model(model, lora)
