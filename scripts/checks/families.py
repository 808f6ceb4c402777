"""
Compress a tiny random model of each family and check it: in groups of the weights, and of its inputs, it computes what
the dense one does, and once compacted it is reloaded in a new process with the same logits to the last bit. Prints a
table, one row a family.

    python scripts/checks/families.py --output_dir families-output
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import pandas as pd
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, inject_singular_groups, rank_report
from rankdyna_trainer.config import GroupBasis

Batch = dict[str, Tensor]

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TINY_VIT = {k: TINY[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
TINY_SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


def text(batch_size: int = 16) -> Batch:
    """Random tokens."""
    return {"input_ids": torch.randint(2, 96, (batch_size, 12))}


def classified(batch: Batch) -> Batch:
    """With one of two labels for each example."""
    return batch | {"labels": torch.arange(len(next(iter(batch.values())))) % 2}


def continued(batch: Batch) -> Batch:
    """With the tokens themselves as labels."""
    return batch | {"labels": batch["input_ids"].clone()}


def small(
    name: str, head: str, config: Mapping[str, object], batch: Callable[[], Batch]
) -> tuple[PreTrainedModel, Batch]:
    """A random model of a family, by the prefix of its classes, and a batch for it."""
    model_config = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}{head}")(model_config), batch()


def encoder(name: str, **config: object) -> tuple[PreTrainedModel, Batch]:
    """A classifier."""
    return small(name, "ForSequenceClassification", TINY | config, lambda: classified(text()))


def decoder(name: str, head: str = "ForCausalLM", **config: object) -> tuple[PreTrainedModel, Batch]:
    """A language model."""
    return small(name, head, TINY | config, lambda: continued(text()))


def gpt2() -> tuple[PreTrainedModel, Batch]:
    """Its layers are `Conv1D`."""
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64)
    return transformers.GPT2LMHeadModel(config), continued(text())


def t5() -> tuple[PreTrainedModel, Batch]:
    """Encoder and decoder with relative positions."""
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), continued(text())


def encoder_decoder() -> tuple[PreTrainedModel, Batch]:
    """Two BERTs."""
    bert = transformers.BertConfig(**TINY)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config), continued(text())


def images(name: str, **config: object) -> tuple[PreTrainedModel, Batch]:
    """A classifier of images."""
    config = {"image_size": 16, "patch_size": 4} | config
    batch = {"pixel_values": torch.randn(16, 3, 16, 16)}
    return small(name, "ForImageClassification", config, lambda: classified(batch))


def speech(name: str) -> tuple[PreTrainedModel, Batch]:
    """A classifier of sounds, encoder only."""
    config = TINY | {
        "conv_dim": (16, 16),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 8),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 2,
        "mask_time_prob": 0.0,
        "classifier_proj_size": 16,
    }
    return small(
        name, "ForSequenceClassification", config, lambda: classified({"input_values": torch.randn(16, 1000)})
    )


def whisper() -> tuple[PreTrainedModel, Batch]:
    """Speech to text."""
    config = TINY_SEQ2SEQ | {
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    return small(
        "Whisper",
        "ForConditionalGeneration",
        config,
        lambda: {"input_features": torch.randn(16, 8, 40), "labels": text()["input_ids"]},
    )


def seq2seq(name: str, head: str, **config: object) -> tuple[PreTrainedModel, Batch]:
    """An encoder and a decoder of the BART kind."""
    return small(name, head, TINY_SEQ2SEQ | config, lambda: continued(text()))


FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, Batch]]] = {
    "BERT": lambda: encoder("Bert"),
    "RoBERTa": lambda: encoder("Roberta"),
    "DistilBERT": lambda: encoder("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "ELECTRA": lambda: encoder("Electra", embedding_size=24),
    "ALBERT": lambda: encoder("Albert", embedding_size=24),
    "DeBERTa-v2": lambda: encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "ModernBERT": lambda: encoder("ModernBert", pad_token_id=0),
    "GPT-2": gpt2,
    "GPT-NeoX": lambda: decoder("GPTNeoX"),
    "OPT": lambda: decoder("OPT", ffn_dim=48, word_embed_proj_dim=24),
    "Llama": lambda: decoder("Llama", num_key_value_heads=2),
    "Qwen2": lambda: decoder("Qwen2", num_key_value_heads=2),
    "Qwen3": lambda: decoder("Qwen3", num_key_value_heads=2, head_dim=8),
    "Falcon": lambda: decoder("Falcon", ffn_hidden_size=48),
    "Mixtral": lambda: decoder("Mixtral", num_key_value_heads=2, num_local_experts=2),
    "BART": lambda: seq2seq("Bart", "ForConditionalGeneration"),
    "T5": t5,
    "Marian": lambda: seq2seq("Marian", "MTModel"),
    "EncoderDecoder": encoder_decoder,
    "ViT": lambda: images("ViT", **TINY_VIT),
    "DeiT": lambda: images("DeiT", **TINY_VIT),
    "Swin": lambda: images("Swin", embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=2, patch_size=2),
    "ConvNeXt": lambda: images("ConvNext", depths=[1, 2], hidden_sizes=[16, 32], num_stages=2, patch_size=2),
    "Wav2Vec2": lambda: speech("Wav2Vec2"),
    "HuBERT": lambda: speech("Hubert"),
    "Whisper": whisper,
}

RELOAD = """
import sys
from pathlib import Path
from typing import get_args
import torch, transformers
from safetensors.torch import load_file, save_file
import rankdyna_trainer
for folder in map(Path, sys.argv[1:]):
    model = getattr(transformers, (folder / "class.txt").read_text()).from_pretrained(folder)
    with torch.no_grad():
        save_file({"logits": model(**load_file(folder / "batch.safetensors")).logits}, folder / "logits.safetensors")
