"""What peft says of a low-rank layer that it is to adapt, with the names to give instead."""

import functools
from collections.abc import Iterable
from typing import Any

from .low_rank import LowRankLinear


def explain_targets(tuners: Any) -> None:
    """
    Let an adapter that names low-rank layers, as it would name those of the dense model, be refused with the names of
    their factors.

    Args:
        tuners: the module `peft.tuners.tuners_utils`.
    """
    inject = tuners.BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *arguments: Any, **options: Any) -> Any:
        try:
            return inject(self, model, adapter_name, *arguments, **options)
        except ValueError as error:
            if LowRankLinear.__name__ not in str(error):
                raise
            config = self.peft_config[adapter_name]
            raise ValueError(_advice(model, getattr(config, "target_modules", None))) from error

    tuners.BaseTuner.inject_adapter = inject_adapter


def _advice(model: Any, given: Any) -> str:
    names = sorted(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    low_rank = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    low_rank_names = [name for name in names if any(f".{layer}".endswith(f".{name}") for layer in low_rank)]
    wanted = [name for name in names if name not in low_rank_names]
    wanted += [f"{name}.{factor}" for name in low_rank_names or ("",) for factor in "qp"]
    empty = [f"{name}.{factor}" for name, layer in low_rank.items() if not layer.rank for factor in "qp"]
    advice = f"target_modules={[name.removeprefix('.') for name in wanted]}"
    if empty:
        advice += f", and exclude_modules={empty}, which have rank 0"
    return (
        f"target_modules={names or given} names layers that are compressed, of which the factors q and p can be "
        f"adapted: give {advice}."
    )
