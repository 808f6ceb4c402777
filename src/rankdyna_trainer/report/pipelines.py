"""What a model is for, as the Hub and as `pipeline` name it."""

from torch import nn
from transformers.modelcard import TASK_MAPPING


def pipeline_tag_of(model: nn.Module) -> str | None:
    """The Hub's name for what a model of this class does, where `transformers` knows one."""
    name, tag = type(model).__name__, None
    for task, classes in TASK_MAPPING.items():
        if name in classes.values() or any(
            isinstance(many, (tuple, list)) and name in many for many in classes.values()
        ):
            tag = task  # the last one, as the Trainer has it: the tasks that many models can do stand first
    return "text-generation" if tag == "text2text-generation" else tag  # the Hub has joined these two


def pipeline_task(model: nn.Module, tag: str | None) -> str | None:
    """The task under which a `pipeline` takes a model that has this tag on the Hub, if there is one."""
    from transformers.pipelines import PIPELINE_REGISTRY

    if tag == "text-generation" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None  # this pipeline takes decoders alone
    return tag if tag in PIPELINE_REGISTRY.get_supported_tasks() else None
