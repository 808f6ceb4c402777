"""
What a language model makes of whole texts, beside a reference: for `run.json` of `run_clm.py`, and for the card.

The reference is the model that `--reference` names, or else the teacher of the run, or else the model that its
training starts from. A run that only evaluates has none but the first.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.layers.compaction import is_compacted
from rankdyna_trainer.report.card import is_hub_id, model_card, write_card
from rankdyna_trainer.report.continuations import Continuation, add_continuations
from rankdyna_trainer.report.generated import CARD, is_unchanged, never_fatal

from .prompts import Prompts, continued
from .strided import Nearness, measure


class Reference(NamedTuple):
    """The model that another one is compared with: where it is, and what it is, in words."""

    source: str
    words: str

    def load(self) -> Any:
        """In float32, on the CPU."""
        return AutoModelForCausalLM.from_pretrained(self.source, dtype="float32").eval()


def choose_reference(named: str | None, start: str, config: RankDynaConfig | None, trains: bool) -> Reference | None:
    """
    The model that the final one is compared with.

    Args:
        named: by `--reference`.
        start: the model that the run is given.
        config: of the compression, if there is one.
        trains: whether the final model is another one than that.
    """
    if named is not None:
        on_hub = is_hub_id(named) and not Path(named).exists()
        return Reference(named, named if on_hub else "a model that was given")
    if config is not None and config.teacher not in (None, "self"):
        return Reference(str(config.teacher), "the teacher")
    return Reference(start, "the model that training started from") if trains else None


def positions_of(model: str, tokenizer: Any) -> int:
    """The tokens that a causal language model takes at once."""
    config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length


def check_named_reference(named: str, tokenizer: Any, length: int) -> None:
    """
    Load the model that `--reference` names, and see whether its outputs can be compared with those of another one.

    Args:
        named: the model.
        tokenizer: of that other model.
        length: tokens that it has to take at once.

    Raises:
        OSError: there is no such model.
        ValueError: it has other tokens, or takes fewer at once.
    """
    theirs = AutoTokenizer.from_pretrained(named)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--reference {named} has {len(theirs)} tokens, and the model has {len(tokenizer)}, or others by the same "
            "numbers: their predictions cannot be compared. Give a model with the same tokenizer."
        )
    if (positions := positions_of(named, theirs)) < length:
        raise ValueError(
            f"--reference {named} takes {positions} tokens at once, and {length} are needed: decrease --block_size, "
            "or shorten the --prompts."
        )
    Reference(named, "").load()


class TextReport:
    """
    Reads whole texts with a model and with a reference, and has both go on from prompts.

    Args:
        tokenizer: of the model.
        length: tokens of a window.
        stride: of the windows.
        texts: the rows, by split.
        prompts: from [`prompts_of_rows`] or [`read_prompts`].
        reference: from [`choose_reference`].
        on_card: whether the run saves the model in the output folder.
    """

    def __init__(
        self,
        tokenizer: Any,
        length: int,
        stride: int,
        texts: Mapping[str, Sequence[str]],
        prompts: Prompts,
        reference: Reference | None,
        on_card: bool,
    ) -> None:
        self.tokenizer, self.length, self.stride = tokenizer, length, stride
        self.ids: dict[str, Tensor] = {
            split: torch.tensor(tokenizer("\n\n".join(rows), verbose=False)["input_ids"])
            for split, rows in texts.items()
        }
        self.prompts, self.reference, self.on_card = prompts, reference, on_card

    def observe(self, trainer: Trainer) -> dict[str, Any]:
        """Measure a `Trainer`'s model, print and return what was found, and show it on the card."""
        model: Any = trainer.model.eval()
        reference = None if self.reference is None else self.reference.load().to(model.device)
        with trainer.accelerator.autocast():
            found = {
                split: measure(model, ids.to(model.device), self.length, self.stride, reference)
                for split, ids in self.ids.items()
            }
            ours = continued(model, self.tokenizer, self.prompts)
            theirs = None if reference is None else continued(reference, self.tokenizer, self.prompts)
        shown = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.prompts.ids]
        if trainer.is_world_process_zero():
            for split, nearness in found.items():
                print(self._in_words(split, nearness), flush=True)
            if self.on_card and reference is not None and theirs is not None and is_compacted(model):
                head = "start" if is_compacted(reference) else "dense"
                rows = [*map(Continuation, shown, theirs, ours)]
                self._show(model, Path(trainer.args.output_dir), rows, found, head)
        told: dict[str, Any] = {"length": self.length, "stride": self.stride}
        told["reference"] = None if self.reference is None else self.reference.source
        told |= {split: _without_nan(nearness) for split, nearness in found.items()}
        told["new_tokens"] = self.prompts.new_tokens
        told["continuations"] = [
            {"prompt": prompt, "reference": None if theirs is None else theirs[i], "model": ours[i]}
            for i, prompt in enumerate(shown)
        ]
        return {"text": told}

    def _in_words(self, split: str, found: Nearness) -> str:
        read = (
            f"{split.capitalize()} set, {found.tokens:,} tokens in windows of {self.length} at a stride of "
            f"{self.stride}: perplexity {found.perplexity:.4g}"
        )
        if self.reference is None:
            return f"{read}."
        return (
            f"{read}, of the reference {found.reference_perplexity:.4g}; the same most likely token at "
            f"{found.agreement:.1%} of them, KL divergence from the reference {found.divergence:.4g} nats per token."
        )

    def _show(
        self, model: Any, folder: Path, rows: list[Continuation], found: Mapping[str, Nearness], head: str
    ) -> None:
        """On the card of the run; a baseline has none yet."""
        assert self.reference is not None
        how = [f"Greedily, {self.prompts.new_tokens} tokens; {head} is the reference, {self.reference.words}."]
        how += [self._in_words(split, nearness) for split, nearness in found.items()]
        with never_fatal("show on its card what it writes", folder):
            if not (folder / CARD).exists():
                file_bytes = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
                card = model_card(model, folder.resolve().name, file_bytes=file_bytes, has_processing_class=True)
                write_card(card, folder)
            if is_unchanged(folder / CARD):
                add_continuations(folder, rows, " ".join(how), head)


def _without_nan(found: Nearness) -> dict[str, Any]:
    """JSON has neither NaN nor infinity."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in found._asdict().items()}
