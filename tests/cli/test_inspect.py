import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer
from packaging.version import Version
from support.damage import TRANSFORMERS_4
from support.oldest import WITHOUT_VALUES
from support.training_runs import Folders
from tasks import tiny_tasks
from transformers import AutoConfig, BertForSequenceClassification, LlamaConfig

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import svd
from rankdyna_trainer.layers.targets import find_targets

# Who says that an option is no number: click, and from typer 0.29 on pydantic.
NO_NUMBER = "should be a valid number" if Version(typer.__version__) >= Version("0.29") else "is not a valid float"
# Models whose training is told, the second ones by newer versions of PyTorch.
TOLD, HARDER_TOLD = ["t5", "vit"], ["wav2vec2"]
LONGER_TOLD, LONGER_HARDER_TOLD = ["bert", "encoder-decoder"], ["bart", "marian"]
Document = Callable[..., Any]
Refusal = Callable[..., str]


def configured(model: Any, folder: Path) -> Path:
    """A folder with nothing but the configuration."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "encoder-decoder"])
def test_counts_are_those_of_the_real_model(kind: str, document: Document, tmp_path: Path) -> None:
    model = tiny_tasks.model(kind)
    found = document("inspect", configured(model, tmp_path), "--rank_ratio", 0.25, "--param_ratio", 0.1)
    targets = find_targets(model, RankDynaConfig(rank_ratio=0.25))
    assert [target["layer"] for target in found["targets"]] == list(targets)
    assert found["dense"]["target_parameters"] == sum(layer.weight.numel() for layer in targets.values())
    assert found["dense"]["all_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    initial = sum(min(layer.weight.shape) for layer in targets.values())
    assert found["initial_groups"] == initial == sum(target["full_rank"] for target in found["targets"])
    by_rank, by_parameters = found["sizes"]
    assert by_rank["groups"] == math.ceil(0.25 * initial)
    smaller = svd(tiny_tasks.model(kind), RankDynaConfig(rank_ratio=0.25))
    assert by_rank["local"]["all_parameters"] == sum(parameter.numel() for parameter in smaller.parameters())
    assert by_parameters["groups"] is None
    assert by_parameters["most"]["target_parameters"] == int(0.1 * found["dense"]["target_parameters"])


def test_chooses_layers_and_says_why_not(document: Document, folders: Folders) -> None:
    found = document("inspect", folders.dense, "--target_modules", "query", "--target_modules", "dense")
    assert {target["layer"].rpartition(".")[2] for target in found["targets"]} == {"query", "dense"}
    reasons = {entry["layer"]: entry["reason"] for entry in found["left_alone"]}
    assert reasons["bert.encoder.layer.0.attention.self.key"] == "not in target_modules"
    found = document("inspect", folders.dense, "--exclude_modules", "query")
    reasons = {entry["layer"]: entry["reason"] for entry in found["left_alone"]}
    assert reasons["bert.encoder.layer.1.attention.self.query"] == "in exclude_modules"
    assert reasons["bert.pooler.dense"] == "outside of the repeated blocks"
    assert reasons["classifier"] == "of a head"
    assert len(found["sizes"]) == 8


def test_the_tables(rankdyna: Callable[..., str], folders: Folders) -> None:
    shown = rankdyna("inspect", folders.dense, "--rank_ratio", 0.2, "--param_ratio", 0.2)
    parameters = sum(
        parameter.numel() for parameter in BertForSequenceClassification.from_pretrained(folders.dense).parameters()
    )
    assert f"parameters: {parameters:,}, of which 16,384" in shown
    assert "384 singular groups" in shown
    assert "12 target layers in bert.encoder.layer.*\n" in shown
    assert "\noutput.dense " in shown and "\nattention.output.dense " in shown
    assert "rank_ratio 0.2" in shown
    assert "77" in shown
    assert "param_ratio 0.2" in shown


def test_a_7b_model_needs_no_memory(document: Document, tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, vocab_size=32000, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    found = document("inspect", tmp_path, "--rank_ratio", 0.2)
    assert len(found["targets"]) == 7 * 32
    assert found["dense"]["all_parameters"] == 6_738_415_616
    assert found["dense"]["file_bytes"] == 2 * 6_738_415_616


def test_what_is_compressed_already(refusal: Refusal, folders: Folders) -> None:
    message = refusal(1, "inspect", folders.compacted)
    assert f"is compacted already: `rankdyna report {folders.compacted}` tells of it" in message
    message = refusal(1, "inspect", folders.training)
    assert f"is a checkpoint of a running compression: `rankdyna report {folders.training}`" in message


def edited(folder: Path, **values: Any) -> None:
    config = AutoConfig.for_model("bert").to_dict() | values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized (gptq)"),
        ({"hidden_size": "many"}, "str" if TRANSFORMERS_4 else "hidden_size"),  # where transformers 4 comes to use it
        ({"hidden_size": 30}, "hidden size (30) is not a multiple"),
        ({"architectures": ["NoSuchModel"]}, f"NoSuchModel, which transformers {transformers.__version__} does not"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "custom code"),
    ],
)
def test_configurations_that_cannot_be_used(
    values: dict[str, Any], message: str, refusal: Refusal, tmp_path: Path
) -> None:
    edited(tmp_path, **values)
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    assert message in refusal(1, "inspect", tmp_path)


def test_places_without_a_model(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(1, "inspect", tmp_path / "none") == f"Error: There is no folder {tmp_path / 'none'}."
    assert "has no config.json" in refusal(1, "inspect", tmp_path)
    assert "couldn't find them in the cached files" in refusal(1, "inspect", "nobody/nothing")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(1, "inspect", tmp_path / "file")
    (tmp_path / "config.json").write_text("gibberish {")
    assert "not a valid JSON" in refusal(1, "inspect", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank_ratio", "1.5"], "must be in (0, 1]: got 1.5"),
        (["--param_ratio", "0"], "must be in (0, 1]: got 0.0"),
        (["--rank_ratio", "much"], NO_NUMBER),
        (["--target_modules", "("], "is not a regular expression"),
        (["--no_such_option"], "No such option"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, refusal: Refusal, folders: Folders) -> None:
    assert message in refusal(2, "inspect", folders.dense, *arguments)


def test_no_layer_matches(refusal: Refusal, folders: Folders) -> None:
    assert "No layer to compress matches" in refusal(1, "inspect", folders.dense, "--target_modules", "nothing")


@WITHOUT_VALUES
def test_training_is_told_by_the_configuration_alone(document: Document, tmp_path: Path) -> None:
    folder = configured(tiny_tasks.model("llama"), tmp_path)
    rows = document("inspect", folder, "--param_ratio", 0.5, "--training", "--batch_size", 2, "--length", 16)[
        "training"
    ]
    by_name = {row["recipe"]: row for row in rows}
    dense, groups = by_name["dense"], by_name["all groups"]
    assert groups["weights"] > dense["weights"] >= by_name["start_ratio 1.0"]["weights"]
    assert by_name["start_ratio 0.7"]["peak"] < by_name["start_ratio 1.0"]["peak"] < groups["peak"]
    assert by_name["1.0, 8-bit Adam"]["optimizer"] < 0.3 * by_name["start_ratio 1.0"]["optimizer"]
    assert by_name["and checkpointing"]["step"] < by_name["1.0, 8-bit Adam"]["step"]
    assert by_name["LoRA, param_ratio 0.5"]["gradients"] < 0.5 * dense["gradients"]
    assert all(row["peak"] >= row["weights"] + row["optimizer"] + row["gradients"] for row in rows)


@pytest.mark.parametrize(
    "kind",
    [
        *TOLD,
        *(pytest.param(kind, marks=WITHOUT_VALUES) for kind in HARDER_TOLD),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in LONGER_TOLD),
        *(pytest.param(kind, marks=(WITHOUT_VALUES, pytest.mark.long)) for kind in LONGER_HARDER_TOLD),
    ],
)
def test_training_of_other_models(kind: str, document: Document, tmp_path: Path) -> None:
    folder = configured(tiny_tasks.model(kind), tmp_path)
    length = 400 if kind == "wav2vec2" else 32  # of samples, of tokens
    options = ["--param_ratio", 0.5, "--training", "--batch_size", 4, "--length", length]
    rows = document("inspect", folder, *options)["training"]
    peaks = {row["recipe"]: row["peak"] for row in rows}
    assert peaks["and checkpointing"] < peaks["1.0, 8-bit Adam"] < peaks["all groups"] and peaks["dense"] > 0


@WITHOUT_VALUES
@pytest.mark.parametrize(("option", "ratio"), [("--param_ratio", 0.9), ("--rank_ratio", 0.2)])
def test_training_at_the_size_that_is_asked_for(option: str, ratio: float, document: Document, tmp_path: Path) -> None:
    """Larger than a start that is shown, and by rank: the LoRA is on the model of that size."""
    model = tiny_tasks.model("llama")
    rows = document("inspect", configured(model, tmp_path), option, ratio, "--training", "--length", 16)["training"]
    config = RankDynaConfig(**{option.removeprefix("--"): ratio})
    lora, dense = rows[-1], rows[0]
    assert lora["recipe"] == f"LoRA, {option.removeprefix('--')} {ratio}"
    of_size = svd(model, config)
    smaller = sum(tensor.nbytes for tensor in (*of_size.parameters(), *of_size.buffers()))
    assert lora["weights"] - lora["gradients"] == smaller < dense["weights"]


@WITHOUT_VALUES
def test_training_that_cannot_be_told(refusal: Refusal, tmp_path: Path) -> None:
    folder = configured(tiny_tasks.model("wav2vec2"), tmp_path)
    message = refusal(1, "inspect", folder, "--training", "--length", 32)
    assert "fails without values (Calculated padded input size" in message and "try another --length" in message


@WITHOUT_VALUES
def test_the_table_of_a_large_model_fits_into_80_columns(rankdyna: Callable[..., str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 9, "num_attention_heads": 64}
    LlamaConfig(architectures=["LlamaForCausalLM"], **sizes).save_pretrained(tmp_path)
    shown = rankdyna("inspect", tmp_path, "--param_ratio", 0.5, "--training", "--length", 16)
    lines = shown[shown.index("Memory of training") :].splitlines()
    assert lines[1].split() == ["weights", "gradients", "optimizer", "step", "peak", "/", "dense"]
    assert all(len(line) <= 80 for line in lines[:9])


def test_training_as_a_table(rankdyna: Callable[..., str], tmp_path: Path) -> None:
    shown = rankdyna("inspect", configured(tiny_tasks.model("gpt2"), tmp_path), "--training", "--length", 16)
    assert "Memory of training in float32, 1 x 16, GB" in shown
    assert "\nLoRA, param_ratio 0.5 " in shown and "LoRA: of rank 8 on P and Q" in shown
