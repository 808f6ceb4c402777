"""scripts/make_models.py: a graph becomes the model that it was, and the other scripts take what it makes."""

import json
from pathlib import Path

import make_models
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tasks.tiny_tasks import NAMES, dialogues, model, save_model, write
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BertModel


class Graph:
    """A graph of the form that torch.onnx exports: linear layers are products with unnamed, transposed weights."""

    def __init__(self, weights: dict[str, torch.Tensor], prefix: str) -> None:
        self.weights, self.prefix = weights, prefix
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, *inputs: str, name: str | None = None, **attributes: object) -> str:
        output = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def array(self, tensor: torch.Tensor, name: str | None = None) -> str:
        name = name or f"onnx::{len(self.stored)}"
        self.stored[name] = numpy_helper.from_array(tensor.contiguous().numpy(), name)
        return name

    def shape(self, *sizes: int) -> str:
        return self.array(torch.tensor(sizes))

    def weight(self, name: str) -> str:
        return self.array(self.weights[name], self.prefix + name)

    def linear(self, x: str, layer: str) -> str:
        product = self.node("MatMul", x, self.array(self.weights[f"{layer}.weight"].T))
        return self.node("Add", self.weight(f"{layer}.bias"), product)

    def norm(self, x: str, layer: str) -> str:
        parts = [self.weight(f"{layer}.{part}") for part in ("weight", "bias")]
        return self.node("LayerNormalization", x, *parts, epsilon=1e-12)

    def embeddings(self) -> str:
        words = self.node("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        types = self.node("Gather", self.weight("embeddings.token_type_embeddings.weight"), self.shape(0))
        length = self.node("Slice", self.node("Shape", "input_ids"), self.shape(1), self.shape(2))
        places = self.node("Slice", self.weight("embeddings.position_embeddings.weight"), self.shape(0), length)
        return self.norm(self.node("Add", self.node("Add", words, types), places), "embeddings.LayerNorm")

    def split(self, x: str, heads: int, order: list[int]) -> str:
        size = len(self.weights["embeddings.LayerNorm.bias"]) // heads
        return self.node("Transpose", self.node("Reshape", x, self.shape(0, 0, heads, size)), perm=order)

    def layer(self, x: str, name: str, heads: int) -> str:
        query, key, value = (self.linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        size = len(self.weights["embeddings.LayerNorm.bias"]) // heads
        scores = self.node("MatMul", self.split(query, heads, [0, 2, 1, 3]), self.split(key, heads, [0, 2, 3, 1]))
        scores = self.node("Add", self.node("Div", scores, self.array(torch.tensor(size**0.5))), "hidden")
        mixed = self.node("MatMul", self.node("Softmax", scores), self.split(value, heads, [0, 2, 1, 3]))
        mixed = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), self.shape(0, 0, heads * size))
        attended = self.node("Add", self.linear(mixed, f"{name}.attention.output.dense"), x)
        attended = self.norm(attended, f"{name}.attention.output.LayerNorm")
        inner = self.node("Gelu", self.linear(attended, f"{name}.intermediate.dense"))
        outer = self.node("Add", self.linear(inner, f"{name}.output.dense"), attended)
        return self.norm(outer, f"{name}.output.LayerNorm")

    def save(self, path: Path, layers: int, heads: int) -> None:
        mask = self.node("Cast", "attention_mask", to=TensorProto.FLOAT)
        mask = self.node("Unsqueeze", self.node("Sub", mask, self.array(torch.tensor(1.0))), self.shape(1, 2))
        self.node("Mul", mask, self.array(torch.tensor(1e9)), name="hidden")
        x = self.embeddings()
        for i in range(layers):
            x = self.layer(x, f"encoder.layer.{i}", heads)
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ]
        output = helper.make_tensor_value_info(x, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "encoder", inputs, [output], list(self.stored.values()))
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[BertModel, Path]:
    """A BERT, and the folder with its graph and tokenizer."""
    folder = tmp_path / "encoder"
    save_model("bert", folder)
    bert = model("bert").eval()
    Graph(bert.state_dict(), "model.0.auto_model.").save(folder / "model.onnx", 2, 2)
    return bert, folder


def test_a_graph_becomes_the_model_that_it_was(encoder, tmp_path, capsys):
    bert, folder = encoder
    output = tmp_path / "models" / "made"
    make_models.main(["from_onnx", str(folder / "model.onnx"), str(output), "--heads=2"])
    assert "Largest difference of a hidden state: " in capsys.readouterr().out
    made = BertModel.from_pretrained(output, add_pooling_layer=False)
    expected = {name: tensor for name, tensor in bert.state_dict().items() if not name.startswith("pooler.")}
    assert made.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.state_dict().items())
    tokens = AutoTokenizer.from_pretrained(output)("alice sees rome", return_tensors="pt")
    assert torch.equal(made(**tokens).last_hidden_state, bert(**tokens).last_hidden_state)
    assert [path.name for path in output.parent.iterdir()] == ["made"]


