"""With how many of its singular groups each layer begins: all of them, or those that `start_ratio` has room for."""

import math
from collections.abc import Mapping

import torch

from ..config import RankDynaConfig
from ..options import part_of
from .factor_cache import Factors
from .low_rank import LowRankLinear
from .targets import TargetLayer, dense_shape


def start_rank(config: RankDynaConfig, out_features: int, in_features: int) -> int:
    """
    How many groups a layer begins with, if it was not compressed before.

    Args:
        config: of which `start_ratio` and `rank_multiple_of` count.
        out_features: of the layer.
        in_features: of the layer.

    Returns:
        All `min(out_features, in_features)` without `start_ratio`; else the most that hold at most this part of the
        numbers of the weight, `out_features + in_features + 1` each, and of these a multiple of `rank_multiple_of` if
        there are so many. 0 if there is room for none.
    """
    if config.start_ratio is None:
        return min(out_features, in_features)
    room = part_of(config.start_ratio, out_features * in_features)
    rank = math.floor(room / (out_features + in_features + 1))
    return rank - rank % config.rank_multiple_of or rank


def start_ranks(config: RankDynaConfig, layers: Mapping[str, TargetLayer]) -> dict[str, int]:
    """
    How many groups each layer begins with: as [`start_rank`] has it, or those that it was compressed to before.

    Args:
        config: the choices.
        layers: by name.

    Returns:
        The number of groups by name.

    Raises:
        ValueError: `start_ratio` has no room for a group of some layer, or for those that `rank_ratio` keeps.
    """
    shapes = {name: dense_shape(layer) for name, layer in layers.items()}
    ranks = {name: start_rank(config, *shape) for name, shape in shapes.items()}
    if config.start_ratio is not None:
        _check_room(config, shapes, ranks)
    return {
        name: min(ranks[name], layer.rank) if isinstance(layer, LowRankLinear) else ranks[name]
        for name, layer in layers.items()
    }


@torch.no_grad()
def first_groups(factors: Factors, rank: int) -> Factors:
    """
    The first groups of a layer, which matter most, in tensors of their own.

    Args:
        factors: `u` `(groups, out_features)`, `sigma` `(groups,)` and `v` `(groups, in_features)`.
        rank: how many to take.

    Returns:
        The same with `rank` rows; what was given, if it has no more.
    """
    u, sigma, v = factors
    if len(sigma) <= rank:
        return factors
    return u[:rank].clone(), sigma[:rank].clone(), v[:rank].clone()


def _check_room(config: RankDynaConfig, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> None:
    if empty := [name for name, rank in ranks.items() if not rank]:
        out_features, in_features = shapes[empty[0]]
        raise ValueError(
            f"start_ratio={config.start_ratio} has no room for a singular group of {len(empty)} layers ({empty[0]}, "
            f"...): one of this layer holds {out_features + in_features + 1} of its {out_features * in_features} "
            "parameters. Give a larger start_ratio, or name these layers in exclude_modules."
        )
    if config.rank_ratio is None:
        return
    full = {name: min(shape) for name, shape in shapes.items()}
    pools = [list(ranks)] if config.rank_scope == "global" else [[name] for name in ranks]
    for pool in pools:
        begins, groups = sum(ranks[name] for name in pool), sum(full[name] for name in pool)
        if begins < (kept := part_of(config.ratios[0], groups)):
            of = "the model" if len(pool) == len(ranks) else pool[0]
            raise ValueError(
                f"start_ratio={config.start_ratio} begins with {begins} of the {groups} singular groups of {of}, "
                f"fewer than the {math.ceil(kept)} that rank_ratio={config.ratios[0]} keeps. Give a larger "
                "start_ratio, a smaller rank_ratio, or param_ratio, which is a part of the parameters too."
            )
