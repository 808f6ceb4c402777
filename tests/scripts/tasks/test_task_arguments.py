"""The options and the data of scripts/tasks: which choice wins, and which choices do not go together."""

import pytest
from datasets import Dataset
from tasks.arguments import TaskArguments, parse_args
from tasks.data import needed_splits
from tasks.presets import PRESETS
from tasks.tiny_tasks import lines, sentences

SCRIPTS = ["run_glue", "run_ner", "run_summarization", "run_clm"]
BASE = ["--model_name_or_path=m", "--output_dir=out", "--do_train", "--dataset_name=user/set", "--use_cpu"]
RANKDYNA = [*BASE, "--rank_ratio=0.2"]


class TestPresets:
    def of_training(self, choices):
        training = choices.training
        return training.per_device_train_batch_size, training.learning_rate, training.num_train_epochs

    def test_they_are_table_5(self):
        table = {name: tuple(preset) for name, preset in PRESETS.items() if preset.final is not None}
        assert table == {
            "conll2003": (16, 500, 2500),
            "cola": (32, 500, 1500),
            "mnli": (32, 5400, 27000),
            "mrpc": (8, 500, 1500),
            "qnli": (32, 2000, 12000),
            "qqp": (32, 5400, 27000),
            "sst2": (16, 500, 1500),
            "stsb": (16, 500, 2500),
        }
        assert PRESETS.keys() - table.keys() == {"samsum", "wikitext2", "ptb"}

    def test_of_rankdyna(self):
        choices = parse_args([*RANKDYNA, "--preset=qnli"], TaskArguments)
        training, rankdyna = choices.training, choices.rankdyna
        assert (training.per_device_train_batch_size, training.learning_rate, training.num_train_epochs) == (
            32,
            1e-4,
            8,
        )
        assert (rankdyna.importance_beta, rankdyna.rank_warmup_steps, choices.final_step) == (0.85, 2000, 12000)

    def test_of_a_task_that_table_5_has_not(self):
        choices = parse_args([*RANKDYNA, "--preset=samsum"], TaskArguments)
        assert self.of_training(choices) == (8, 1e-4, 8)
        assert (choices.rankdyna.rank_warmup_steps, choices.final_step) == (0.05, None)

    @pytest.mark.parametrize("method", ["none", "svd", "fwsvd", "tfwsvd", "whitened"])
    def test_of_the_other_methods(self, method):
        ratio = [] if method == "none" else ["--rank_ratio=0.2"]
        choices = parse_args([*BASE, *ratio, "--preset=mrpc", f"--method={method}"], TaskArguments)
        assert self.of_training(choices) == (8, 1e-4, 8)
        assert choices.final_step is None
        assert (choices.rankdyna is None) == (method == "none")

    def test_options_that_are_given_win(self):
        own = ["--per_device_train_batch_size=4", "--learning_rate=5e-5", "--num_train_epochs=3"]
        own += ["--importance_beta=0.5", "--rank_warmup_steps=7", "--rank_cooldown_steps=0.4"]
        choices = parse_args([*RANKDYNA, "--preset=cola", *own], TaskArguments)
        training, rankdyna = choices.training, choices.rankdyna
        assert (training.per_device_train_batch_size, training.learning_rate, training.num_train_epochs) == (
            4,
            5e-5,
            3,
        )
        assert (rankdyna.importance_beta, rankdyna.rank_warmup_steps, rankdyna.rank_cooldown_steps) == (0.5, 7, 0.4)
        assert choices.final_step is None

    def test_an_option_that_is_given_wins_though_it_is_the_default(self):
        own = ["--num_train_epochs=3.0", "--rank_warmup_steps=0.1", "--rank_cooldown_steps=0.4"]
        choices = parse_args([*RANKDYNA, "--preset=cola", *own], TaskArguments)
        assert (choices.training.num_train_epochs, choices.rankdyna.rank_warmup_steps) == (3, 0.1)
        assert choices.final_step is None


