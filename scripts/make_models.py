"""
Makes small models for experiments where nothing can be downloaded: folders that the other scripts take.

    python scripts/make_models.py from_onnx encoder.onnx encoder --tokenizer folder
    python scripts/make_models.py encoder_decoder encoder encoder-decoder
    python scripts/make_models.py gpt2 train.jsonl --output gpt2

`from_onnx` reads the weights of a BERT encoder out of an ONNX graph, `encoder_decoder` joins an encoder with a copy of
it that decodes, and `gpt2` trains a tokenizer for a decoder with random weights, which `run_clm.py --method none` then
pre-trains. A folder is there only once it is complete.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from run_summarization import join_encoders
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
)
from transformers.trainer_utils import set_seed

SENTENCES = ["A model that was converted must compute the same.", "Does it?"]
TOLERANCE = 1e-4
WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
TYPES, INNER = "embeddings.token_type_embeddings.weight", "encoder.layer.0.intermediate.dense.weight"
END = "<|endoftext|>"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (from_onnx, encoder_decoder, gpt2):
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(make=function)
        if function is from_onnx:
            command.add_argument("onnx_file", type=Path)
            command.add_argument("output", type=Path, help="the folder to make")
            command.add_argument("--heads", type=int, default=12, help="of attention: no weight tells their number")
            command.add_argument("--tokenizer", help="a folder with it, if it is not in that of the ONNX file")
        elif function is encoder_decoder:
            command.add_argument("encoder", help="the folder or Hub name of an encoder with its tokenizer")
            command.add_argument("output", type=Path, help="the folder to make")
        else:
            command.add_argument("text_files", nargs="+", type=Path, help="JSON lines with a column text")
            command.add_argument("--output", type=Path, required=True, help="the folder to make")
            sizes = {"vocabulary": 8000, "layers": 4, "hidden": 256, "heads": 4, "positions": 256}
            for name, default in sizes.items():
                command.add_argument(f"--{name}", type=int, default=default)
        if function is not from_onnx:
            command.add_argument("--seed", type=int, default=0, help="of the weights that are new")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the model, and save it with its tokenizer."""
    options = parse_args(arguments)
    output: Path = options.output
    if output.exists():
        raise FileExistsError(f"{output} is there already: remove it, or name another folder.")
    set_seed(getattr(options, "seed", 0))
    model, tokenizer = options.make(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=output.name) as scratch:
        folder = Path(scratch) / output.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        os.rename(folder, output)
    print(f"{output}: {type(model).__name__}, {model.num_parameters():,} parameters")


def from_onnx(options: argparse.Namespace) -> tuple[Any, Any]:
    """Turn the ONNX graph of a BERT encoder in float32 into a BertModel, and check that both compute the same."""
    weights = read_weights(onnx.load(options.onnx_file).graph)
    config = BertConfig(
        vocab_size=len(weights[WORDS]),
        hidden_size=weights[WORDS].shape[1],
        num_hidden_layers=len([name for name in weights if name.endswith("intermediate.dense.weight")]),
        num_attention_heads=options.heads,
        intermediate_size=len(weights[INNER]),
        max_position_embeddings=len(weights[POSITIONS]),
        type_vocab_size=len(weights[TYPES]),
    )
    model = BertModel(config, add_pooling_layer="pooler.dense.weight" in weights).eval()
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(f"{options.onnx_file} is no BERT encoder as transformers has it: it lacks {missing}.")
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in wanted})
    beside = (options.onnx_file.parent / "tokenizer_config.json").exists()
    if not beside and options.tokenizer is None:
        raise ValueError(f"{options.onnx_file.parent} has no tokenizer: give --tokenizer.")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.onnx_file.parent)
    difference = largest_difference(options.onnx_file, model, tokenizer)
    print(f"Largest difference of a hidden state: {difference:.1e}")
    if not difference <= TOLERANCE:
        raise ValueError(f"The hidden states differ by {difference:.1e}: has the model {options.heads} --heads?")
    return model, tokenizer


def read_weights(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The weights of the encoder, under the names that they have in a `BertModel`."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # weights that are equal are there once
        if node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    # The weight of a linear layer is transposed and loses its name, unlike the bias that is added to the product.
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if bias.endswith(".bias") and products.get(product) in found:
                    found.setdefault(bias.removesuffix("bias") + "weight", found[products[product]].T)
    prefix = next((name.removesuffix(WORDS) for name in found if name.endswith(WORDS)), None)
    if prefix is None:
        raise ValueError(f"The graph has no weight {WORDS}, as a BERT encoder has.")
    return {name.removeprefix(prefix): array.copy() for name, array in found.items() if name.startswith(prefix)}


@torch.inference_mode()
def largest_difference(onnx_file: Path, model: Any, tokenizer: Any) -> float:
    """Between the hidden states that the graph and the model compute for two sentences."""
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    expected = model(**batch).last_hidden_state
    names = [entry.name for entry in session.get_inputs()]
    outputs = session.run(None, {name: batch[name].numpy() for name in names})
    states = [torch.from_numpy(output) for output in outputs if np.shape(output) == expected.shape]
    if not states:
        raise ValueError(f"{onnx_file} puts out no hidden states, only arrays {[np.shape(each) for each in outputs]}.")
    real = batch["attention_mask"].bool()
    return min(float((each - expected)[real].abs().max()) for each in states)


def encoder_decoder(options: argparse.Namespace) -> tuple[Any, Any]:
    """Join an encoder with a copy of it, whose cross-attention and language model head are new."""
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    return join_encoders(options.encoder, options.encoder, tokenizer), tokenizer


def gpt2(options: argparse.Namespace) -> tuple[Any, Any]:
    """Make a GPT-2 with random weights, and a byte-level tokenizer from the texts."""
    trained = ByteLevelBPETokenizer()
    texts = read_texts(options.text_files)
    trained.train_from_iterator(texts, options.vocabulary, special_tokens=[END], show_progress=False)
    tokenizer = GPT2TokenizerFast(
        tokenizer_object=trained,
        model_max_length=options.positions,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END),
    )
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=options.positions,
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=options.heads,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config), tokenizer


def read_texts(files: Sequence[Path]) -> Iterator[str]:
    """Those of the rows."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] or "" for line in lines)


if __name__ == "__main__":
    main()
