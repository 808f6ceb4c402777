"""
Makes the format of compacted models known to `transformers`, and to peft, once they can use a model and not before:
what this library takes of them costs seconds, and a program may import it long before it needs it.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from ..options import METHOD

# All models are loaded and saved by a class in this module.
_LOADS_MODELS = "transformers.modeling_utils"
# All adapters are put into a model by a class in this one.
_ADAPTS_MODELS = "peft.tuners.tuners_utils"


def register_format() -> None:
    """Register the format now, if models have been loaded or adapted, or else when they are."""
    for name, register in {_LOADS_MODELS: _register, _ADAPTS_MODELS: _explain_targets}.items():
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Watcher(name, register))


class _Watcher:
    """Finds one module as it would be found without it, and registers the format once that is imported."""

    def __init__(self, name: str, register: Callable[[Any], None]) -> None:
        self._name, self._register = name, register

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the module is, with a loader that registers the format afterwards; `None` for all others."""
        if name != self._name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            self._register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(modeling: Any) -> None:
    # Nothing of this library that needs transformers is imported here: it may be what imports that just now.
    configurations: Any = import_module("transformers.configuration_utils")
    refusal = import_module(f"{__package__.rpartition('.')[0]}.layers.stock_refusal")
    setattr(configurations.PretrainedConfig, refusal.ENTRY, refusal.HiddenEntry())
    _load_with_ranks(modeling)
    _save_as_it_is(modeling.PreTrainedModel)


def _explain_targets(tuners: Any) -> None:
    import_module(f"{__package__.rpartition('.')[0]}.layers.adapters").explain_targets(tuners)


def _load_with_ranks(modeling: Any) -> None:
    """
    Let the layers of a configuration with ranks be exchanged before the weights are read, by the object that
    `from_pretrained` asks to exchange them for quantized ones, if there is one, before it does.
    """
    choose = modeling.get_hf_quantizer

    @functools.wraps(choose)
    def get_hf_quantizer(config: Any, *arguments: Any, **options: Any) -> Any:
        quantizer, *others = choose(config, *arguments, **options)
        if hasattr(config, METHOD):
            quantizer = import_module(f"{__package__}.loader").with_ranks(quantizer, getattr(config, METHOD))
        return quantizer, *others

    modeling.get_hf_quantizer = get_hf_quantizer


def _save_as_it_is(model_class: Any) -> None:
    """
    Let models write the ranks that their layers have, and the scores of their groups. There is no hook for it, and
    what may be saved, a part of a compacted model or a model that has got one as a part, is of a class that knows
    nothing of ranks.
    """
    save = model_class.save_pretrained

    @functools.wraps(save)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *arguments: Any, **options: Any
    ) -> Any:
        from ..layers.auto_map import mapped_as_it_is
        from ..layers.compaction import is_compacted
        from ..layers.rank_record import recorded_as_it_is
        from .importance_file import write_importance

        with recorded_as_it_is(self), mapped_as_it_is(self):
            result = save(self, save_directory, is_main_process, *arguments, **options)
        if is_main_process and is_compacted(self) and os.path.isdir(save_directory):
            write_importance(self, save_directory)
        return result

    model_class.save_pretrained = save_pretrained
