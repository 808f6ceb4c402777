"""The wheel and the sdist: what they hold, what they say of themselves, and that the wheel works where it is put."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.specifiers import SpecifierSet
from support.without_package import make_environment, run_in

import rankdyna_trainer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "rankdyna_trainer"
VERSION = rankdyna_trainer.__version__

USE = """
import importlib.metadata, json
import torch
import rankdyna_trainer
from rankdyna_trainer import RankDynaConfig, compact, inject_singular_groups, make_self_contained
from transformers import AutoModel, BertConfig, BertModel

config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = compact(inject_singular_groups(BertModel(config).eval(), RankDynaConfig(rank_ratio=0.5)))
make_self_contained(model).save_pretrained("saved")
inputs = torch.arange(2, 22).reshape(2, 10)
with torch.no_grad():
    same = torch.equal(AutoModel.from_pretrained("saved")(inputs)[0], model(inputs)[0])
version = importlib.metadata.version("rankdyna-trainer")
print(json.dumps({"file": rankdyna_trainer.__file__, "version": version, "same": same}))
"""


@pytest.mark.slow
def test_the_wheel_is_complete_and_works_outside_of_the_checkout(tmp_path: Path) -> None:
    built = tmp_path / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)  # the wheel is made from the sdist
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name == f"rankdyna_trainer-{VERSION}-py3-none-any.whl"
    _check_files(wheel, sdist)
    _check_metadata(wheel)

    python = make_environment(tmp_path / "environment")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    result = json.loads(run_in(python, tmp_path, USE).splitlines()[-1])
    assert result["same"] and result["version"] == VERSION
    assert (tmp_path / "environment") in Path(result["file"]).parents


def _check_files(wheel: Path, sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"rankdyna_trainer-{VERSION}.dist-info"
        expected = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        about = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
        found = {name for name in archive.namelist() if name != f"{info}/entry_points.txt"}
        assert found == about | {path.relative_to(PACKAGE.parent).as_posix() for path in expected}
        assert {"rankdyna_trainer/py.typed", "rankdyna_trainer/checkpoint/modeling_rankdyna.py"} <= found
        for path in expected:
            assert archive.read(path.relative_to(PACKAGE.parent).as_posix()) == path.read_bytes()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    with tarfile.open(sdist) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/test_package.py"} <= names
    # What the Makefile and its tools read.
    constraints = {path.name for path in ROOT.glob("constraints*.txt")}
    assert len(constraints) == 3 and constraints | {"Makefile", "mkdocs.yml", "hatch_build.py"} <= names
    for folder in ("docs", "scripts", "tests"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert not [name for name in names if name.startswith((".venv", ".ci", "dist"))]


def _check_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = Metadata.from_email(archive.read(f"rankdyna_trainer-{VERSION}.dist-info/METADATA"), validate=True)
    assert metadata.name == "rankdyna-trainer" and str(metadata.version) == VERSION
    assert metadata.requires_python == SpecifierSet(">=3.11")
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]
    assert metadata.summary and metadata.keywords and metadata.classifiers
    assert metadata.description_content_type == "text/markdown"
    _check_readme(metadata.description or "", (metadata.project_urls or {})["Repository"])
    assert {requirement.name for requirement in metadata.requires_dist or []} >= {"torch", "transformers"}


def _check_readme(text: str, repository: str) -> None:
    """It is the README, of which each link leads into the repository, to something that is there."""
    into = re.compile(re.escape(repository) + "/(?:blob|raw)/main/")
    assert into.sub("", text) == (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for pair in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text) for link in pair if link]
    paths = [into.sub("", link).partition("#")[0] for link in links if into.match(link)]
    assert len(paths) > 10 and all((ROOT / path).is_file() for path in paths)
    assert not [link for link in links if not link.startswith(("https://", "#"))]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("rankdyna-trainer") == VERSION
