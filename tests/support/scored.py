"""Compacted models whose groups have scores, as the end of a run leaves them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups
from rankdyna_trainer.layers.whitening import EPSILON


def compacted_with_scores(model: nn.Module) -> nn.Module:
    """
    Ranks of every kind, each of the groups that remain random ones: low (twice in a row, so that no two layers of a
    block are alike), so high that the layer stays dense, and 0.
    """
    generator = torch.Generator().manual_seed(0)
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5))
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    for i, layer in enumerate(layers):
        rank = [layer.full_rank // 3, layer.full_rank // 4, layer.full_rank - 2, 0, 5][i % 5]
        layer.set_remaining(torch.isin(torch.arange(layer.width), torch.randperm(layer.width)[:rank]))
        layer.importance.copy_(torch.rand(layer.width, generator=generator) * (i + 1))
    return compact(model).eval()


def groups_in_the_metric(
    weight: Tensor, moment: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The SVD of `W S^(1/2)`, and the inverse of that symmetric root, in numpy."""
    metric = moment.numpy() / moment.numpy().diagonal().mean() + EPSILON * np.eye(len(moment))
    values, vectors = np.linalg.eigh(metric)
    root = (vectors * np.sqrt(values)) @ vectors.T
    u, sigma, vt = np.linalg.svd(weight.detach().double().numpy() @ root, full_matrices=False)
    return u, sigma, vt, np.linalg.inv(root)


def best_for_the_outputs(weight: Tensor, moment: Tensor, rank: int) -> NDArray[np.float64]:
    """The truncated SVD of `W S^(1/2)`, with the symmetric root undone."""
    u, sigma, vt, undone = groups_in_the_metric(weight, moment)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank] @ undone
