import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import compacted
from support.training_runs import stopped_run
from tasks import tiny_tasks
from torch import Tensor
from transformers import BertForSequenceClassification, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, rank_report
from rankdyna_trainer.checkpoint.empty_model import read_config
from rankdyna_trainer.checkpoint.saving import save_compacted
from rankdyna_trainer.checkpoint.training import load_training_checkpoint, outline_training_checkpoint

LAYER = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def bert_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return stopped_run(BertForSequenceClassification(tiny_tasks.model("bert").config), tmp_path_factory.mktemp("bert"))


@pytest.fixture
def copied(bert_run: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_run[0], tmp_path / "copied"))


def assert_same_files(saved: Path, expected: Path) -> None:
    one, other = load_file(saved / "model.safetensors"), load_file(expected / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in one.items()} == {
        name: (t.dtype, t.shape) for name, t in other.items()
    }
    assert all(torch.equal(one[name], other[name]) for name in one)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (saved, expected)]
    assert configs[0]["rankdyna"] == configs[1]["rankdyna"]


BY_RANK = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=1, rank_cooldown_steps=3)
BY_PARAMETERS = RankDynaConfig(param_ratio=0.1, rank_scope="local", rank_warmup_steps=1, rank_cooldown_steps=6)


@pytest.mark.parametrize(
    ("kind", "config"), [("gpt2", BY_RANK), ("llama", BY_PARAMETERS), ("bart", BY_PARAMETERS), ("t5", BY_RANK)]
)
def test_equals_what_the_stopped_run_compacted_to(kind: str, config: RankDynaConfig, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if kind == "llama" else torch.float32
    checkpoint, output = stopped_run(tiny_tasks.model(kind).to(dtype), tmp_path / "run", config)
    model = load_training_checkpoint(checkpoint)
    remaining = {name: m.rank for name, m in model.named_modules() if isinstance(m, SingularGroupLinear)}
    assert min(remaining.values()) < max(remaining.values())
    save_compacted(compact(model), tmp_path / "compacted")
    assert_same_files(tmp_path / "compacted", output)
    buffers = dict(type(model).from_pretrained(output).named_buffers())  # those that are not saved among them
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_computes_what_the_stopped_run_does(bert_run: tuple[Path, Path]) -> None:
    checkpoint, output = bert_run
    stopped = BertForSequenceClassification.from_pretrained(output).eval()
    loaded = compact(load_training_checkpoint(checkpoint))
    assert not loaded.training
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, stopped(input_ids=tokens).logits)


def test_a_run_on_some_layers_of_a_compacted_model(tmp_path: Path) -> None:
    model = compacted(tiny_tasks.model("gpt2"))
    config = RankDynaConfig(rank_ratio=0.01, rank_warmup_steps=1, rank_cooldown_steps=3, target_modules=["c_fc"])
    checkpoint, output = stopped_run(model, tmp_path / "run", config)
    save_compacted(compact(load_training_checkpoint(checkpoint)), tmp_path / "compacted")
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "compacted", output))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    ranks = [rank_report(GPT2LMHeadModel.from_pretrained(folder)) for folder in (tmp_path / "compacted", output)]
    low_rank = [report[report["form"] == "low rank"] for report in ranks]
    assert low_rank[0].equals(low_rank[1]) and len(low_rank[0]) > 2


def test_tied_weights_stay_tied_and_layers_know_their_class(tmp_path: Path) -> None:
    checkpoint, _ = stopped_run(tiny_tasks.model("gpt2"), tmp_path / "run")
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    model = load_training_checkpoint(checkpoint)
    assert isinstance(model, GPT2LMHeadModel)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[0].attn.c_attn.original_class is Conv1D


def test_several_files(bert_run: tuple[Path, Path], copied: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]  # the tensors of one layer are in both
    (copied / "model.safetensors").unlink()
    index = {}
    for number, half in enumerate(halves, start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(half, copied / name)
        index |= dict.fromkeys(half, name)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_compacted(compact(load_training_checkpoint(copied)), tmp_path / "compacted")
    assert_same_files(tmp_path / "compacted", bert_run[1])
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"is incomplete: model-00002-of-00002\.safetensors is missing"):
        load_training_checkpoint(copied)


def test_the_outline_has_the_ranks_but_no_weights(bert_run: tuple[Path, Path]) -> None:
    outline = outline_training_checkpoint(bert_run[0])
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert rank_report(outline).equals(rank_report(load_training_checkpoint(bert_run[0])))


def edited(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def config(**values: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | values))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(lambda t: t.pop(f"{LAYER}.u")), rf"1 missing \({LAYER}.u, "),
        (edited(lambda t: t.pop(f"{LAYER}.bias")), rf"1 missing \({LAYER}.bias, "),
        (edited(lambda t: t.update(more=torch.zeros(1))), r"1 unexpected \(more, "),
        (edited(lambda t: t.update({f"{LAYER}.v": t[f"{LAYER}.v"][1:].clone()})), rf"of another shape \({LAYER}.v"),
        (edited(lambda t: t.update({"a.remaining": torch.ones(1).bool()})), "groups for a, which is no linear layer"),
        (edited(lambda t: t[f"{LAYER}.sigma"].fill_(torch.nan)), f"{LAYER}.sigma has inf or nan"),
        (edited(lambda t: t.clear()), "has no singular groups: it is no checkpoint of a running compression"),
        (config(hidden_size=16), "of another shape"),
        (config(num_hidden_layers=3), "missing"),
        (config(architectures=["NoSuchModel"]), "names the architecture NoSuchModel"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "is damaged"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "index.json is damaged"),
    ],
)
def test_what_does_not_fit_is_refused(copied: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copied)
    with pytest.raises(ValueError, match=message):
        load_training_checkpoint(copied)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load_training_checkpoint(tmp_path)


@pytest.mark.parametrize("has_config", [False, True])
def test_the_folder_of_a_run_names_its_newest_checkpoint(copied: Path, tmp_path: Path, has_config: bool) -> None:
    run = tmp_path / "run"
    for step in (4, 12):
        shutil.copytree(copied, run / f"checkpoint-{step}")
    if has_config:
        shutil.copy(copied / "config.json", run)
    with pytest.raises(FileNotFoundError, match=r"The newest checkpoint of the run is .*checkpoint-12\."):
        (load_training_checkpoint if has_config else read_config)(run)
