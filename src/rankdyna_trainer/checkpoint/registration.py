"""
Makes the format of compacted models known to `transformers`, as soon as that can load a model and not before: what it
takes of `transformers` costs seconds, and a program may import this package long before it needs it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# All models are loaded and saved by a class in this module.
_LOADS_MODELS = "transformers.modeling_utils"


def register_format() -> None:
    """Register the format now, if `transformers` has been used to load models, or else when it is."""
    if _LOADS_MODELS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())


class _Watcher:
    """Finds one module as it would be found without it, and registers the format once that is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LOADS_MODELS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    for module in ("loader", "saved_config"):
        import_module(f"{__package__}.{module}")
