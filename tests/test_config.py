import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.config_file import CONFIG_NAME

NAMES = st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True)
PATTERNS = st.one_of(
    st.none(),
    st.sampled_from(["all-linear", r".*\.(query|value)", "encoder"]),
    st.lists(NAMES, min_size=1, max_size=4),
)
STEPS = st.one_of(st.integers(0, 10**6), st.floats(0, 0.49))


@st.composite
def valid_configs(draw: st.DrawFn) -> RankDynaConfig:
    ratios = sorted(
        draw(st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=4, unique=True)), reverse=True
    )
    ratio = ratios if len(ratios) > 1 else ratios[0]
    chosen = draw(st.sampled_from(["rank_ratio", "param_ratio"]))
    starts = st.floats(ratios[0], 1, exclude_min=chosen == "rank_ratio") if ratios[0] < 1 else st.none()
    return RankDynaConfig(
        **{chosen: ratio},
        start_ratio=draw(st.none() | starts),
        target_modules=draw(PATTERNS),
        exclude_modules=draw(PATTERNS),
        rank_warmup_steps=draw(STEPS),
        rank_cooldown_steps=draw(STEPS),
        importance_beta=draw(st.floats(0, 1, exclude_max=True)),
        importance_score=draw(st.sampled_from(["first_order", "second_order", "fisher"])),
        rank_scope=draw(st.sampled_from(["global", "local"])),
        rank_update_interval=draw(st.none() | st.integers(1, 10**6)),
        rank_multiple_of=draw(st.integers(1, 64)),
        keep_score=draw(st.none() | st.floats(0, 1, exclude_min=True)) if len(ratios) > 1 else None,
        factorization_cache=draw(st.one_of(st.none(), st.text(st.characters(codec="utf-8")))),
        group_basis=draw(st.sampled_from(["weights", "activations", None])),
        teacher=draw(st.one_of(st.none(), st.text(st.characters(codec="utf-8"), min_size=1))),
        teacher_weight=draw(st.floats(0, 1)),
        teacher_temperature=draw(st.floats(0, 100, exclude_min=True)),
        hidden_weight=draw(st.floats(0, 100)),
        fixed_shapes=draw(st.booleans()),
        self_contained=draw(st.booleans()),
    )


