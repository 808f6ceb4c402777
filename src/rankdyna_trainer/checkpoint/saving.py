"""Compacted models on disk: written whole or not at all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..layers.distributed import is_sharded
from ..report.generated import CARD, card_place, marked, replace_file
from ..report.staging import staging_folder
from .output_folder import FILES, IMPORTANCE_FILE, check_free, check_room, check_writable, least_bytes
from .replacing import NEW, finish_interrupted, one_at_a_time, put_in_place

logger = logging.getLogger(__name__)


def whole_state_dict(model: nn.Module) -> dict[str, Any] | None:
    """
    All tensors of a model that FSDP2 shards, on the CPU of process 0 (empty elsewhere); `None` if it is not sharded.

    All processes have to call it.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def check_saving(model: nn.Module, directory: str | Path, processing_class: Any = None) -> None:
    """
    Try, before a model is trained, all of its saving but the weights.

    Args:
        model: dense, in singular groups, or compacted.
        directory: in which it is to be saved.
        processing_class: the tokenizer or processor that is to be saved with it.

    Raises:
        OSError: the folder cannot be written, has something in the place of a file, or has no room.
        ValueError: the model's configuration, its generation config or the tokenizer cannot be saved.
    """
    target = Path(directory)
    check_writable(target)
    with one_at_a_time(target):
        finish_interrupted(target)
    check_free(target, FILES)
    check_room(target, least_bytes(model))
    with staging_folder(target) as staging:
        trial = staging / "trial"
        architectures = model.config.architectures if isinstance(model, PreTrainedModel) else None
        try:
            if isinstance(model, PreTrainedModel):
                with _no_progress_bar():
                    model.save_pretrained(trial, state_dict={})
            if processing_class is not None:
                processing_class.save_pretrained(trial)
        except Exception as error:
            raise ValueError(
                f"The model could not be saved after its training, which is why that does not begin: {error}"
            ) from error
        finally:
            if isinstance(model, PreTrainedModel):
                model.config.architectures = architectures  # those of the weights, until the model is saved
        check_free(target, [path.relative_to(trial) for path in trial.rglob("*") if path.is_file()])


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def save_compacted(
    model: Any, directory: str | Path, processing_class: Any = None, state_dict: dict[str, Any] | None = None
) -> int:
    """
    Save a compacted model where `from_pretrained` finds it.

    All files are written beside and then moved in, the configuration last: a folder that has one is complete. If the
    process is killed in between, the new model is whole in `_rankdyna-.../new` there, and the next save, or run, of
    this folder puts it in its place. A card that the model writes replaces none that a person wrote or changed.

    Args:
        model: compacted.
        directory: made if it is missing.
        processing_class: the tokenizer or processor that belongs to the model.
        state_dict: of a sharded model, from [`whole_state_dict`].

    Returns:
        The size of the weight files in bytes.

    Raises:
        OSError: `directory` cannot be written, has something in the place of a file, or has no room. What was in it is
            still there.
    """
    target = Path(directory)
    check_writable(target)
    check_room(target, least_bytes(model))
    with staging_folder(target) as staging:
        new = staging / NEW
        new.mkdir()
        try:
            _write(model, new, processing_class, state_dict)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The compacted model could not be written in {target} ({error}). What was there before is as it was."
            ) from error
        size = sum(path.stat().st_size for path in new.rglob("*.safetensors") if path.name != IMPORTANCE_FILE)
        with one_at_a_time(target):
            finish_interrupted(target)
            _keep_card(new, target)
            put_in_place(staging, target)
    return size


def _write(model: Any, new: Path, processing_class: Any, state_dict: dict[str, Any] | None) -> None:
    if hasattr(model, "save_pretrained"):
        # Models of other libraries have a save_pretrained without this argument.
        arguments = {} if state_dict is None else {"state_dict": state_dict}
        try:
            model.save_pretrained(new, **arguments)
        except ValueError as error:
            if not isinstance(refused := getattr(model, "generation_config", None), GenerationConfig):
                raise
            model.generation_config = GenerationConfig.from_model_config(model.config)
            model.save_pretrained(new, **arguments)
            model.generation_config = refused
            logger.error("The model is saved with another generation config, since its own is refused: %s", error)
    elif state_dict is not None:
        save_file(state_dict, new / "model.safetensors")
    else:
        save_model(model, str(new / "model.safetensors"))
    if processing_class is not None:
        processing_class.save_pretrained(new)


def _keep_card(new: Path, target: Path) -> None:
    """Models of other libraries write a card with themselves."""
    card = new / CARD
    if card.is_file():
        card.write_text(marked(card.read_text(encoding="utf-8")), encoding="utf-8")
        replace_file(card, new / card_place(target).name, CARD)
