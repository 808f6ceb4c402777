"""Random inputs for a model of any kind, told by its configuration."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def random_inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, Tensor]:
    """
    What the model's forward pass takes at least, on its device and, where it is no tokens, in its precision.

    Args:
        model: whose main input is tokens, pixels, a spectrogram or a sound wave.
        batch_size: examples.
        length: of a text in tokens, or of a sound in samples; pictures and spectrograms have the model's own size.

    Raises:
        ValueError: the model takes something else, or texts of this length are too long for it.
    """
    config: Any = model.config
    name = model.main_input_name
    text = _text_config(config, decoder=name != "input_ids")
    shapes: dict[str, tuple[int, ...]] = {}
    if name == "pixel_values":
        height, width = _pair(_setting(config, "image_size"))
        shapes[name] = (batch_size, _setting(config, "num_channels"), height, width)
    elif name == "input_features":
        frames = 2 * _setting(config, "max_source_positions")
        shapes[name] = (batch_size, _setting(config, "num_mel_bins"), frames)
    elif name == "input_values":
        shapes[name] = (batch_size, length)
    elif name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {name}, of which no random ones can be made.")
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    has_tokens = name == "input_ids" or config.is_encoder_decoder
    if has_tokens and longest is not None and length > longest:
        raise ValueError(f"{type(model).__name__} takes texts of at most {longest} tokens: got a length of {length}.")
    inputs = {key: torch.randn(shape, device=model.device, dtype=model.dtype) for key, shape in shapes.items()}
    if name == "input_ids":
        inputs[name] = _tokens(model, text, batch_size, length)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens(model, _text_config(config, decoder=True), batch_size, length)
    return inputs


def _tokens(model: PreTrainedModel, text_config: Any, batch_size: int, length: int) -> Tensor:
    return torch.randint(_setting(text_config, "vocab_size"), (batch_size, length), device=model.device)


def _text_config(config: Any, decoder: bool) -> Any:
    # Of a model made of two, transformers 4 gives a copy of the whole without its parts.
    part = getattr(config, "decoder" if decoder else "encoder", None)
    return part if hasattr(part, "vocab_size") else config.get_text_config(decoder=decoder)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _setting(config: Any, name: str) -> Any:
    """A value of a configuration, or of one of its parts: that of the encoder comes first."""
    parts = [config, *(getattr(config, part, None) for part in ("encoder", "vision_config", *config.sub_configs))]
    for part in parts:
        if (value := getattr(part, name, None)) is not None:
            return value
    raise ValueError(f"The configuration of this {config.model_type} has no {name}, so no random inputs can be made.")