def parse(*arguments: str) -> RankDynaConfig:
    parser = HfArgumentParser((TrainingArguments, RankDynaConfig))
    _, config = parser.parse_args_into_dataclasses(["--output_dir", "unused", *arguments])
    return config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of rank_ratio and param_ratio: got rank_ratio=None and param_ratio=None"),
        ({"rank_ratio": 0.2, "param_ratio": 0.3}, "exactly one .* got rank_ratio=0.2 and param_ratio=0.3"),
        ({"rank_ratio": 0}, r"rank_ratio is the part to keep and must be in \(0, 1\]: got 0"),
        ({"rank_ratio": -0.1}, r"rank_ratio .* got -0.1"),
        ({"rank_ratio": 1.001}, r"rank_ratio .* got 1.001"),
        ({"param_ratio": 0.0}, r"param_ratio is the part to keep and must be in \(0, 1\]: got 0.0"),
        ({"param_ratio": 20}, r"param_ratio .* got 20"),
        ({"rank_ratio": float("nan")}, "rank_ratio must be finite: got nan"),
        ({"param_ratio": [0.3, 0.5]}, r"param_ratio must fall from each part to the next: got \[0.3, 0.5\]"),
        ({"param_ratio": [0.5, 0.5]}, r"param_ratio must fall from each part to the next"),
        ({"param_ratio": [0.5, 0.0]}, r"param_ratio .* must be in \(0, 1\]: got 0.0"),
        ({"rank_ratio": []}, r"rank_ratio is the part to keep, or several in a list: got \[\]"),
        ({"rank_ratio": [0.5, 0.2], "keep_score": 1.1}, r"keep_score .* must be in \(0, 1\]: got 1.1"),
        ({"rank_ratio": 0.2, "keep_score": 0.9}, r"keep_score=0.9 chooses among several sizes: .* \(got 0.2\)"),
        ({"start_ratio": 0}, r"start_ratio is the part .* must be in \(0, 1\]: got 0.0"),
        ({"start_ratio": 1.1}, r"start_ratio is the part .* must be in \(0, 1\]: got 1.1"),
        ({"start_ratio": float("nan")}, "start_ratio must be finite: got nan"),
        (
            {"start_ratio": 0.4, "param_ratio": [0.5, 0.2]},
            "start_ratio=0.4 would begin with less than param_ratio=0.5 asks for: give a larger start_ratio",
        ),
        ({"start_ratio": 0.2, "rank_ratio": 0.2}, "start_ratio=0.2 would begin with less than rank_ratio=0.2 asks"),
        ({"rank_warmup_steps": float("inf")}, "rank_warmup_steps must be finite: got inf"),
        ({"importance_beta": float("nan")}, "importance_beta must be finite: got nan"),
        ({"rank_warmup_steps": -1}, "rank_warmup_steps must be a whole number of steps, or a part .* got -1"),
        ({"rank_warmup_steps": 1.5}, "rank_warmup_steps must be a whole number .* got 1.5"),
        ({"rank_cooldown_steps": -0.1}, "rank_cooldown_steps must be a whole number .* got -0.1"),
        ({"rank_cooldown_steps": 1000.5}, "rank_cooldown_steps must be a whole number .* got 1000.5"),
        ({"rank_warmup_steps": 0.6, "rank_cooldown_steps": 0.4}, "leave no step to remove groups in.* Decrease"),
        ({"rank_warmup_steps": 0.7, "rank_cooldown_steps": 0.7}, "leave no step to remove groups in"),
        ({"importance_beta": 1}, r"importance_beta must be in \[0, 1\): got 1"),
        ({"importance_beta": -0.1}, r"importance_beta must be in \[0, 1\): got -0.1"),
        ({"importance_score": "magnitude"}, "one of first_order, second_order, fisher: got 'magnitude'"),
        ({"group_basis": "data"}, "group_basis must be one of weights, activations, None: got 'data'"),
        ({"teacher_weight": 1.1}, r"teacher_weight is a part of the loss and must be in \[0, 1\]: got 1.1"),
        ({"teacher_weight": -0.1}, r"teacher_weight .* got -0.1"),
        ({"teacher_temperature": 0}, "teacher_temperature must be above 0: got 0"),
        ({"hidden_weight": -1}, "hidden_weight must be at least 0: got -1"),
        ({"hidden_weight": float("inf")}, "hidden_weight must be finite: got inf"),
        ({"rank_scope": "block"}, "rank_scope must be one of global, local: got 'block'"),
        ({"rank_update_interval": 0}, "rank_update_interval must be at least 1: got 0"),
        ({"rank_multiple_of": 0}, "rank_multiple_of must be at least 1: got 0"),
        ({"target_modules": []}, r"target_modules must be a regular expression or a list of name endings: got \[\]"),
        ({"target_modules": [""]}, "target_modules must be .* a list of name endings"),
        ({"target_modules": ["query", 3]}, "target_modules must be .* a list of name endings"),
        ({"target_modules": "("}, r"target_modules='\(' is not a regular expression: .*position 0"),
        ({"target_modules": ["*query"]}, r"target_modules='\*query' is not a regular expression"),
        ({"exclude_modules": "[a-"}, r"exclude_modules='\[a-' is not a regular expression"),
        ({"exclude_modules": []}, "exclude_modules must be a regular expression or a list of name endings"),
    ],
)
def test_value_out_of_range(values: dict[str, Any], message: str) -> None:
    ratio = {} if not values or values.keys() & {"rank_ratio", "param_ratio"} else {"rank_ratio": 0.2}
    with pytest.raises(ValueError, match=message):
        RankDynaConfig(**ratio, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_ratio": "0.2"}, "rank_ratio must be a number: got '0.2'"),
        ({"rank_ratio": True}, "rank_ratio must be a number: got True"),
        ({"param_ratio": ["0.2"]}, "param_ratio must be a number: got '0.2'"),
        ({"rank_ratio": [0.5, 0.2], "keep_score": "all"}, "keep_score must be a number: got 'all'"),
        ({"start_ratio": "1.0"}, "start_ratio must be a number: got '1.0'"),
        ({"rank_warmup_steps": None}, "rank_warmup_steps must be a number: got None"),
        ({"rank_cooldown_steps": "0.4"}, "rank_cooldown_steps must be a number: got '0.4'"),
        ({"importance_beta": None}, "importance_beta must be a number: got None"),
        ({"rank_update_interval": 2.0}, "rank_update_interval must be an int: got 2.0"),
        ({"rank_multiple_of": 8.0}, "rank_multiple_of must be an int: got 8.0"),
        ({"rank_update_interval": True}, "rank_update_interval must be an int: got True"),
        ({"factorization_cache": Path("cache")}, "factorization_cache must be a folder's path as str"),
        ({"teacher": 3}, "teacher must be a folder or the name of a Hub repository as str: got 3. Give a model"),
        ({"teacher": ""}, "teacher must be a folder or the name of a Hub repository as str: got ''"),
        ({"teacher_weight": None}, "teacher_weight must be a number: got None"),
        ({"fixed_shapes": 1}, "fixed_shapes must be True or False: got 1"),
        ({"self_contained": "no"}, "self_contained must be True or False: got 'no'"),
        ({"target_modules": 3}, "target_modules must be a regular expression or a list of name endings: got 3"),
        ({"exclude_modules": ""}, "exclude_modules must be a regular expression or a list of name endings: got ''"),
    ],
)
def test_value_of_the_wrong_type(values: dict[str, Any], message: str) -> None:
    ratio = {} if values.keys() & {"rank_ratio", "param_ratio"} else {"rank_ratio": 0.2}
    with pytest.raises(TypeError, match=message):
        RankDynaConfig(**ratio, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"rank_ratio": 1},
        {"param_ratio": 1.0},
        {"rank_ratio": 1e-9},
        {"param_ratio": 0.5, "start_ratio": 0.5},
        {"rank_ratio": 0.5, "start_ratio": 1},
        {"rank_ratio": 0.2, "rank_warmup_steps": 0, "rank_cooldown_steps": 0},
        {"rank_ratio": 0.2, "rank_warmup_steps": 500.0, "rank_cooldown_steps": 0.9},
        {"rank_ratio": 0.2, "rank_warmup_steps": 0.59, "rank_cooldown_steps": 0.4},
        {"rank_ratio": 0.2, "importance_beta": 0},
    ],
)
def test_values_at_the_limits(values: dict[str, Any]) -> None:
    config = RankDynaConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ("all-linear", "all-linear"),
        (["all-linear"], "all-linear"),
        (".*query", ".*query"),
        ([".*query"], ".*query"),
        ("query", "query"),
        (["query"], ["query"]),
        (["0.query", "value"], ["0.query", "value"]),
        (("query", "value"), ["query", "value"]),
        ({"value", "query"}, ["query", "value"]),
    ],
)
def test_module_patterns(given: Any, meant: Any) -> None:
    config = RankDynaConfig(rank_ratio=0.2, target_modules=given, exclude_modules=given)
    assert config.target_modules == config.exclude_modules == meant


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["query", "value"], ["query", "value"]),
        (["query"], ["query"]),
        (["layer.0.output.dense"], ["layer.0.output.dense"]),
        ([r".*\.(query|value)"], r".*\.(query|value)"),
        (["all-linear"], "all-linear"),
    ],
)
def test_module_patterns_on_a_command_line(arguments: list[str], meant: Any) -> None:
    assert parse("--rank_ratio", "0.2", "--target_modules", *arguments).target_modules == meant
    assert parse("--rank_ratio", "0.2", "--exclude_modules", *arguments).exclude_modules == meant


