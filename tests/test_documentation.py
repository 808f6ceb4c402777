"""The code in the README and in the documentation runs as it is written, page by page, on tiny models and tasks."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import SkipTest

import pandas as pd
import pytest
import torch
import transformers.trainer
from support.shell_blocks import evaluate_shell
from support.stand_ins import make_stand_ins
from sybil import Document
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer

import rankdyna_trainer
from rankdyna_trainer import LowRankLinear, RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.report import plots

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "REPRODUCTION.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Their docstrings have blocks of code, which the site shows.
MODULES = [path for path in sorted((ROOT / "src").rglob("*.py")) if "```python" in path.read_text(encoding="utf-8")]
PARSERS = (PythonCodeBlockParser(), CodeBlockParser("bash", evaluate_shell), SkipParser())
# In these languages there is nothing to run.
SHOWN = {"text", "math", "json"}


class LocalHub:
    """Takes a push into a folder, in the place of the Hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"user/{repo_id}")

    def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> None:
        for file in Path(folder_path).iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in ignore_patterns):
                (self.folder / file.name).write_bytes(file.read_bytes())


def run_page(path: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run all blocks of a page in order, in one namespace; the page may leave one out, for a reason that it gives."""
    document = Document.parse(str(path), *PARSERS)
    languages = re.findall(r"^[ ]*```(.*)$", document.text, re.MULTILINE)[::2]
    assert set(languages) <= {"python", "bash"} | SHOWN, "a block of a language that nobody checks"
    document.namespace.update(names)
    examples = list(document.examples())
    assert len(examples) >= len([language for language in languages if language not in SHOWN])
    if examples:
        make_stand_ins(path.name, document.text)
    for example in examples:
        if isinstance(example.region.evaluator, Skipper):
            assert example.parsed[0] == "next" and example.parsed[1], "only one block may be left out, for a reason"
        try:
            example.evaluate()
        except SkipTest:
            continue
    return document.namespace


@pytest.fixture
def names(
    make_trainer: Callable[..., Trainer],
    tiny_bert: BertForSequenceClassification,
    rows: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What a page may take for granted, in an empty folder without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    hub = tmp_path / "user" / "model"
    hub.mkdir(parents=True)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: LocalHub(hub))
    args = make_trainer(tiny_bert).args
    return {"Trainer": Trainer, "model": tiny_bert, "args": args, "train": rows, "validation": rows}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_of_a_page_runs(path: Path, names: dict[str, Any]) -> None:
    trainer = run_page(path, names).get("trainer")
    if trainer is not None:
        assert any(isinstance(module, LowRankLinear) for module in trainer.model.modules())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_of_a_docstring_runs(path: Path, names: dict[str, Any]) -> None:
    config = RankDynaConfig(rank_ratio=0.2)
    batches = list(DataLoader(names["train"], batch_size=8))
    names |= {name: getattr(rankdyna_trainer, name) for name in rankdyna_trainer.__all__} | {
        "torch": torch,
        "config": config,
        "batches": batches,
        "total_steps": len(batches),
    }
    if path.name == "plots.py":  # its figures are of a model that was trained
        trainer = Trainer(
            names["model"], names["args"], train_dataset=names["train"], callbacks=[RankDynaCallback(config)]
        )
        trainer.train()
        names |= vars(plots) | {"trainer": trainer}
    run_page(path, names)


@pytest.mark.usefixtures("names")
def test_the_readme_is_a_complete_program_that_loads_what_it_trained_and_pushed() -> None:
    names = run_page(ROOT / "README.md", {})
    loaded, trained = names["model"], names["trainer"].model
    inputs = names["tokenizer"](["Return the mean.", "A tensor"], padding=True, return_tensors="pt")
    for model in (loaded, AutoModelForSequenceClassification.from_pretrained("user/model")):
        assert model is not trained and any(isinstance(module, LowRankLinear) for module in model.modules())
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, trained.eval()(**inputs).logits)


@pytest.mark.usefixtures("names")
def test_every_cell_of_a_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    make_stand_ins("quickstart.ipynb", "\n".join(sources))
    names: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, "quickstart.ipynb", "exec"), names)
    trained, loaded = names["trainer"].model.eval(), names["model"]
    assert loaded is not trained and rank_report(loaded).equals(names["report"])
    assert 0 < names["report"]["parameters"].sum() <= 0.2 * dense_parameters(names["report"])
    printed = capsys.readouterr().out
    assert all(library in printed for library in ("numpy", "pandas", "torch")) and "accuracy" in printed


def dense_parameters(report: pd.DataFrame) -> int:
    return int((report["in_features"] * report["out_features"]).sum())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python\n1 / 0\n```\n", "division"),
        ("```bash\npython scripts/checks/soak.py --no_such_option 1\n```\n", "2"),
        ("```bash\npython scripts/run_glue.py --no_such_option 1\n```\n", "2"),
        ("```bash\ntorchrun scripts/fsdp_loop.py --rank_ratio much\n```\n", "2"),
        ("```bash\nmake coffee\n```\n", "coffee"),
        ('```bash\npip install ".[coffee]"\n```\n', "coffee"),
        ("```bash\nsudo reboot\n```\n", "does not know how to check"),
        ("<!--- skip: next -->\n```python\n1 / 0\n```\n", "for a reason"),
    ],
)
def test_a_block_that_fails_is_found(
    block: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(block, encoding="utf-8")
    with pytest.raises((Exception, SystemExit), match=message):
        run_page(page, {})
