"""SVD in the metric of the data (DRONE, SVD-LLM): the groups that matter least to the outputs are left out."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..config import RankDynaConfig
from ..layers.factorization import factorize_layers
from ..layers.input_moments import input_moments
from ..layers.whitening import metric_roots
from .replacement import dense_targets, factor_by_groups, ranks_to_factor


def whitened_svd(model: nn.Module, config: RankDynaConfig, dataloader: Iterable[Mapping[str, Any]]) -> nn.Module:
    """
    Factor each target layer into the P and Q that change its outputs least on the data, in closed form and in place.

    Of all pairs of this rank they have the least `E |W x - P Q x|^2` for the layer's inputs `x`, but for a small part
    of the plain error; see [`~rankdyna_trainer.layers.whitening`]. Each layer is brought to the same ratio, as by
    [`svd`]. The inputs are those of the dense model. A layer that the data does not reach is factored as by [`svd`].

    Args:
        model: dense and fine-tuned.
        config: chooses the layers, and the ratio, as for [`svd`].
        dataloader: gives batches as a data collator of `transformers` does; a few hundred rows are enough, and labels
            are not needed, but for encoder-decoder models that make their decoder's inputs from them.

    Returns:
        The same model, compacted: `save_pretrained` makes a checkpoint that `from_pretrained` can load.

    Raises:
        TypeError: `model` is no module, `config` no [`RankDynaConfig`], or a batch no mapping.
        ValueError: as [`svd`], or the dataloader is empty. The model is then left as it was.

    Example:

    ```python
    from rankdyna_trainer import RankDynaConfig
    from rankdyna_trainer.baselines import whitened_svd

    whitened_svd(model, RankDynaConfig(param_ratio=0.3), batches).save_pretrained("smaller")
    ```
    """
    targets = dense_targets(model, config)
    moments = input_moments(model, {name: targets[name] for name in ranks_to_factor(targets, config)}, dataloader)
    if not moments:
        raise ValueError(
            "No batch of the dataloader reached a target layer: it is empty, or the model uses other layers."
        )
    return factor_by_groups(model, targets, config, partial(factorize_layers, roots=metric_roots(moments)))