def test_every_field_is_an_option_of_a_command_line() -> None:
    values = {
        "param_ratio": [0.5, 0.3],
        "keep_score": 0.98,
        "start_ratio": 0.75,
        "target_modules": ["query"],
        "exclude_modules": ["value"],
        "rank_warmup_steps": 20.0,
        "rank_cooldown_steps": 0.25,
        "importance_beta": 0.5,
        "importance_score": "fisher",
        "rank_scope": "local",
        "block_floor": 0.5,
        "rank_update_interval": 4,
        "rank_multiple_of": 8,
        "factorization_cache": "cache",
        "group_basis": "activations",
        "teacher": "fine-tuned",
        "teacher_weight": 0.25,
        "teacher_temperature": 4.0,
        "hidden_weight": 0.0,
        "fixed_shapes": True,
        "self_contained": False,
    }
    options = [
        (f"--{name}", *map(str, value if isinstance(value, list) else [value])) for name, value in values.items()
    ]
    assert parse(*(word for option in options for word in option)) == RankDynaConfig(**values)
    assert values.keys() | {"rank_ratio"} == {field.name for field in dataclasses.fields(RankDynaConfig)}


def test_a_warmup_is_a_number_or_a_word_on_a_command_line() -> None:
    for word, value in (("auto", "auto"), ("20", 20.0), ("0.2", 0.2), ("1e2", 100.0)):
        assert parse("--rank_ratio", "0.2", "--rank_warmup_steps", word).rank_warmup_steps == value
    with pytest.raises(ValueError, match=r"a part of all steps in \(0, 1\), or \"auto\": got 'often'"):
        parse("--rank_ratio", "0.2", "--rank_warmup_steps", "often")


