"""Compacted models on disk: written whole or not at all, and read through `from_pretrained`."""

import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .architecture import module_places
from .config import shown
from .dense import DenseLayer, dense_weight, mark_kept_dense
from .integrity import SavedTensors, check_before_loading, check_loaded, find_layers, read_headers
from .layers import LowRankLinear
from .rank_record import METHOD, TAGS
from .self_contained import keep_self_contained

WEIGHTS_PATTERNS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
STAGING_PREFIX = "_rankdyna-"


def whole_state_dict(model: nn.Module) -> dict[str, Any] | None:
    """
    All tensors of a model that FSDP2 shards, on the CPU of process 0 (empty elsewhere); `None` if it is not sharded.

    All processes have to call it.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_compacted(
    model: Any, directory: str | Path, processing_class: Any = None, state_dict: dict[str, Any] | None = None
) -> int:
    """
    Save a compacted model where `from_pretrained` finds it.

    All files are written beside and then moved in, the configuration last: a folder that has one is complete.

    Args:
        model: compacted.
        directory: made if it is missing.
        processing_class: the tokenizer or processor that belongs to the model.
        state_dict: of a sharded model, from [`whole_state_dict`].

    Returns:
        The size of the weight files in bytes.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    target = Path(directory)
    if target.is_file():
        raise NotADirectoryError(f"{target} is a file: give the folder to save the compacted model in.")
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob(f"{STAGING_PREFIX}*"):  # left by a process that was killed while it saved
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=target))
    try:
        if hasattr(model, "save_pretrained"):
            # Models of other libraries have a save_pretrained without this argument.
            model.save_pretrained(staging, **({} if state_dict is None else {"state_dict": state_dict}))
        elif state_dict is not None:
            save_file(state_dict, staging / "model.safetensors")
        else:
            save_model(model, str(staging / "model.safetensors"))
        if processing_class is not None:
            processing_class.save_pretrained(staging)
        written = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        (target / "config.json").unlink(missing_ok=True)
        for pattern in WEIGHTS_PATTERNS:
            for stale in target.glob(pattern):
                stale.unlink()
        size = sum(path.stat().st_size for path in staging.rglob("*.safetensors"))
        for path in written:
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, target / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return size


@register_quantization_config(METHOD)
class RankDynaCheckpointConfig(QuantizationConfigMixin):
    """
    What `config.json` says of a compacted model, under `quantization_config`.

    Args:
        ranks: the rank of each low-rank layer, by name.
        dense: the rank of each target layer that was kept dense, by name.

    Raises:
        ValueError: the ranks are missing, or one of them is no whole number of at least 0.
    """

    # The names of the arguments come from a file: one of them may be "self".
    def __init__(self, /, ranks: Any = None, dense: Any = None, quant_method: str = METHOD, **_: Any) -> None:
        self.quant_method = quant_method
        self.ranks = _checked_ranks(ranks)
        self.dense = _checked_ranks({} if dense is None else dense)


@register_quantizer(METHOD)
class RankDynaLoader(HfQuantizer):
    """
    Rebuilds a compacted model in `from_pretrained`: an entry point of `transformers` meant for quantization, of which
    only the exchange of modules before the weights are read is used. What comes out is an ordinary model.
    """

    quantization_config: RankDynaCheckpointConfig
    _headers: SavedTensors
    _missing: set[str] | None = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        # transformers 4 does not hand over the files.
        files = options["checkpoint_files"] if "checkpoint_files" in options else _files_of_caller()
        self._headers = read_headers(files or [])
        saved_ranks, saved_dense = self.quantization_config.ranks, self.quantization_config.dense
        names = find_layers(model, [*saved_ranks, *saved_dense], self._headers)
        places = module_places(model)
        for saved, rank in saved_ranks.items():
            if saved not in names:
                continue
            layer = model.get_submodule(names[saved])
            out_features, in_features = _checked_dense_shape(saved, rank, layer)
            self._check_shape(saved, rank, "weight", (0,))
            self._check_shape(saved, rank, "p.weight", (out_features, rank))
            self._check_shape(saved, rank, "q.weight", (rank, in_features))
            low_rank = LowRankLinear(
                in_features,
                out_features,
                rank,
                bias=layer.bias is not None,
                original_class=type(layer),
                device=layer.weight.device,
                dtype=layer.weight.dtype,
            )
            for parent, attribute in places[layer]:
                setattr(parent, attribute, low_rank)
        for saved, rank in saved_dense.items():
            if saved in names:
                layer = model.get_submodule(names[saved])
                _checked_dense_shape(saved, rank, layer)
                mark_kept_dense(layer, rank)
        # A base model loaded from a model with a head, or the reverse, has other names from now on.
        self.quantization_config = RankDynaCheckpointConfig(
            ranks={names[saved]: rank for saved, rank in saved_ranks.items() if saved in names},
            dense={names[saved]: rank for saved, rank in saved_dense.items() if saved in names},
        )
        check_before_loading(model, self._headers)

    def update_missing_keys(self, model: PreTrainedModel, missing_keys: list[str], prefix: str) -> list[str]:
        """Note which parameters the files lack: asked by transformers 4, which does not mark what it has loaded."""
        self._missing = set(missing_keys)
        return missing_keys

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        check_loaded(model, self._headers, self._missing)
        # transformers 4 leaves the names of the file, and a type that config.json could not hold after a merge.
        model.config.quantization_config = self.quantization_config
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.config.__dict__.pop("_pre_quantization_dtype", None)
        # From here on it is an ordinary model, which may be cast, trained and quantized; the ranks stay in its config.
        del model.hf_quantizer
        model.is_quantized = False
        model.add_model_tags(TAGS)
        keep_self_contained(model)
        return model

    def _check_shape(self, layer: str, rank: int, tensor: str, expected: tuple[int, ...]) -> None:
        saved = self._headers.get(f"{layer}.{tensor}")
        if saved is not None and saved.shape != expected:
            raise ValueError(
                f"config.json says that layer {layer} has rank {rank}, so its {tensor} should be {expected}, but it "
                f"is {saved.shape} in the file: config.json and the weights are of different checkpoints."
            )

    def is_serializable(self, **_: Any) -> bool:
        """Whether the loaded model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the loaded model can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the loaded model can be trained without an adapter."""
        return True


def _files_of_caller() -> list[str] | None:
    """The files that `from_pretrained`, one of the calling functions, is about to read."""
    frame = inspect.currentframe()
    while frame is not None:
        if "checkpoint_files" in frame.f_locals:
            return frame.f_locals["checkpoint_files"]
        frame = frame.f_back
    return None


def _checked_dense_shape(name: str, rank: int, layer: DenseLayer) -> torch.Size:
    shape = dense_weight(layer).shape
    if rank > min(shape):
        raise ValueError(
            f"config.json says that layer {name} has rank {shown(rank)}, but its weight has at most {min(shape)} "
            "groups: config.json is damaged, or of another model."
        )
    return shape


def _checked_ranks(ranks: Any) -> dict[str, int]:
    if not isinstance(ranks, dict):
        raise ValueError(
            "config.json is damaged: the RankDyna ranks must be a mapping from layer names to ranks, got "
            f"{shown(ranks)}. Copy or download it again."
        )
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(
                f"config.json is damaged: the rank of layer {name!s:.200} must be a whole number of at least 0, got "
                f"{shown(rank)}. Copy or download it again."
            )
    return ranks
