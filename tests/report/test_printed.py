import copy
import re
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from rankdyna_trainer import RankDyna, RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups
from rankdyna_trainer.report.printed import print_outline, print_place, print_summary, print_table


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


@pytest.mark.parametrize("in_training", [False, True])
def test_summary(
    tiny_bert: BertForSequenceClassification, capsys: pytest.CaptureFixture[str], in_training: bool
) -> None:
    whole = sum(parameter.numel() for parameter in tiny_bert.parameters())
    model = inject_singular_groups(tiny_bert, RankDynaConfig(rank_ratio=0.25))
    groups = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    for layer, rank in zip(groups, [0, 32, *[4] * 10], strict=True):
        layer.set_remaining(torch.arange(layer.width) < rank)
    kept = 32 * 32 + sum(4 * (layer.out_features + layer.in_features) for layer in groups[2:])
    target = sum(layer.out_features * layer.in_features for layer in groups)
    model = model if in_training else compact(model)
    print_summary(model, None if in_training else 5_000_000)
    shown = capsys.readouterr().out
    rows, left = rows_of(shown), whole - target + kept
    assert rows["singular groups"] == ["384", "72", "0.1875"]
    assert rows["parameters of the target layers"] == [f"{target:,}", f"{kept:,}", f"{kept / target:.4g}"]
    assert rows["parameters of the whole model"] == [f"{whole:,}", f"{left:,}", f"{left / whole:.4g}"]
    assert rows["multiply-adds of the target layers, a token"] == rows["parameters of the target layers"]
    # The pooler (32 x 32) and the head (2 x 32) are linear layers too.
    assert rows["multiply-adds of all linear layers, a token"][:2] == [f"{n + 1088:,}" for n in (target, kept)]
    sizes = None if in_training else [f"{5 * whole / left:.4g}", "5", f"{left / whole:.4g}"]
    assert rows.get("saved weights, MB") == sizes
    assert "layers at rank 0: 1 of 12, kept dense: 1 of 12" in shown and "peak memory" not in shown
    print_summary(model, 4_000_000, 1_234_567_000)
    assert "peak memory of this process: 1,235 MB" in capsys.readouterr().out


def test_names_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["layers", "ranks"], [["encoder.layer.*.attention.output.dense", "100 " * 40], ["b", "3"]])
    shown = capsys.readouterr().out
    assert "encoder.layer.*.attention.output.dense" in shown and shown.split().count("100") == 40


def test_place(tiny_bert: BertForSequenceClassification, capsys: pytest.CaptureFixture[str]) -> None:
    print_place(tiny_bert, Path("out"))
    shown = capsys.readouterr().out
    assert "import rankdyna_trainer\nfrom transformers import BertForSequenceClassification\n" in shown
    assert 'model = BertForSequenceClassification.from_pretrained("out")' in shown
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
    layers = "attention.self.query, attention.self.key, attention.self.value, attention.output.dense, "
    assert f"12 layers in bert.encoder.layer: {layers}intermediate.dense, output.dense\n" in shown
    assert "from step 10 to step 40 of 100. All layers share one budget." in shown
    assert "Basis: the weights." in shown and "Teacher: a/teacher." in shown


def test_an_outline_names_each_kind_of_layer_once(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    config = RankDynaConfig(rank_ratio=0.25, group_basis="weights")
    model = inject_singular_groups(T5ForConditionalGeneration(T5Config(**sizes)), config)
    print_outline(RankDyna(model, config, AdamW(model.parameters()), 100), None)
    attention = ", ".join(f"{kind}Attention.{matrix}" for kind in ("Self", "EncDec") for matrix in "qkvo")
    shown = capsys.readouterr().out
    assert "32 layers in encoder.block and decoder.block: SelfAttention.q, SelfAttention.k, " in shown
    line = next(line for line in shown.splitlines() if "32 layers" in line)
    assert sorted(line.partition(": ")[2].split(", ")) == sorted(
        [*attention.split(", "), "DenseReluDense.wi", "DenseReluDense.wo"]
    )


def test_lines_end_between_words_in_a_terminal(
    tiny_bert: BertForSequenceClassification, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RankDynaConfig(rank_ratio=0.25, group_basis="weights")
    rankdyna = RankDyna(inject_singular_groups(tiny_bert, config), config, AdamW(tiny_bert.parameters()), 1000)
    print_outline(rankdyna, "a/teacher")
    words = capsys.readouterr().out.split()
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    print_outline(rankdyna, "a/teacher")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    assert [word for word in shown.split() if word[0] != "─"] == [word for word in words if word[0] != "─"]