def test_command_line_defaults_are_those_of_the_class() -> None:
    assert parse("--rank_ratio", "0.2") == RankDynaConfig(rank_ratio=0.2)


def test_command_line_refuses_an_unknown_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--rank_ratio", "0.2", "--rank_scope", "block")
    assert "invalid choice: 'block' (choose from 'global', 'local')" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [TrainingArguments, Seq2SeqTrainingArguments])
def test_no_field_clashes_with_training_arguments(arguments: type) -> None:
    ours, theirs = ({field.name for field in dataclasses.fields(c)} for c in (RankDynaConfig, arguments))
    assert not ours & theirs


@settings(max_examples=50, deadline=None)
@given(config=valid_configs())
def test_saved_config_is_loaded_as_it_was(tmp_path_factory: pytest.TempPathFactory, config: RankDynaConfig) -> None:
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    assert RankDynaConfig.from_pretrained(folder) == config


def test_save_makes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    RankDynaConfig(rank_ratio=0.2).save_pretrained(str(folder))
    assert [path.name for path in folder.iterdir()] == ["rankdyna_config.json"]
    assert json.loads((folder / CONFIG_NAME).read_text())["rank_ratio"] == 0.2


def test_save_into_a_file(tmp_path: Path) -> None:
    (file := tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken is a file: give the folder"):
        RankDynaConfig(rank_ratio=0.2).save_pretrained(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"rank_ratio": 0.2', f"{CONFIG_NAME} is not valid JSON"),
        (b"", f"{CONFIG_NAME} is not valid JSON"),
        (b"\xff\xfe\x00", f"{CONFIG_NAME} is not valid JSON"),
        (b"[0.2]", f"{CONFIG_NAME} is no RankDynaConfig: it has list, known are .*'rank_ratio'"),
        (b'{"rank_ratio": 0.2, "rank_dropout": 1}', r"is no RankDynaConfig: it has \['rank_dropout'\]"),
        (b'{"rank_ratio": 2}', r"rank_ratio is the part to keep and must be in \(0, 1\]: got 2"),
        (b'{"rank_ratio": NaN}', "rank_ratio must be finite"),
        (b"{}", "exactly one of rank_ratio and param_ratio"),
    ],
)
def test_damaged_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        RankDynaConfig.from_pretrained(tmp_path)


def test_file_of_an_earlier_version_gets_the_defaults(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text('{"param_ratio": 0.3}')
    assert RankDynaConfig.from_pretrained(tmp_path) == RankDynaConfig(param_ratio=0.3)


def test_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{CONFIG_NAME} cannot be read from {tmp_path}"):
        RankDynaConfig.from_pretrained(tmp_path)


def test_read_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RankDynaConfig(rank_ratio=0.3).save_pretrained(tmp_path)
    asked: dict[str, Any] = {}

    def download(repository: str, file: str, **options: Any) -> str:
        asked.update(options, repository=repository, file=file)
        return str(tmp_path / file)

    monkeypatch.setattr("rankdyna_trainer.config_file.hf_hub_download", download)
    assert RankDynaConfig.from_pretrained("user/model", revision="v1", token="secret") == RankDynaConfig(
        rank_ratio=0.3
    )
    assert asked == {"repository": "user/model", "file": CONFIG_NAME, "revision": "v1", "token": "secret"}


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    config = RankDynaConfig(rank_ratio=np.float32(0.5), importance_beta=np.float32(0.5))
    config.save_pretrained(tmp_path)
    assert RankDynaConfig.from_pretrained(tmp_path) == config
