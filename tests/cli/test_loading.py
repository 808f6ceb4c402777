"""Weights of a variant, and models whose code lies beside them, as each command reads them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.training_runs import Folders
from transformers import BertForSequenceClassification

Refusal = Callable[..., str]
OWN_CODE = """
from transformers import BertConfig, BertForSequenceClassification

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def variants(folders: Folders, tmp_path: Path) -> Folders:
    """Of which all but the checkpoint in training are saved as fp16."""
    moved = {}
    for kind in ("dense", "compacted"):
        moved[kind] = Path(shutil.copytree(getattr(folders, kind), tmp_path / kind))
        (moved[kind] / "model.safetensors").rename(moved[kind] / "model.fp16.safetensors")
    return folders._replace(**moved)


def test_a_variant_is_read_and_named_where_it_is_all_there_is(
    variants: Folders, folders: Folders, rankdyna: Callable[..., str], document: Callable[..., Any],
    refusal: Refusal, tmp_path: Path,
) -> None:  # fmt: skip
    small, dense, output = variants.compacted, variants.dense, tmp_path / "output"
    svd = ("--method", "svd", "--rank_ratio", 0.3)
    for command in (("report", small), ("plot", small, "-o", tmp_path / "ranks.png"), ("merge", small, "-o", output)):
        assert "It has the variant fp16: give --variant fp16" in refusal(1, *command)
    rankdyna("plot", small, "-o", tmp_path / "ranks.png", "--variant", "fp16")
    rankdyna("benchmark", small, "--variant", "fp16", "--length", 4, "--repeats", 1)
    assert document("report", small, "--variant", "fp16")["layers"] == document("report", folders.compacted)["layers"]
    rankdyna("merge", small, "-o", output / "of variant", "--variant", "fp16")
    rankdyna("merge", folders.compacted, "-o", output / "of other")
    one, other = (load_file(output / name / "model.safetensors") for name in ("of variant", "of other"))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert "--variant fp16" in refusal(1, "compress", dense, *svd, "-o", tmp_path / "small")
    rankdyna("compress", dense, *svd, "-o", tmp_path / "small", "--variant", "fp16")
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_a_variant_in_several_files_is_named(folders: Folders, refusal: Refusal, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(folders.compacted)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB", variant="bf16")
    message = refusal(1, "report", tmp_path / "shards")
    assert "It has the variant bf16: give --variant bf16" in message


@pytest.fixture
def with_code(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_code.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    import own_code  # type: ignore[import-not-found]

    own_code.OwnConfig.register_for_auto_class()
    own_code.OwnModel.register_for_auto_class("AutoModelForSequenceClassification")
    config = BertForSequenceClassification.from_pretrained(folders.dense).config
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    own_code.OwnModel(own_code.OwnConfig(**settings)).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_code_beside_a_model_is_run_when_the_command_line_says_so(
    with_code: Path, rankdyna: Callable[..., str], refusal: Refusal, tmp_path: Path
) -> None:
    small, dense = tmp_path / "small", tmp_path / "merged"
    commands: dict[str, tuple[Any, ...]] = {
        "inspect": (with_code, "--rank_ratio", 0.2),
        "compress": (with_code, "--method", "svd", "--rank_ratio", 0.3, "-o", small),
        "report": (small,),
        "plot": (small, "-o", tmp_path / "ranks.png"),
        "benchmark": (small, "--length", 4, "--repeats", 1),
        "merge": (small, "-o", dense),
    }
    for command, arguments in commands.items():
        message = refusal(1, command, *arguments)
        assert "needs custom code that lies beside it, which is not run" in message
        assert "give --trust_remote_code on the command line" in message
        rankdyna(command, *arguments, "--trust_remote_code")
    assert (small / "own_code.py").is_file() and (dense / "own_code.py").is_file()
