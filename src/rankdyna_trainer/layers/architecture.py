"""What a model's structure tells: its repeated blocks, its heads, and who reads whose weight."""

from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .low_rank import CompressedLayer
from .source_reads import weights_read_by


def module_places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where each module of a model stands, as (parent, attribute): in several places if it is shared, as in ALBERT."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """
    The name prefixes, such as `"bert.encoder.layer."`, of the model's repeated transformer blocks.

    A stack of blocks is an outermost `ModuleList` with linear layers somewhere inside its entries (which are not
    linear layers themselves, as in a list of heads), or such a `Sequential` of several entries of one class. Heads on
    top of a pre-trained model's base model have none.
    """
    heads = _head_modules(model)
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if module not in heads and _is_stack(module) and not name.startswith(tuple(prefixes)):
            prefixes.append(f"{name}." if name else "")
    return tuple(prefixes)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated transformer blocks, those of [`block_prefixes`], in the order in which they stand."""
    stacks = [model.get_submodule(prefix.removesuffix(".")) for prefix in block_prefixes(model)]
    return [block for stack in stacks for block in stack.children()]


def has_encoder(model: nn.Module) -> bool:
    """
    Whether `model.get_encoder()` is the encoder of an encoder-decoder.

    Under transformers 4 an encoder-decoder's encoder alone (Whisper's for classes) has no such method.
    """
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and hasattr(model, "get_encoder")


def head_was_trained(model: nn.Module | None) -> bool:
    """
    Whether a model came with all of its weights: not if its class is another than the one that was saved, so that
    `from_pretrained` made its head anew, nor if its configuration names no class. One that was made anew from the
    configuration of a saved model cannot be told from that model. Of other modules it is not known.
    """
    return type(model).__name__ in (getattr(getattr(model, "config", None), "architectures", None) or ())


def names_by_block(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """
    Which of the names stand in which of the model's repeated transformer blocks.

    Args:
        model: whose modules have these names.
        names: of modules; those outside of any block are left out.

    Returns:
        By block, such as `"bert.encoder.layer.0"`, in the order in which the names come.
    """
    prefixes = block_prefixes(model)
    found: dict[str, list[str]] = {}
    for name in names:
        for prefix in prefixes:
            if name.startswith(prefix):
                found.setdefault(prefix + name.removeprefix(prefix).partition(".")[0], []).append(name)
    return found


def output_layers(model: nn.Module) -> set[nn.Module]:
    """All modules that belong to a head: outside of a pre-trained model's base model, or its output embeddings."""
    outputs = _head_modules(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            embeddings = module.get_output_embeddings()
            if embeddings is not None:
                outputs.add(embeddings)
    return outputs


def layers_read_by_parents(model: nn.Module) -> set[nn.Module]:
    """
    The layers whose `weight` some module around them reads, as `nn.MultiheadAttention` does with `out_proj.weight`.

    Found in the source of each module's `forward`, and of the methods and functions that it calls with itself or with
    a layer. A read of `weight.dtype` and the like does not count.
    """
    reads = {module_class: weights_read_by(module_class) for module_class in set(map(type, model.modules()))}
    return {
        layer
        for module in model.modules()
        for path in reads[type(module)]
        for layer in _resolve(module, path)
        if layer is not module
    }


def _head_modules(model: nn.Module) -> set[nn.Module]:
    heads: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.base_model is not module:
            heads |= set(module.modules()) - set(module.base_model.modules()) - {module}
    # A container around a base model, such as a module list of submodels, is no head.
    return {module for module in heads if not any(isinstance(child, PreTrainedModel) for child in module.modules())}


def _is_stack(module: nn.Module) -> bool:
    entries = list(module.children())
    if any(isinstance(entry, (nn.Linear, Conv1D, CompressedLayer)) for entry in entries):
        return False
    if isinstance(module, nn.Sequential):
        if len(entries) < 2 or len({type(entry) for entry in entries}) > 1:
            return False
    elif not isinstance(module, nn.ModuleList):
        return False
    inside = (part for entry in entries for part in entry.modules() if part is not entry)
    return any(isinstance(part, (nn.Linear, Conv1D, CompressedLayer)) for part in inside)


def _resolve(module: nn.Module, path: tuple[str, ...]) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    name, *rest = path
    children = module.children() if name == "*" else [getattr(module, name, None)]
    for child in children:
        if isinstance(child, nn.Module):
            yield from _resolve(child, tuple(rest))
