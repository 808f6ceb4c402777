"""scripts/run_glue.py: what it refuses."""

import datasets
import pytest
import run_glue
from support.reviews import reviews, write

# datasets 4 reads rows by pandas.
NOT_READ = "Unmatched" if datasets.__version__.startswith("4.") else "JSON parse"


class TestRefusals:
    """Each before any training: the message names what was given, and what to do."""

    @pytest.fixture
    def refuse(self, bert, tmp_path, monkeypatch):
        monkeypatch.setattr(run_glue, "Trainer", lambda **_: pytest.fail("the run went on"))
        train = write(tmp_path / "train.jsonl", reviews())

        def refuse(error, match, *options, data=(f"--train_file={train}", "--do_train", "--method=none")):
            with pytest.raises(error, match=match):
                run_glue.main(
                    [f"--model_name_or_path={bert}", f"--output_dir={tmp_path}", "--use_cpu", *data, *options]
                )

        return refuse

    def test_data_that_is_not_there(self, refuse, tmp_path):
        refuse(ValueError, "No data: give --task_name", data=("--do_train", "--method=none"))
        refuse(ValueError, "--validation_file nowhere.jsonl holds no json rows", "--validation_file=nowhere.jsonl")
        refuse(ValueError, "This run needs --validation_file too: it has only .*train.jsonl", "--do_eval")
        refuse(ValueError, "This run needs --test_file too", "--do_predict")
        test = write(tmp_path / "test.jsonl", reviews())
        refuse(
            ValueError, "This run needs --train_file too", data=(f"--test_file={test}", "--do_train", "--method=none")
        )

    def test_files_that_cannot_be_read(self, refuse, tmp_path):
        broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
        broken.write_text('{"sentence": "a film", "label": 1}\n{"sentence": "a fi')
        empty.touch()
        refuse(
            ValueError,
            f"--validation_file .*broken.jsonl holds no json rows: .*{NOT_READ}",
            f"--validation_file={broken}",
        )
        refuse(ValueError, "--validation_file .*empty.jsonl holds no json rows", f"--validation_file={empty}")

    def test_files_of_other_columns(self, refuse, tmp_path):
        other = write(tmp_path / "other.jsonl", [{"text": "a film", "label": 1}])
        unlabelled = write(tmp_path / "unlabelled.jsonl", [{"sentence": "a film", "idx": 1}])
        found = r"other.jsonl has no column sentence: it has \['text', 'label'\]"
        refuse(ValueError, found, "--do_eval", f"--validation_file={other}")
        refuse(ValueError, "no column label: it has", "--do_eval", f"--validation_file={unlabelled}")
        refuse(ValueError, "train.jsonl has no column hypothesis or premise", "--task_name=mnli")
        data = (f"--train_file={unlabelled}", "--do_train", "--method=none")
        refuse(ValueError, "unlabelled.jsonl has no column label", data=data)

    @pytest.mark.parametrize("name", ["max_train_samples", "max_eval_samples", "max_seq_length"])
    def test_numbers_below_one(self, refuse, name):
        refuse(ValueError, f"--{name} must be at least 1: got 0", f"--{name}=0")

    def test_rankdyna_without_a_ratio(self, refuse):
        refuse(ValueError, "exactly one of rank_ratio and param_ratio", "--method=rankdyna")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--task_name=sst3"], "invalid choice: 'sst3' (choose from"),
            (["--method=lora"], "invalid choice: 'lora'"),
            (["--rank_ratio=0.5"], "--method none does not compress: drop --rank_ratio=0.5, or use --method rankdyna"),
            (["--learning_rat=1"], "unrecognized arguments: --learning_rat=1"),
            (["--method=rankdyna", "--rank_ratio=0.5", "--rank_rato=1"], "unrecognized arguments: --rank_rato=1"),
            (["--do_train=false"], "nothing to do: give --do_train"),
            (["--method=rankdyna", "--rank_ratio=0.5", "--do_train=false", "--do_eval"], "or --method none with"),
        ],
    )
    def test_wrong_options(self, refuse, capsys, options, message):
        refuse(SystemExit, "2", *options)
        assert message in capsys.readouterr().err

    def test_help_lists_the_options_of_script_trainer_and_rankdyna(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            run_glue.main(["--help"])
        printed = capsys.readouterr().out
        assert all(option in printed for option in ("--task_name", "--learning_rate", "--rank_ratio"))
