"""SVD in the metric of the data (DRONE, SVD-LLM): the groups that matter least to the outputs are left out."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..config import RankDynaConfig
from ..layers.dense import DenseLayer
from ..layers.factor_cache import Factors
from ..layers.factorization import factorize_layers
from ..layers.input_moments import input_moments, parts_that_fit
from ..layers.targets import TargetLayer
from ..layers.whitening import observed_roots
from .replacement import dense_targets, factor_by_groups


def whitened_svd(model: nn.Module, config: RankDynaConfig, dataloader: Iterable[Mapping[str, Any]]) -> nn.Module:
    """
    Factor each target layer into the P and Q that change its outputs least on the data, in closed form and in place.

    Of all pairs of this rank they have the least `E |W x - P Q x|^2` for the layer's inputs `x`, but for a small part
    of the plain error; see [`~rankdyna_trainer.layers.whitening`]. Each layer is brought to the same ratio, as by
    [`svd`]. The inputs are those of the dense model. A layer that the data does not reach is factored as by [`svd`],
    and a log line says so. The data is run once, but for a large model once for each part of it, so that the second
    moments of the inputs hold about 3 GiB at most; the batches are then kept.

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
    return factor_by_groups(model, dense_targets(model, config), config, partial(whitened_groups, model, dataloader))


def whitened_groups(
    model: nn.Module, dataloader: Iterable[Mapping[str, Any]], layers: Mapping[str, DenseLayer]
) -> Generator[tuple[str, Factors]]:
    """
    The singular groups of layers in the metric of their inputs, by name, as they get ready; the model stays as it is.

    Args:
        model: dense.
        dataloader: as for [`whitened_svd`].
        layers: of this model, by name.

    Returns:
        Of each layer `u` `(rank, out_features)`, `sigma` `(rank,)` and `v` `(rank, in_features)`, those first that
        matter most; see [`~rankdyna_trainer.layers.whitening.whitened_factors`].

    Raises:
        TypeError: a batch is no mapping.
        ValueError: no batch told anything about a layer.
    """
    with closing(groups_on_data(model, dataloader, layers)) as groups:
        for name, factors, _ in groups:
            yield name, factors


def groups_on_data(
    model: nn.Module, dataloader: Iterable[Mapping[str, Any]], layers: Mapping[str, TargetLayer]
) -> Generator[tuple[str, Factors, Tensor | None]]:
    """
    The singular groups of layers in the metric of their inputs on data, as they get ready.

    Args:
        model: dense or compacted.
        dataloader: as for [`whitened_svd`].
        layers: of this model, by name, with at least one group.

    Returns:
        By name the groups as of [`~rankdyna_trainer.layers.factorization.factorize_layers`], and the root of the
        metric, or `None` for a layer that the data does not reach, whose groups are those of its weight.

    Raises:
        TypeError: a batch is no mapping.
        ValueError: no batch told anything about any layer.
    """
    parts = parts_that_fit(layers)
    # Kept if needed again: what gives the batches may give them only once.
    batches = dataloader if len(parts) == 1 else list(dataloader)
    observed = False
    for names in parts:
        part = {name: layers[name] for name in names}
        roots = observed_roots(part, partial(input_moments, model, batches=batches))
        observed = observed or bool(roots)
        if not observed and (names is parts[-1] or batches == []):
            raise ValueError(
                "No batch of the dataloader told anything about a target layer: it is empty, the model uses other "
                "layers for it, or what enters them is not finite."
            )
        with closing(factorize_layers(part, roots=roots)) as factorized:
            for name, factors in factorized:
                yield name, factors, roots.get(name)
