import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pack_experiment
import pytest
import torch
from reproduction.scales import SCALES
from safetensors.torch import load_file
from tasks.tiny_tasks import sentences, write
from transformers import AutoModel, AutoTokenizer


@pytest.mark.parametrize(
    ("target", "task", "role", "kind"),
    [
        ("parts", "sst2", "tagger", "bert"),
        ("frontier", "sst2", "tagger", "bert"),
        ("decoder", "wikitext2", "decoder", "gpt2"),
    ],
)
def test_folder_has_the_models_in_half_precision_and_the_rows_that_are_seen(
    folder_of: Callable[[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    task: str,
    role: str,
    kind: str,
) -> None:
    rows = sentences(40)
    (tmp_path / "data" / task).mkdir(parents=True)
    for split in ("train", "validation"):
        write(tmp_path / f"data/{task}/{split}.jsonl", rows)
    given, packed = folder_of(kind), tmp_path / "packed"
    places = ["--scale=tiny", f"--data_dir={tmp_path / 'data'}", "--models", f"{role}={given}", f"--output={packed}"]
    pack_experiment.main([target, *places])

    options = SCALES["tiny"].tasks[task].options
    for split, limit in (("train", "max_train_samples"), ("validation", "max_eval_samples")):
        lines = (packed / f"data/{task}/{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows[: options[limit]]
    halves = load_file(packed / f"models/{role}/model.safetensors")
    assert {values.dtype for values in halves.values()} == {torch.float16}
    whole = AutoModel.from_pretrained(given).state_dict()
    for name, values in AutoModel.from_pretrained(packed / "models" / role, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(values, whole[name], rtol=1e-3, atol=1e-5)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (packed / "models" / role, given)]
    assert tokenizers[0]("a good film") == tokenizers[1]("a good film")
    assert "MiB  in all" in capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"more than --most 1e-06: take fewer tasks"):
        pack_experiment.main([target, *places, "--most=1e-6"])


@pytest.mark.parametrize("target", ["parts", "stations", "frontier", "geometry"])
def test_rows_that_the_runs_of_a_target_see_are_all_there(tmp_path: Path, target: str) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [{"number": number} for number in range(3100)])
    pack_experiment.pack_rows(SCALES["small"], target, "stsb", tmp_path, tmp_path / "packed")
    lines = (tmp_path / "packed/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3100, "its runs have no max_train_samples"


@pytest.mark.parametrize(("tag", "serves"), [("py3-none-any", True), ("cp311-cp311-linux_x86_64", False)])
def test_wheel_is_made_of_a_package_that_has_none_if_it_serves_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str, serves: bool
) -> None:
    def pip(command: list[str], check: bool) -> SimpleNamespace:
        if "wheel" in command:
            (tmp_path / f"pytest-1-{tag}.whl").touch()
        return SimpleNamespace(returncode=int("download" in command))

    monkeypatch.setattr(pack_experiment.subprocess, "run", pip)
    with nullcontext() if serves else pytest.raises(SystemExit, match=r"pytest has no wheel for Python 3\.12"):
        pack_experiment.pack_wheels(["pytest"], "3.12", tmp_path)
    assert (tmp_path / f"pytest-1-{tag}.whl").exists()