class TestMethods:
    def test_epochs(self):
        def epochs(method, *options):
            ratio = [] if method == "none" else ["--rank_ratio=0.2"]
            script, training, *_ = parse_args([*BASE, *ratio, f"--method={method}", *options], TaskArguments)
            return training.num_train_epochs, script.second_round_epochs

        assert epochs("none")[0] == epochs("rankdyna")[0] == 3
        assert epochs("svd") == epochs("fwsvd") == epochs("tfwsvd") == epochs("whitened") == (8, 3)
        assert epochs("svd", "--num_train_epochs=2", "--second_round_epochs=0.5") == (2, 0.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--method=svd", "--rank_ratio=0.2", "--rank_scope=global"], "svd factors at once: drop --rank_scope"),
            (
                ["--method=tfwsvd", "--rank_ratio=0.2", "--rank_warmup_steps=0.1", "--importance_beta=0.9"],
                "drop --importance_beta, --rank_warmup_steps, or use --method rankdyna",
            ),
            (
                ["--method=fwsvd", "--rank_ratio=0.2", "--resume_from_checkpoint=c"],
                "fwsvd cannot be resumed: fine-tune",
            ),
            (
                ["--method=whitened", "--rank_ratio=0.2", "--group_basis=activations"],
                "whitened factors at once: drop --group_basis",
            ),
            (
                ["--method=whitened", "--rank_ratio=0.2", "--fisher_file=f"],
                "whitened needs no Fisher information: drop --fisher_file",
            ),
            (["--method=none", "--second_round_epochs=3"], "none has one round: drop --second_round_epochs"),
            (["--rank_ratio=0.2", "--second_round_epochs=2"], "rankdyna has one round: drop --second_round_epochs"),
            (["--method=svd", "--rank_ratio=0.2", "--do_train=false", "--do_eval"], "nothing to do: give --do_train"),
            (["--rank_ratio=0.2", "--preset=sst3"], "invalid choice: 'sst3'"),
            (["--method=svd", "--rank_ratio=0.2", "--rank_rato=1"], "unrecognized arguments: --rank_rato=1"),
        ],
    )
    def test_wrong_options(self, options, message, capsys):
        with pytest.raises(SystemExit):
            parse_args([*BASE, *options], TaskArguments)
        assert message in capsys.readouterr().err

    def test_a_baseline_without_a_ratio(self):
        with pytest.raises(ValueError, match="exactly one of rank_ratio and param_ratio"):
            parse_args([*BASE, "--method=svd"], TaskArguments)


class TestData:
    def test_wrong_options(self):
        def refuse(message, **options):
            with pytest.raises(ValueError, match=message):
                TaskArguments(model_name_or_path="m", **options)

        refuse("No data: give --task_name .*--dataset_name .*--train_file")
        refuse(
            r"--dataset_name user/set is on the Hub, and train.csv, test.csv is here: give only one",
            **{"dataset_name": "user/set", "train_file": "train.csv", "test_file": "test.csv"},
        )
        refuse("--dataset_config_name raw needs --dataset_name", train_file="train.csv", dataset_config_name="raw")
        refuse("--max_eval_samples must be at least 1: got -1", train_file="train.csv", max_eval_samples=-1)
        refuse("--second_round_epochs must be at least 0: got -1", train_file="train.csv", second_round_epochs=-1)
        refuse(
            "--second_round_epochs must be at least 0: got nan", train_file="t.csv", second_round_epochs=float("nan")
        )

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_every_script_refuses_hub_and_files_at_once(self, name, refuse):
        options = ["--model_name_or_path=m", "--method=none", "--do_train", "--train_file=train.jsonl"]
        refuse(name, "is on the Hub, and train.jsonl is here", *options, "--dataset_name=user/set")

    @pytest.mark.parametrize("name", ["run_glue", "run_clm"])
    def test_another_set_of_the_hub(self, name, folder_of, run_script, tmp_path, monkeypatch):
        asked = []
        rows = sentences(4) if name == "run_glue" else lines(4)
        splits = {split: Dataset.from_list(rows) for split in ("train", "validation", "extra")}
        for module in ("tasks.data", "run_glue"):
            path = f"{module}.load_dataset"
            monkeypatch.setattr(path, lambda *args, **_: asked.append(args) or splits)
        run = run_script(
            name,
            tmp_path / "out",
            *["--dataset_name=user/set", "--dataset_config_name=raw", "--do_train", "--do_eval", "--method=none"],
            *["--max_steps=1", f"--model_name_or_path={folder_of('bert' if name == 'run_glue' else 'gpt2')}"],
            *(["--block_size=8"] if name == "run_clm" else []),
        )
        assert asked == [("user/set", "raw")]
        assert run["task"] is None and run["arguments"]["script"]["dataset_name"] == "user/set"

    def test_a_split_that_the_hub_has_not(self):
        script = TaskArguments(model_name_or_path="m", task_name="ptb")
        _, training, *_ = parse_args([*BASE, "--method=none", "--do_predict"], TaskArguments)
        with pytest.raises(ValueError, match=r"ptb \(test\) is not there: the set has only train"):
            needed_splits({"train": Dataset.from_list(lines(2))}, script, training)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_all_options_with_their_defaults(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        __import__(name).main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for option in ("--preset", "--second_round_epochs", "--learning_rate", "--rank_ratio"):
        assert option in printed
    assert "by default 8. (default: 3.0)" in printed
