"""What a run cannot be, as far as its model and its config tell."""

from collections.abc import Sequence

from torch import nn

from ..config import RankDynaConfig
from ..layers.distributed import is_distributed, local_part, true_in_all_processes
from ..layers.start import start_rank
from .budget import RankBudget
from .importance import all_finite


def check_possible(config: RankDynaConfig, has_groups: bool, has_batches: bool, compiled: bool) -> None:
    """
    Check that there are groups to score, or will be, and that they can be scored.

    Args:
        config: the choices.
        has_groups: whether the model has singular groups.
        has_batches: whether there are some to factor the layers by, later.
        compiled: whether the forward pass is compiled.

    Raises:
        ValueError: they are not, or cannot.
    """
    if not has_groups and (config.group_basis == "weights" or not has_batches):
        raise ValueError(
            "The model that is being trained has no singular groups. Pass the RankDynaCallback to the Trainer's "
            "constructor (callbacks=[...]) instead of add_callback, since it must see the model before the "
            "optimizer does. A model_init must return inject_singular_groups(model, config)."
        )
    if compiled and config.importance_score != "first_order":
        raise ValueError(
            f'importance_score="{config.importance_score}" cannot be used with torch.compile, which runs no hooks '
            'in a backward pass and gives no second derivatives. Leave it out, or use "first_order".'
        )


def check_weights(model: nn.Module, step: int) -> None:
    """
    Check that training did not diverge. All processes have to ask.

    Args:
        model: in training.
        step: the number of finished optimizer steps.

    Raises:
        ValueError: a weight is inf or nan.
    """
    # A quantized layer that stays as it is may hold whole numbers.
    weights = [parameter.detach() for parameter in model.parameters() if parameter.is_floating_point()]
    finite = all_finite([local_part(weight) for weight in weights])
    if not (true_in_all_processes(finite) if is_distributed() else finite):
        raise ValueError(
            f"Training diverged: at step {step} the model's weights have inf or nan. It is not compacted, and nothing "
            "was saved. Resume from an earlier checkpoint, or train with a lower learning rate."
        )


def check_something_is_left(config: RankDynaConfig, budget: RankBudget, initial_ranks: Sequence[int]) -> None:
    """
    Check that at least half of the final budget can be used, and so that some groups are left.

    Args:
        config: the choices.
        budget: of the run.
        initial_ranks: how many groups each layer begins with.

    Raises:
        ValueError: it cannot, whatever the scores.
    """
    multiple, chosen = config.rank_multiple_of, "rank_ratio" if config.param_ratio is None else "param_ratio"
    usable = budget.usable(initial_ranks, multiple)
    if usable < budget.final / 2 or not usable:
        unit = "singular groups" if config.param_ratio is None else "parameters"
        causes, cures = [f"{chosen}={getattr(config, chosen)}"], [f"a larger {chosen}"]
        if multiple > 1:
            causes.append(f"rank_multiple_of={multiple}")
            cures.append("a smaller rank_multiple_of")
        if config.rank_scope == "local":
            causes.append('rank_scope="local"')
            cures.append('rank_scope="global"')
        raise ValueError(
            f"{' and '.join(causes)} would leave at most {usable} of the {budget.final} {unit} that are asked for, in "
            f"{len(initial_ranks)} layers. Give {', or '.join(cures)}."
        )


def check_something_to_remove(config: RankDynaConfig, budget: RankBudget, initial_ranks: Sequence[int]) -> None:
    """
    Check that a model which was compressed before holds more than it may, and none more than it should begin with.

    Args:
        config: the choices.
        budget: of the run.
        initial_ranks: how many groups each layer begins with.

    Raises:
        ValueError: it does not, or begins with more groups than `start_ratio` has room for.
    """
    starts = [start_rank(config, *shape) for shape in budget.shapes]
    if any(rank > start for rank, start in zip(initial_ranks, starts, strict=True)):
        raise ValueError(
            f"The model has {sum(initial_ranks)} singular groups, more than start_ratio={config.start_ratio} begins "
            f"with ({sum(starts)}): it was injected with another config. Give inject_singular_groups this one."
        )
    was_compacted = any(rank < start for rank, start in zip(initial_ranks, starts, strict=True))
    if was_compacted and budget.initial == budget.final:
        chosen = "rank_ratio" if config.param_ratio is None else "param_ratio"
        raise ValueError(
            f"The model was compressed before, and holds no more than {chosen}={getattr(config, chosen)} of "
            f"the dense one. Give a smaller {chosen}, or train it on as it is, without the RankDynaCallback."
        )
