import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.damage import compacted, fingerprint
from support.training_runs import Folders
from tasks import tiny_tasks
from transformers import AutoTokenizer, BertForSequenceClassification, GenerationConfig, GPT2LMHeadModel

from rankdyna_trainer import merge, rank_report
from rankdyna_trainer.report.tables import compression_summary

Document = Callable[..., Any]
Refusal = Callable[..., str]
TOKENS = tiny_tasks.tokenizer()("good film")["input_ids"]
# The classes of transformers alone, in a process that cannot import the package.
STOCK = """
import sys
sys.modules["rankdyna_trainer"] = None
import torch, transformers
model, info = transformers.{kind}.from_pretrained({folder!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
with torch.no_grad():
    print(model.eval()(input_ids=torch.arange(4, 12).unsqueeze(0)).logits.double().sum().item())
"""


@pytest.mark.slow
def test_merge_gives_a_stock_checkpoint(
    document: Document,
    folders: Folders,
    tmp_path: Path,
    logits: Callable[[Any], torch.Tensor],
    run_fresh: Callable[..., CompletedProcess[str]],
) -> None:
    found = document("merge", folders.compacted, "-o", tmp_path / "dense")
    dense = load_file(folders.dense / "model.safetensors")
    merged = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in dense.items()}
    assert found["layers"] == 12
    assert found["parameters"] == sum(tensor.numel() for tensor in dense.values())
    assert found["file_bytes"] == (tmp_path / "dense" / "model.safetensors").stat().st_size
    script = STOCK.format(kind="BertForSequenceClassification", folder=str(tmp_path / "dense"))
    result = run_fresh(script)
    small = BertForSequenceClassification.from_pretrained(folders.compacted)
    assert float(result.stdout) == pytest.approx(logits(merge(small)).double().sum().item(), abs=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("good film")["input_ids"] == TOKENS


def test_merge_of_a_language_model_keeps_its_way_to_generate(rankdyna: Callable[..., str], tmp_path: Path) -> None:
    model: Any = compacted(tiny_tasks.model("gpt2"))
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=3)
    model.save_pretrained(tmp_path / "small")
    rankdyna("merge", tmp_path / "small", "-o", tmp_path / "dense")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    assert merged.generation_config.max_new_tokens == 7
    assert merged.lm_head.weight is merged.transformer.wte.weight
    with torch.no_grad():
        tokens = torch.arange(4, 12).unsqueeze(0)
        torch.testing.assert_close(merged(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=1e-4)


def test_compact_gives_what_the_stopped_run_compacted_to(
    document: Document, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(folders.training)
    found = document("compact", folders.training, "-o", tmp_path / "small")
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "small", folders.run))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    summary = compression_summary(BertForSequenceClassification.from_pretrained(tmp_path / "small"))
    assert found["target_ratio"] == summary.target_ratio
    assert found["all_ratio"] == summary.all_ratio < 1
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("good film")["input_ids"] == TOKENS
    card = ModelCard.load(tmp_path / "small" / "README.md")
    *_, code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)  # with the tokenizer that lies beside the model
    assert {"label", "score"} == names["predict"]("film")[0].keys()
    assert f"**{found['all_ratio']:.1%} of all parameters**" in card.text and (tmp_path / "small/ranks.png").is_file()
    assert fingerprint(folders.training) == before


@pytest.mark.parametrize("command", ["merge", "compact"])
def test_nothing_is_overwritten(command: str, refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    source = folders.compacted if command == "merge" else folders.training
    before = fingerprint(source)
    assert "is not empty, and nothing is overwritten" in refusal(1, command, source, "-o", source)
    assert fingerprint(source) == before
    (tmp_path / "file").touch()
    assert "is a file" in refusal(1, command, source, "-o", tmp_path / "file")


@pytest.mark.parametrize("command", ["merge", "compact"])
def test_an_output_that_cannot_be_written_is_named_before_the_work(
    command: str, refusal: Refusal, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folders.compacted if command == "merge" else folders.training
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "No model can be saved in" in refusal(1, command, source, "-o", tmp_path / "link")
    monkeypatch.setattr("rankdyna_trainer.cli.convert.local_folder", lambda *_: pytest.fail("the work began"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        message = refusal(1, command, source, "-o", tmp_path / "new" / "output")
    assert "Read-only file system" in message and not (tmp_path / "new").exists()


def test_a_card_that_cannot_be_written_is_a_warning(
    rankdyna: Callable[..., str], folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no card")

    monkeypatch.setattr("rankdyna_trainer.cli.convert.ranks_image", fail)
    monkeypatch.setattr("rankdyna_trainer.cli.convert.write_card", fail)
    rankdyna("compact", folders.training, "-o", tmp_path / "small")
    assert caplog.text.count("The model is saved in") == 2 and "no card" in caplog.text
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "small").iterdir()}


def test_other_forms_are_refused(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert "holds no compacted model: `rankdyna compact`" in refusal(1, "merge", folders.training, "-o", output)
    assert "has no singular groups" in refusal(1, "compact", folders.compacted, "-o", output)
    assert "has no singular groups" in refusal(1, "compact", folders.dense, "-o", output)
    damaged = Path(shutil.copytree(folders.compacted, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"\0" * 64)
    assert "model.safetensors" in refusal(1, "merge", damaged, "-o", output)
    assert not output.exists()


def test_half_a_tokenizer_is_an_error(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folders.compacted, tmp_path / "copied"))
    (copied / "tokenizer.json").write_text("{")
    refusal(1, "merge", copied, "-o", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_model_without_a_tokenizer(rankdyna: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folders.compacted, tmp_path / "copied", ignore=shutil.ignore_patterns("tokenizer*")))
    rankdyna("merge", copied, "-o", tmp_path / "dense")
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {"config.json", "model.safetensors"}
    model = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no compressed layers"):
        rank_report(model)
