"""What is pushed to the Hub comes back the same, whatever happens on the way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from support.damage import compacted, fingerprint
from support.hub_server import CUT, OWNER, READER, HubServer
from tasks import tiny_tasks
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, merge
from rankdyna_trainer.config_file import CONFIG_NAME

NAME = "alice/small"
IS_PATIENT = int(huggingface_hub.__version__.split(".")[0]) >= 2
patient = pytest.mark.skipif(not IS_PATIENT, reason="huggingface_hub repeats these requests from 2 on")
CONFIG = RankDynaConfig(rank_ratio=0.2)
NEW_PROCESS = """
import sys
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

name, inputs, results = sys.argv[1:]
try:
    AutoModelForSequenceClassification.from_pretrained(name)
except ValueError as error:
    without_the_package = str(error)
import rankdyna_trainer

model = AutoModelForSequenceClassification.from_pretrained(name).eval()
with torch.no_grad():
    logits = model(**torch.load(inputs)).logits
config = AutoConfig.from_pretrained(name).to_dict()
scored = pipeline("text-classification", model=name)("word3 word4")
torch.save([without_the_package, logits, config["rankdyna"], scored], results)
"""


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits


def show(hub: HubServer) -> None:
    """The requests in the order in which they came, those alike in one row."""
    rows: list[list[Any]] = []
    for method, path, status, fault in hub.requests:
        shown = "/".join(part if len(part) < 40 else part[:6] + "…" for part in path.split("/"))
        if rows and rows[-1][:4] == [method, shown, status, fault]:
            rows[-1][4] += 1
        else:
            rows.append([method, shown, status, fault, 1])
    print(f"\n{'method':6} {'path':58} status  fault")
    for method, path, status, fault, count in rows:
        print(f"{method:6} {path:58} {status or '-':>6}  {fault}{f'  ({count} times)' if count > 1 else ''}")


@pytest.mark.slow
def test_round_trip_to_a_new_process(
    hub: HubServer,
    make_trainer: Callable[..., Trainer],
    tiny_bert: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        push_to_hub=True,
        hub_model_id=NAME,
        trainer_arguments={"processing_class": tokenizer},
    )
    trainer.train()
    hub.part_size = 20_000
    if IS_PATIENT:
        hub.fail("POST .*preupload", 503)
        hub.fail("POST .*batch", CUT)
        hub.fail(r"PUT /lfs/\w+/2", 500, CUT)
    trainer.push_to_hub()

    if IS_PATIENT:
        hub.fail("HEAD .*config.json", 503)
        hub.fail("GET /cdn", CUT)
    torch.save(batch, tmp_path / "inputs.pt")
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "new"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    files = [str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt")]
    subprocess.run([sys.executable, "-c", NEW_PROCESS, NAME, *files], env=os.environ | variables, check=True)
    refusal, logits, ranks, scored = torch.load(tmp_path / "results.pt")
    show(hub)
    assert "this model is compressed with rankdyna-trainer. Load it with trust_remote_code=True, or" in refusal
    assert torch.equal(logits, outputs(trainer.model, batch))
    assert ranks == trainer.model.config.rankdyna
    assert scored[0]["label"] in ("LABEL_0", "LABEL_1")
    assert len([request for request in hub.requests if request.fault]) == (6 if IS_PATIENT else 0)
    assert any(request.path.endswith("/complete") and request.status == 200 for request in hub.requests)


FAMILIES = {
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_sharded_half_precision_models(hub: HubServer, kind: str) -> None:
    model = compacted(tiny_tasks.model(kind)).to(torch.bfloat16)
    model.push_to_hub(NAME, max_shard_size="8KB")
    assert "model.safetensors.index.json" in hub.files(NAME) and "model.safetensors" not in hub.files(NAME)
    loaded = FAMILIES[kind].from_pretrained(NAME, dtype="auto")
    inputs = {"input_ids": torch.randint(4, 20, (3, 7))} | (
        {} if kind == "gpt2" else {"decoder_input_ids": torch.ones(3, 2).long()}
    )
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_tags_come_with_the_compacted_form_and_go_with_it(hub: HubServer, small: torch.nn.Module) -> None:
    small.push_to_hub("alice/compacted")
    loaded = AutoModelForSequenceClassification.from_pretrained("alice/compacted")
    loaded.push_to_hub("alice/loaded", tags="film")
    merge(loaded).push_to_hub("alice/merged")
    tags = {name: ModelCard.load(f"alice/{name}").data.tags for name in ("compacted", "loaded", "merged")}
    assert tags == {
        "compacted": ["rankdyna", "low-rank"],
        "loaded": ["rankdyna", "low-rank", "film"],
        "merged": ["film"],
    }


def test_one_file_after_shards(hub: HubServer, small: Any, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    small.push_to_hub(NAME, max_shard_size="20KB")
    with torch.no_grad():
        small.classifier.weight.zero_()
    small.push_to_hub(NAME)
    assert "model.safetensors.index.json" in hub.files(NAME)  # the client deletes nothing
    loaded = AutoModelForSequenceClassification.from_pretrained(NAME)
    assert torch.equal(outputs(loaded, batch), outputs(small, batch))


def test_shards_after_one_file_of_another_model(hub: HubServer, tiny_bert: Any) -> None:
    tiny_bert.push_to_hub(NAME)
    compacted(tiny_bert).push_to_hub(NAME, max_shard_size="20KB")
    with pytest.raises(ValueError, match="and the weights are of different checkpoints"):
        AutoModelForSequenceClassification.from_pretrained(NAME)  # which takes the file that is still there


@patient
def test_upload_in_one_commit_survives(hub: HubServer, small: Any, batch: dict[str, torch.Tensor]) -> None:
    hub.fail("POST .*preupload", CUT, 500)
    hub.fail("POST .*batch", 503)
    hub.fail("PUT /lfs", 500, CUT, 503, CUT)
    hub.fail("POST .*verify", 502, CUT)
    small.push_to_hub(NAME)
    assert sum(bool(request.fault) for request in hub.requests) == 9
    assert torch.equal(outputs(AutoModelForSequenceClassification.from_pretrained(NAME), batch), outputs(small, batch))


@patient
def test_streamed_upload_survives_a_commit_that_fails(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = ()
    hub.fail("POST .*commit", 503, CUT)
    create_repo(NAME)
    upload_folder(repo_id=NAME, folder_path=checkpoint)
    assert hub.files(NAME) == {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_push_that_fails_leaves_the_folder_as_it_was(
    hub: HubServer,
    make_trainer: Callable[..., Trainer],
    tiny_bert: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), max_steps=4, push_to_hub=True, hub_model_id=NAME)
    trainer.train()
    before = fingerprint(tmp_path / "output")
    del before[str(tmp_path / "output" / "README.md")]  # the Trainer writes its card before each push
    failures: list[tuple[str, list[Any], str]] = [
        ("PUT /lfs", [CUT] * 24, OWNER),  # for the weights and the scores
        ("POST .*commit", [500], OWNER),  # without hf_xet the client does not repeat this one
        ("", [], READER),
        ("", [], "hf_unknown"),
    ]
    for place, faults, token in failures:
        hub.fail(place, *faults)
        with pytest.raises((HfHubHTTPError, RuntimeError)):
            trainer.push_to_hub(token=token)
        assert before.items() <= fingerprint(tmp_path / "output").items()
        assert hub.files(NAME) == {}
        hub.faults.clear()
    trainer.push_to_hub()
    loaded = AutoModelForSequenceClassification.from_pretrained(NAME)
    assert torch.equal(outputs(loaded, batch), outputs(trainer.model, batch))


@pytest.mark.parametrize(
    ("token", "message"), [("hf_unknown", "401.*Invalid credentials"), (READER, "403.*write access")]
)
def test_refused_token_stops_before_training(
    hub: HubServer, make_trainer: Callable[..., Trainer], tiny_bert: torch.nn.Module, token: str, message: str
) -> None:
    with pytest.raises(HfHubHTTPError, match=f"(?s){message}") as refusal:
        make_trainer(tiny_bert, RankDynaCallback(CONFIG), push_to_hub=True, hub_model_id=NAME, hub_token=token)
    assert token not in str(refusal.value)


@patient
def test_download_that_is_cut_goes_on_where_it_was(
    hub: HubServer, small: torch.nn.Module, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.push_to_hub(NAME)
    hub.fail("GET /cdn", *[503] * 10)
    with pytest.raises(OSError, match="503 Service Unavailable"):
        AutoModelForSequenceClassification.from_pretrained(NAME)
    hub.faults.clear()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.fail("GET /cdn", CUT, CUT)
    loaded = AutoModelForSequenceClassification.from_pretrained(NAME)
    downloads = [(request.status, request.fault) for request in hub.requests if request.path.startswith("/cdn")]
    assert downloads[-3:] == [(200, CUT), (206, CUT), (206, "")]
    assert torch.equal(outputs(loaded, batch), outputs(small, batch))


def test_configuration(hub: HubServer, tmp_path: Path) -> None:
    config = RankDynaConfig(param_ratio=0.25, target_modules=["query", "value"], importance_beta=0.5)
    config.push_to_hub(NAME, revision="v1", token=OWNER)
    RankDynaConfig(rank_ratio=0.5).push_to_hub(NAME)
    assert hub.files(NAME, "v1").keys() == {CONFIG_NAME, "README.md"}
    assert json.loads(hub.files(NAME, "v1")[CONFIG_NAME]) == config.to_dict()
    if IS_PATIENT:
        hub.fail("HEAD .*rankdyna_config", 503, 500)
    assert RankDynaConfig.from_pretrained(NAME, revision="v1", token=OWNER, cache_dir=tmp_path / "other") == config
    assert RankDynaConfig.from_pretrained(NAME) == RankDynaConfig(rank_ratio=0.5)
    with pytest.raises(ValueError, match=f"(?s){CONFIG_NAME} cannot be read from {NAME}: .*401.*Invalid credentials"):
        RankDynaConfig.from_pretrained(NAME, token="hf_unknown", cache_dir=tmp_path / "third")
