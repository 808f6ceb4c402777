"""Plain SVD: the largest singular values of each weight are kept."""

from functools import partial

from torch import nn

from ..config import RankDynaConfig
from ..layers.factor_cache import FactorizationCache
from ..layers.factorization import factorize_layers
from .replacement import dense_targets, factor_by_groups


def svd(model: nn.Module, config: RankDynaConfig) -> nn.Module:
    """
    Factor each target layer into P and Q by its largest singular values (eq. 1), in place.

    Of all pairs of this rank it has the least `sum_ij (W_ij - (P Q)_ij)^2`. Each layer is brought to the same ratio,
    see [`~rankdyna_trainer.method.budget.uniform_rank`]; one of which P and Q would hold more numbers than the
    weight stays as it is.

    Args:
        model: dense and fine-tuned. One that `device_map` has offloaded is brought in a layer at a time, and P and Q
            of such layers wait on the CPU.
        config: chooses the layers, and the ratio. Its `factorization_cache` is used. The fields that control when and
            which groups a RankDyna run removes are not.

    Returns:
        The same model, compacted: `save_pretrained` makes a checkpoint that `from_pretrained` can load.

    Raises:
        TypeError: `model` is no module, or `config` no [`RankDynaConfig`].
        ValueError: no layer matches; a weight has inf or nan, or no values yet; a target is quantized or sharded; the
            model is wrapped by peft, or already compressed. The model is then left as it was.

    Example:

    ```python
    from rankdyna_trainer import RankDynaConfig
    from rankdyna_trainer.baselines import svd

    svd(model, RankDynaConfig(rank_ratio=0.2)).save_pretrained("smaller")
    ```
    """
    targets = dense_targets(model, config, offloaded=True)
    cache = None if config.factorization_cache is None else FactorizationCache(config.factorization_cache)
    return factor_by_groups(model, targets, config, partial(factorize_layers, cache=cache))
