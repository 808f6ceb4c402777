"""SVD in the metric of the data (DRONE, SVD-LLM): the groups that matter least to the outputs are left out."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any, get_args

from torch import Tensor, nn

from ..config import RankDynaConfig, RankScope
from ..layers.dense import DenseLayer
from ..layers.factor_cache import Factors
from ..layers.factorization import factorize_layers
from ..layers.input_moments import input_moments, parts_that_fit
from ..layers.targets import TargetLayer
from ..layers.whitening import observed_roots
from ..options import check_choice
from .block_by_block import NOTHING_OBSERVED, factors_block_by_block
from .expected_loss import ranks_by_expected_loss
from .replacement import dense_targets, ranks_to_factor, replace_layers


def whitened_svd(
    model: nn.Module,
    config: RankDynaConfig,
    dataloader: Iterable[Mapping[str, Any]],
    rank_scope: RankScope = "local",
) -> nn.Module:
    """
    Factor each target layer into the P and Q that change its outputs least on the data, in closed form and in place.

    Of all pairs of this rank they have the least `E |W x - P Q x|^2` for the layer's inputs `x`, but for a small part
    of the plain error; see [`~rankdyna_trainer.layers.whitening`]. The inputs of a block's layers are those in the
    model whose blocks before it are compressed already; see
    [`~rankdyna_trainer.baselines.block_by_block.factors_block_by_block`]. A layer that the data does not reach is
    factored as by [`svd`], and a log line says so.

    Args:
        model: dense and fine-tuned; with the scope `"local"` it may be offloaded, as for [`svd`].
        config: chooses the layers, and the ratio, as for [`svd`]. Its `rank_scope` is not read.
        dataloader: gives batches as a data collator of `transformers` does, which are kept; a few hundred rows are
            enough. With `rank_scope="local"` labels are not needed, but for encoder-decoder models that make their
            decoder's inputs from them.
        rank_scope: `"local"`: each layer is brought to the same ratio. `"global"`: the layers share the budget, and
            those groups remain whose loss is expected to be largest, see
            [`~rankdyna_trainer.baselines.expected_loss.expected_losses`]; each block keeps the `block_floor` of the
            config. The model has to return a loss, for which the batches need labels, unless it is a causal language
            model; and it is run backwards.

    Returns:
        The same model, compacted: `save_pretrained` makes a checkpoint that `from_pretrained` can load.

    Raises:
        TypeError: `model` is no module, `config` no [`RankDynaConfig`], or a batch no mapping.
        ValueError: as [`svd`], or the dataloader is empty, or `rank_scope` is neither, or it is `"global"` and the
            model returns no finite loss. The model is then left as it was.

    Example:

    ```python
    from rankdyna_trainer import RankDynaConfig
    from rankdyna_trainer.baselines import whitened_svd

    whitened_svd(model, RankDynaConfig(param_ratio=0.3), batches).save_pretrained("smaller")
    ```
    """
    check_choice("rank_scope", rank_scope, get_args(RankScope))
    targets = dense_targets(model, config, offloaded=rank_scope == "local")
    batches = list(dataloader)
    if not batches:
        raise ValueError(NOTHING_OBSERVED)
    if rank_scope == "global":
        ranks = ranks_by_expected_loss(model, config, targets, batches)
    else:
        ranks = ranks_to_factor(targets, config)
    return replace_layers(model, targets, factors_block_by_block(model, targets, ranks, batches))


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
            raise ValueError(NOTHING_OBSERVED)
        with closing(factorize_layers(part, roots=roots)) as factorized:
            for name, factors in factorized:
                yield name, factors, roots.get(name)