def test_a_model_that_computes_something_else_is_refused(encoder, tmp_path):
    graph = str(encoder[1] / "model.onnx")
    with pytest.raises(ValueError, match=r"The hidden states differ by .*: has the model 4 --heads\?"):
        make_models.main(["from_onnx", graph, str(tmp_path / "made"), "--heads=4"])
    assert not list(tmp_path.glob("made*"))


def test_refusals(encoder, tmp_path):
    _, folder = encoder
    graph = onnx.load(folder / "model.onnx")
    moved = tmp_path / "moved.onnx"
    onnx.save(graph, moved)
    made = str(tmp_path / "made")
    with pytest.raises(ValueError, match=r"has no tokenizer: give --tokenizer"):
        make_models.main(["from_onnx", str(moved), made, "--heads=2"])
    make_models.main(["from_onnx", str(moved), made, "--heads=2", f"--tokenizer={folder}"])
    with pytest.raises(FileExistsError, match="made is there already"):
        make_models.main(["from_onnx", str(moved), made, "--heads=2", f"--tokenizer={folder}"])
    missing = [tensor for tensor in graph.graph.initializer if "layer.1.output.dense.bias" not in tensor.name]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(missing)
    onnx.save(graph, moved)
    with pytest.raises(ValueError, match=r"it lacks \['encoder\.layer\.1\.output\.dense\.bias'\]"):
        make_models.main(["from_onnx", str(moved), str(tmp_path / "other"), "--heads=2"])
    onnx.save(helper.make_model(helper.make_graph([], "empty", [], [])), moved)
    with pytest.raises(ValueError, match=r"has no weight embeddings\.word_embeddings\.weight"):
        make_models.main(["from_onnx", str(moved), str(tmp_path / "other"), "--heads=2"])


def test_an_equal_weight_is_found_where_it_is_kept():
    weights = model("bert").state_dict()
    graph = Graph(weights, "")
    kept = graph.weight("embeddings.LayerNorm.weight")
    shared = graph.node("Identity", kept, name="encoder.layer.0.output.LayerNorm.weight")
    graph.weight(make_models.WORDS)
    found = make_models.read_weights(helper.make_graph(graph.nodes, "g", [], [], list(graph.stored.values())))
    assert (found[shared] == found[kept]).all() and len(found) == 3


def test_two_encoders_generate(encoder, run_script, tmp_path):
    made = tmp_path / "made"
    make_models.main(["encoder_decoder", str(encoder[1]), str(made), "--seed=1"])
    joined = AutoModelForSeq2SeqLM.from_pretrained(made)
    tokens = AutoTokenizer.from_pretrained(made)("alice sees rome", return_tensors="pt")
    generated = joined.generate(**tokens, max_length=6)
    assert generated[0, 0] == 2 and generated.shape[1] <= 6
    again = tmp_path / "again"
    make_models.main(["encoder_decoder", str(encoder[1]), str(again), "--seed=1"])
    weights = AutoModelForSeq2SeqLM.from_pretrained(again).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in joined.state_dict().items())
    file = write(tmp_path / "rows.jsonl", dialogues(16))
    options = ["--method=none", f"--model_name_or_path={made}", "--do_train", "--do_eval", "--max_target_length=12"]
    options += [f"--train_file={file}", f"--validation_file={file}", "--num_train_epochs=15"]
    assert run_script("run_summarization", tmp_path / "out", *options)["scores"]["final"]["rouge1"] == 1


def test_a_gpt2_learns_the_texts(run_script, tmp_path):
    rows = [{"text": f"{name} sees the new film, été {i}\n"} for i in range(20) for name in NAMES] + [{"text": None}]
    file = write(tmp_path / "rows.jsonl", rows)
    made = tmp_path / "made"
    sizes = ["--vocabulary=300", "--layers=1", "--hidden=32", "--heads=2", "--positions=32"]
    make_models.main(["gpt2", file, f"--output={made}", *sizes])
    tokenizer = AutoTokenizer.from_pretrained(made)
    text = json.dumps(rows[:3], ensure_ascii=False)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer("<|endoftext|>")["input_ids"][0]
    config = AutoModelForCausalLM.from_pretrained(made).config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (1, 32, 2, 32)
    assert config.vocab_size == len(tokenizer) <= 300
    assert config.pad_token_id == config.eos_token_id == config.bos_token_id == tokenizer.eos_token_id
    options = ["--method=none", f"--model_name_or_path={made}", f"--train_file={file}", f"--validation_file={file}"]
    before = run_script("run_clm", tmp_path / "before", *options, "--do_eval")["scores"]["final"]["perplexity"]
    run = run_script("run_clm", tmp_path / "out", *options, "--do_train", "--do_eval", "--num_train_epochs=5")
    assert run["scores"]["final"]["perplexity"] < before / 2
