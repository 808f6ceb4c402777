import copy
from pathlib import Path

import pytest
from torch.optim import AdamW
from transformers import BertForSequenceClassification

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.report.printed import print_outline, print_place, print_summary, print_table
from rankdyna_trainer.report.tables import CompressionSummary


def rows_of(shown: str) -> dict[str, list[str]]:
    """What stands behind the words of each line."""
    rows = {}
    for line in shown.splitlines():
        numbers = [word for word in line.split() if word[0].isdigit()]
        rows[line.split("  ")[0].strip()] = numbers
    return rows


def test_a_table_is_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["what", "", "n"], [["a" * 100, None, 1_234_567], ["b", 0.12345, 2]], "title", "notes " * 30)
    shown = capsys.readouterr().out
    assert shown.count("a") == 101 and "1,234,567" in shown and "0.1235" in shown
    assert "notes " * 29 in shown, "a line below the table is broken by the table, not by the terminal"


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(CompressionSummary(250_000, 1_000_000, 1_250_000, 2_000_000, 12, 3, 1), file_bytes=5_000_000)
    shown = capsys.readouterr().out
    rows = rows_of(shown)
    assert rows["parameters of the target layers"] == ["1,000,000", "250,000", "0.25"]
    assert rows["parameters of the whole model"] == ["2,000,000", "1,250,000", "0.625"]
    assert rows["saved weights, MB"] == ["8", "5", "0.625"]
    assert "layers at rank 0: 3 of 12, kept dense: 1 of 12" in shown and "peak memory" not in shown
    print_summary(CompressionSummary(1, 2, 3, 4, 1, 0, 0), 4_000_000, 1_234_567_000)
    assert "peak memory of this process: 1,235 MB" in capsys.readouterr().out


def test_place(tiny_bert: BertForSequenceClassification, capsys: pytest.CaptureFixture[str]) -> None:
    print_place(tiny_bert, Path("out"))
    shown = capsys.readouterr().out
    assert 'transformers.BertForSequenceClassification.from_pretrained("out")' in shown
    assert "rankdyna benchmark out" in shown


@pytest.mark.parametrize("ratio", ["rank_ratio", "param_ratio"])
def test_outline(tiny_bert: BertForSequenceClassification, ratio: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = RankDynaConfig(**{ratio: 0.25}, rank_warmup_steps=10, rank_cooldown_steps=60, group_basis="weights")
    dense = copy.deepcopy(tiny_bert)
    model = inject_singular_groups(tiny_bert, config)
    print_outline(RankDyna(model, config, AdamW(model.parameters()), 100), "a/teacher")
    shown = capsys.readouterr().out
    whole = sum(parameter.numel() for parameter in dense.parameters())
    target = sum(p.numel() for n, p in dense.named_parameters() if "encoder" in n and p.ndim == 2)
    ends = {"rank_ratio": [["96", "0.25"], [], []], "param_ratio": [[], [f"{target // 4:,}", "0.25"], None]}[ratio]
    if ends[2] is None:
        left = whole - target + target // 4
        ends[2] = [f"{left:,}", f"{left / whole:.4g}"]
    rows = rows_of(shown)
    assert rows["singular groups"] == ["384", *ends[0]]
    assert rows["parameters of the target layers"] == [f"{target:,}", *ends[1]]
    assert rows["parameters of the whole model"] == [f"{whole:,}", *ends[2]]
    assert "12 layers" in shown and "from step 10 to step 40 of 100" in shown
    assert "those of the weights" in shown and "Teacher: a/teacher." in shown
