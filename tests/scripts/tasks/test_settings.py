"""scripts/tasks/settings.py: options from a file, and the file that a run leaves."""

import json

import pytest
import yaml
from tasks.arguments import TaskArguments, parse_args
from tasks.tiny_tasks import sentences, write

GIVEN = {
    "model_name_or_path": "m",
    "output_dir": "out",
    "do_train": True,
    "dataset_name": "user/set",
    "use_cpu": True,
    "rank_ratio": 0.2,
    "learning_rate": 3e-4,
    "target_modules": ["query", "value"],
    "label_names": None,
    "bf16": False,
    "dense_score": ["accuracy=0.86"],
    "lr_scheduler_kwargs": {"num_cycles": 2},
}


@pytest.fixture
def config(tmp_path):
    def write_file(settings, name="run.yaml"):
        text = json.dumps(settings) if name.endswith("json") else yaml.safe_dump(settings)
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return write_file


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_file_is_a_command_line(config, name):
    choices = parse_args([config(GIVEN, name)], TaskArguments)
    assert (choices.script.model_name_or_path, choices.training.output_dir) == ("m", "out")
    assert choices.training.do_train is True and choices.training.bf16 is False
    assert choices.training.learning_rate == 3e-4 and choices.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (choices.rankdyna.rank_ratio, choices.rankdyna.target_modules) == (0.2, ["query", "value"])
    assert choices.script.dense_scores == {"accuracy": 0.86}


def test_options_win_over_the_file_and_the_file_over_the_preset(config):
    file = config(GIVEN | {"preset": "cola", "num_train_epochs": 2})
    choices = parse_args([file, "--learning-rate", "1e-5", "--param_ratio=0.3"], TaskArguments)
    assert choices.training.learning_rate == 1e-5 and choices.training.num_train_epochs == 2
    assert (choices.rankdyna.rank_ratio, choices.rankdyna.param_ratio) == (None, 0.3)
    assert choices.training.per_device_train_batch_size == 32, "the preset's"


def test_what_is_left_gives_the_same_run_again(config):
    options = [config(GIVEN), "--preset=sst2", "--seed=7", "--hub_token=hf_secret"]
    first = parse_args(options, TaskArguments)
    assert first.settings["seed"] == 7 and first.settings["per_device_train_batch_size"] == 16
    assert "hf_secret" not in str(first.settings) and "weight_decay" not in first.settings
    again = parse_args([config(first.settings, "again.yaml")], TaskArguments)
    assert again.settings == first.settings and again.rankdyna == first.rankdyna
    assert again.script == first.script and again.final_step == first.final_step
    skipped = {"hub_token", "logging_dir"}
    one, other = ({k: v for k, v in c.training.to_dict().items() if k not in skipped} for c in (first, again))
    assert one == other


def test_it_lies_beside_the_model(folder_of, run_script, tmp_path):
    options = [f"--model_name_or_path={folder_of('bert')}", "--do_train", "--max_steps=2", "--rank_ratio=0.5"]
    options += [f"--train_file={write(tmp_path / 'train.jsonl', sentences(8))}", "--rank_warmup_steps=1"]
    run_script("run_glue", tmp_path / "out", *options, "--rank_cooldown_steps=0")
    settings = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert settings["max_steps"] == 2 and settings["rank_ratio"] == 0.5 and settings["rank_warmup_steps"] == 1
    assert not {"self_contained", "average_tokens_across_devices", "seed"} & settings.keys(), "defaults are left out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("- a", "must be a mapping"),
        ("rank_rato: 0.2", "has options that there are not: rank_rato"),
    ],
)
def test_files_that_are_none(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as ending:
        parse_args(["--config", str(tmp_path / "run.yaml")], TaskArguments)
    assert ending.value.code == 2 and message in capsys.readouterr().err


def test_a_dense_score_without_a_number(config):
    with pytest.raises(ValueError, match=r"--dense_score takes a name and a number, such as accuracy=0.86: got 0.86"):
        parse_args([config(GIVEN | {"dense_score": ["0.86"]})], TaskArguments)