"""


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the model computes in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**batch).logits


def change_by_groups(model: PreTrainedModel, batch: Batch, basis: GroupBasis) -> float:
    """How much a model in singular groups differs from the dense one, relative to what that computes."""
    config = RankDynaConfig(rank_ratio=0.1, group_basis=basis)
    batches = [batch] if basis == "activations" else None
    before, injected = logits_of(model, batch), inject_singular_groups(copy.deepcopy(model), config, batches)
    return float((logits_of(injected, batch) - before).norm() / before.norm())


def compress(name: str, folder: Path, steps: int = 20) -> tuple[dict[str, object], Tensor]:
    """Train, compact and save one family; returns a row of the table and the logits of the compacted model."""
    torch.manual_seed(0)
    model, batch = FAMILIES[name]()
    changes = {basis: f"{change_by_groups(model, batch, basis):.1e}" for basis in get_args(GroupBasis)}
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    examples = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    callback = RankDynaCallback(RankDynaConfig(rank_ratio=0.1))
    trainer = Trainer(model, args, train_dataset=examples, callbacks=[callback])
    trainer.train()
    after = logits_of(model, batch)
    report = rank_report(model)
    save_file(batch, folder / "batch.safetensors")
    (folder / "class.txt").write_text(type(model).__name__)
    row = {
        "family": name,
        "targets": len(report),
        **changes,
        "groups": int(report["full_rank"].sum()),
        "kept": int(report["rank"].sum()),
        "at rank 0": int((report["rank"] == 0).sum()),
    }
    return row, after


def reload(folders: list[Path]) -> list[Tensor]:
    """The logits of saved models, loaded by a new process."""
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, folders)], check=True)
    return [load_file(folder / "logits.safetensors")["logits"] for folder in folders]


def main() -> None:
    """Check all families, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    arguments = parser.parse_args()
    folders = [arguments.output_dir / name for name in arguments.families]
    results = [compress(name, folder) for name, folder in zip(arguments.families, folders, strict=True)]
    rows = [
        row | {"reloaded": "equal" if torch.equal(after, logits) else f"{(after - logits).abs().max():.1e}"}
        for (row, after), logits in zip(results, reload(folders), strict=True)
    ]
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
