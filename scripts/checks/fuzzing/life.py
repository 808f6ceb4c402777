"""The life of a model: injected, trained, compacted, saved, loaded, merged. It computes the same at each seam."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankdyna_trainer import LowRankLinear, RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups, merge
from rankdyna_trainer.layers.architecture import module_places
from rankdyna_trainer.layers.dense import kept_dense_rank
from rankdyna_trainer.layers.singular_group import singular_group_layers
from rankdyna_trainer.method.algorithm import RankDyna

from .settings import OPTIMIZERS, Settings
from .subjects import Batch, Subject, linear_layers
from .watching import Watch, require

# How much an output may differ where it is computed in another order, relative to its length.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1}


def live(subject: Subject, settings: Settings) -> int:
    """
    Lead a model through all of it.

    Returns:
        How often groups were removed.

    Raises:
        Broken: something does not hold.
    """
    model, batch = subject.model, subject.batch()
    config = RankDynaConfig(**settings.config)
    optimizer = None
    make = OPTIMIZERS[settings.optimizer]
    before = outputs(model, batch)
    if settings.mistake == "optimizer too early":
        optimizer = make(trained(model))
    _err(model, settings)
    if settings.route != "dense at first":
        inject_singular_groups(model, config, [batch] if settings.route == "inject with batches" else None)
        same(model, batch, before, "injection")
        if settings.mistake == "in groups":
            inject_singular_groups(model, config)
    optimizer = optimizer or make(trained(model))
    batches = [batch] if settings.route == "dense at first" else None
    rankdyna = RankDyna(model, config, optimizer, settings.steps, batches=batches)
    watch = Watch(model, config, rankdyna, optimizer)
    require(settings.mistake is None, f"the mistake ({settings.mistake}) was not refused")
    train(subject, settings, watch)
    end(model, batch, settings, watch)
    after = save_and_load(model, batch)
    merge(model)
    require(not any(isinstance(m, (LowRankLinear, SingularGroupLinear)) for m in model.modules()), "it is not merged")
    same(model, batch, after, "merging")
    save_and_load(model, batch)
    return watch.removals


def _err(model: nn.Module, settings: Settings) -> None:
    """Make the mistake of this case, if it has one, which has to be refused."""
    if settings.mistake == "weight of nan":
        for layer in linear_layers(model).values():
            layer.weight.data[:1, :1] = torch.nan  # one of rank 0 has none
    elif settings.mistake == "all frozen":
        model.requires_grad_(False)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(subject: Subject, settings: Settings, watch: Watch) -> None:
    """All steps, with what happens at some of them."""
    model, optimizer = subject.model, watch.optimizer
    for step in range(1, settings.stops_at + 1):
        model.train()
        for _ in range(settings.micro_batches):
            (model(**subject.batch())["loss"] / settings.micro_batches).backward()
        overflow = step in settings.overflows
        _edit_gradients(model, overflow, step in settings.without_gradients)
        watch.update_importance(overflow)
        if not overflow:
            optimizer.step()
        watch.enforce_budget(step, overflow)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        if step == settings.resumes_at and singular_group_layers(model):
            resume(subject)


def _edit_gradients(model: nn.Module, overflow: bool, without: bool) -> None:
    gradients = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if overflow:
        for parameter in gradients[::2]:
            parameter.grad.view(-1)[:1] = torch.inf  # type: ignore[union-attr]
    elif without:
        for parameter in gradients[1::3]:
            parameter.grad = None


def resume(subject: Subject) -> None:
    """The state of the running compression, in the layers of a model that has them at their first width."""
    model = subject.model
    state = copy.deepcopy(model.state_dict())
    fresh = copy.deepcopy(model)
    for layer, places in module_places(fresh).items():
        if isinstance(layer, SingularGroupLinear):
            width = max(layer.initial_rank, 1)
            u, sigma, v = (factor.new_zeros(width, *factor.shape[1:]) for factor in layer.factors().values())
            new = SingularGroupLinear(u, sigma, v, layer.bias)
            for parent, attribute in places:
                setattr(parent, attribute, new)
    fresh.load_state_dict(state)
    batch = subject.batch()
    ranks = [[layer.rank for layer in singular_group_layers(one).values()] for one in (fresh, model)]
    require(ranks[0] == ranks[1], f"resumed at ranks {ranks[0]}, not {ranks[1]}")
    same(fresh, batch, outputs(model, batch), "resuming")


def end(model: nn.Module, batch: Batch, settings: Settings, watch: Watch) -> None:
    """Compact the model."""
    layers = watch.layers
    before = outputs(model, batch)
    if settings.finishes:
        watch.rankdyna.finish(settings.stops_at)
        watch.check_handed_over()
    else:
        compact(model)
    if settings.stops_at == settings.steps and not settings.overflows & {settings.steps}:
        same(model, batch, before, "compaction")
        for name, layer in layers.items():
            now = model.get_submodule(name)
            rank = now.rank if isinstance(now, LowRankLinear) else kept_dense_rank(now)
            require(rank == layer.rank, f"{name} had rank {layer.rank}, and is compacted to {rank}")


def save_and_load(model: nn.Module, batch: Batch) -> Tensor:
    """Save a compacted or merged model, load it, and compare to the last bit; returns what it computes."""
    after = outputs(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            loaded: Any = type(model).from_pretrained(folder, dtype="auto")
        else:
            file = str(Path(folder) / "model.safetensors")
            save_model(model, file)
            loaded = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in loaded.parameters():
                    parameter.fill_(0.5)
            load_model(loaded, file)
    difference = (outputs(loaded, batch).double() - after.double()).abs().max().item()
    require(difference == 0, f"the saved model computes another output, by {difference}")
    return after


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """What the model computes in evaluation mode."""
    return model.eval()(**batch)["logits"]


def same(model: nn.Module, batch: Batch, before: Tensor, seam: str) -> None:
    """The model computes what it did before, but for rounding, of which some models make more than others."""
    difference = relative(after := outputs(model, batch), before)
    if not difference <= (tolerance := TOLERANCE[before.dtype]):
        tolerance += 10 * relative(outputs(rounded_otherwise(model), batch), after)
    require(difference <= tolerance, f"{seam} changes what the model computes, by {difference:.1e}")


def relative(new: Tensor, old: Tensor) -> float:
    """How much an output differs, relative to its length, or to that of outputs of 0.01."""
    return float((new.double() - old.double()).norm() / old.double().norm().clamp(min=0.01 * old.numel() ** 0.5))


@torch.no_grad()
def rounded_otherwise(model: nn.Module) -> nn.Module:
    """A copy whose numbers differ in their last digit."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1 + torch.finfo(parameter.dtype).eps * torch.randn_like(parameter).sign())
    return other
