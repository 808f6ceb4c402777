"""Compacted models read through `from_pretrained`."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.architecture import module_places
from ..layers.dense import DenseLayer, dense_weight, mark_kept_dense
from ..layers.low_rank import STANDS_FOR_WEIGHT, LowRankLinear
from ..layers.rank_record import TAGS, set_record
from ..layers.stock_refusal import ENTRY
from ..options import METHOD, shown
from .integrity import SavedTensors, check_before_loading, check_loaded, find_layers, read_headers
from .self_contained import keep_self_contained


class RankDynaCheckpointConfig(QuantizationConfigMixin):
    """
    What `config.json` says of a compacted model, under `rankdyna`: not under `quantization_config`, where no other
    method could stand beside it.

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


def with_ranks(quantizer: HfQuantizer | None, record: Any) -> HfQuantizer:
    """
    What exchanges the layers of a compacted model in `from_pretrained`.

    Args:
        quantizer: of a model that is quantized as well, or is to be: it is asked afterwards, of P and Q.
        record: what `config.json` says of the ranks.

    Raises:
        ValueError: that is damaged.
    """
    loader = RankDynaLoader(RankDynaCheckpointConfig(**record if isinstance(record, dict) else {"ranks": record}))
    return loader if quantizer is None else loader.before(quantizer)


class RankDynaLoader(HfQuantizer):
    """
    Rebuilds a compacted model in `from_pretrained`: an entry point of `transformers` meant for quantization, of which
    only the exchange of modules before the weights are read is used. What comes out is an ordinary model.
    """

    quantization_config: RankDynaCheckpointConfig
    _headers: SavedTensors
    _missing: set[str] | None = None
    _is_quantized = False

    def before(self, quantizer: HfQuantizer) -> HfQuantizer:
        """A quantizer that has the layers exchanged by this one before it looks at the model, once."""
        hooks: Any = quantizer
        process, finish = hooks._process_model_before_weight_loading, hooks._process_model_after_weight_loading
        note = getattr(hooks, "update_missing_keys", None)
        self._is_quantized = quantizer.pre_quantized
        if not self._is_quantized:
            _check_groups(quantizer, self.quantization_config.ranks)

        def before_weight_loading(model: PreTrainedModel, **options: Any) -> Any:
            self._process_model_before_weight_loading(model, **options)
            return process(model, **options)

        def after_weight_loading(model: PreTrainedModel, **options: Any) -> Any:
            for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading"):
                delattr(quantizer, name)
            vars(quantizer).pop("update_missing_keys", None)
            self._finish(model)
            return finish(model, **options)

        hooks._process_model_before_weight_loading = before_weight_loading
        hooks._process_model_after_weight_loading = after_weight_loading
        if note is not None:
            hooks.update_missing_keys = lambda *given: note(given[0], self.update_missing_keys(*given), given[2])
        return quantizer

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
            self._check_shape(saved, rank, "weight", STANDS_FOR_WEIGHT)
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
        if not self._is_quantized:  # its tensors have other names, types and sizes
            check_before_loading(model, self._headers)

    def update_missing_keys(self, model: PreTrainedModel, missing_keys: list[str], prefix: str) -> list[str]:
        """Note which parameters the files lack: asked by transformers 4, which does not mark what it has loaded."""
        self._missing = set(missing_keys)
        return missing_keys

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self._finish(model)
        vars(model.config).pop("quantization_config", None)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                # Of transformers 4: a type that config.json could not hold after a merge.
                part.config.__dict__.pop("_pre_quantization_dtype", None)
        # From here on it is an ordinary model, which may be cast, trained and quantized; the ranks stay in its config.
        del model.hf_quantizer
        model.is_quantized = False
        return model

    def _finish(self, model: PreTrainedModel) -> None:
        check_loaded(model, self._headers, self._missing)
        for layer in model.modules():
            if isinstance(layer, LowRankLinear):
                layer.settle()
        record = self.quantization_config
        set_record(model.config, {"ranks": record.ranks, "dense": record.dense})
        vars(model.config).pop(ENTRY, None)
        model.add_model_tags(TAGS)
        keep_self_contained(model)

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


def _check_groups(quantizer: HfQuantizer, ranks: dict[str, int]) -> None:
    method = getattr(quantizer.quantization_config, "quant_type", None)  # of torchao; a string in older ones
    size = getattr(getattr(method, "granularity", None), "group_size", None)
    undivided = [name for name, rank in ranks.items() if isinstance(size, int) and rank % size]
    if undivided:
        raise ValueError(
            f"Groups of {size} numbers do not divide the ranks of {len(undivided)} of {len(ranks)} layers "
            f"({undivided[0]}: {ranks[undivided[0]]}, ...). Quantize by rows (granularity=PerAxis(0)), which takes "
            f"any rank, or compress with rank_multiple_of={size}."
        )


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
