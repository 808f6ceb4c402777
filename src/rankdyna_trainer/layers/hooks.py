"""Hooks that watch a model in training, and leave no trace on it."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Hook:
    """A hook of a module that does nothing in a copy of the module, or in a saved one, which has no use of it."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return None if self.call is None else self.call(*arguments)

    def __reduce__(self) -> tuple[type["Hook"], tuple[()]]:
        return Hook, ()


def release(model: nn.Module) -> None:
    """Take all [`Hook`]s off a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
