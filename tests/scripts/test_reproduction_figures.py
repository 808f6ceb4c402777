"""The figures of `reproduce.py`: what their studies find, what is drawn, and that nothing is run twice."""

import copy
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from reproduction import figure_data
from reproduction.cells import DENSE, GLOBAL, LOCAL, Grid, write
from reproduction.figure_data import FIGURES, make_figure
from reproduction.figures import bins_of, figure1, figure2_loss, figure2_scores, figure3, figure4, portions
from reproduction.matrices import matrices_of
from reproduction.scales import Scale, Task
from reproduction.studies import importance_positions, kept_groups
from reproduction.study_data import kept, request_of_cell, run_of_request, training_batches
from tiny_tasks import WORDS, sentences
from tiny_tasks import write as write_rows
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.method import algorithm

STEPS, REMOVAL, RATE = 12, 6, 1e-3
REMOVED_FROM = ("query", "key", "value", "intermediate.dense")
SCALE = Scale(
    models={"encoder": "unused"},
    tasks={"sst2": Task("run_glue", "encoder", ("accuracy",), {"task_name": "sst2"}, {"num_train_epochs": 6}, 1.0)},
    common={
        **{"save_strategy": "no", "use_cpu": True, "learning_rate": 2e-3, "logging_steps": 1},
        **{"per_device_train_batch_size": 8, "lr_scheduler_type": "linear"},
    },
    ratios=(0.5, 0.2),
    seeds=(0, 1),
    **{f"table{i}": () for i in range(1, 5)},
    heatmaps=dict.fromkeys(("figure3", "figure6", "figure7", "figure8"), "sst2"),
    heatmap_ratios=(0.5, 0.2),
    ablation="sst2",
    selection="sst2",
    study_steps=STEPS,
    removal_step=REMOVAL,
)


@pytest.fixture
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **still)
    )


@pytest.fixture
def batches():
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, len(WORDS), (8, 6), generator=random) for _ in range(STEPS)]
    return [{"input_ids": part, "labels": part[:, 0] % 2} for part in ids]


class Layer(nn.Module):
    """Singular groups once more, which are never cut: a mask of those that count."""

    def __init__(self, linear):
        super().__init__()
        u, sigma, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.u, self.sigma, self.v, self.bias = *map(nn.Parameter, (u.T.contiguous(), sigma, v)), linear.bias
        self.mask, self.scores = torch.ones(len(sigma)), torch.zeros(len(sigma))

    def forward(self, x):
        return (x @ self.v.T * (self.sigma * self.mask)) @ self.u + self.bias

    def places(self):
        """Of each group, beginning with 1: how many are more important, and itself."""
        return (self.scores.unsqueeze(0) >= self.scores.unsqueeze(1)).sum(dim=1)


def reference_places(model, batches, removal_step):
    """`{layer: places at each step}`, and the layers, from a training loop of its own."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in name]
    layers = {name: Layer(model.get_submodule(name)) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    found = {name: [] for name in layers}
    for step, batch in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / len(batches))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, layer in layers.items():
            by_group = ((p * p.grad).abs().reshape(len(p), -1).sum(1) for p in (layer.u, layer.sigma, layer.v))
            layer.scores = 0.85 * layer.scores + 0.15 * sum(by_group)
            found[name].append(layer.places())
        optimizer.step()
        if step == removal_step:
            for name, layer in layers.items():
                if name.endswith(REMOVED_FROM) and not name.endswith("output.dense"):
                    layer.mask = (layer.places() <= 6).float()  # a fifth of 32 is 6.4
    return found, layers


@pytest.mark.parametrize("removal_step", [None, REMOVAL])
def test_positions_are_the_places_by_importance(removal_step, model, batches):
    places, layers = reference_places(copy.deepcopy(model), batches, removal_step)
    found = importance_positions(model, batches, STEPS, removal_step, learning_rate=RATE)
    assert found["block"] == "bert.encoder.layer.1"
    names = {kind: matrix["layer"] for kind, matrix in found["matrices"].items()}
    block = "bert.encoder.layer.1"
    assert names == {"W_o": f"{block}.attention.output.dense", "W_f2": f"{block}.output.dense"}
    for matrix in found["matrices"].values():
        expected = torch.stack(places[matrix["layer"]])
        assert matrix["groups"] == 32 and list(matrix["positions"]) == ["1", "10"]  # there is no 40th of 32 groups
        for number, positions in matrix["positions"].items():
            chosen = expected[0].tolist().index(int(number))
            assert positions == pytest.approx((expected[:, chosen] / 32).tolist())
        moves = (expected[1:] - expected[:-1]).abs().float().mean(dim=1) / 32
        assert matrix["movement"] == pytest.approx(moves.tolist())

    for name, layer in layers.items():
        own = model.get_submodule(name)
        assert torch.equal(own.remaining, layer.mask.bool())
        assert found["removed"].get(name, 0) == 32 - own.rank
    assert len(found["removed"]) == (0 if removal_step is None else 8)
    assert set(found["removed"].values()) <= {26}


def test_the_runs_are_the_same_up_to_the_removal(model, batches):
    runs = [
        importance_positions(copy.deepcopy(model), batches, STEPS, step, learning_rate=RATE)
        for step in (REMOVAL, None)
    ]
    removed, untouched = (torch.tensor(run["matrices"]["W_f2"]["movement"]) for run in runs)
    assert torch.equal(removed[: REMOVAL - 1], untouched[: REMOVAL - 1])
    assert not torch.equal(removed, untouched)


def test_matrices_are_found_by_their_names(model):
    config = RankDynaConfig(rank_ratio=0.5)
    found = matrices_of(model, config)
    assert [matrix.type for matrix in found] == ["W_q", "W_k", "W_v", "W_o", "W_f1", "W_f2"] * 2
    assert [matrix.block for matrix in found] == ["bert.encoder.layer.0"] * 6 + ["bert.encoder.layer.1"] * 6
    assert len(matrices_of(model, config, {"any": ("output.dense",)})) == 4
    with pytest.raises(ValueError, match=r"No layer is of type W_v: .*attention\.self\.query"):
        matrices_of(model, config, {"W_v": ("v_proj",)})


def test_too_few_batches(model, batches):
    with pytest.raises(ValueError, match="13 steps need as many batches: there are only 12"):
        importance_positions(model, batches, STEPS + 1, None)


@pytest.mark.parametrize("choice", [{"rank_ratio": 0.3}, {"param_ratio": 0.2, "rank_scope": "local"}])
def test_kept_groups_are_those_of_a_run_that_cuts_nothing(choice, model, batches, monkeypatch):
    config = RankDynaConfig(**choice)
    uncut, cut = copy.deepcopy(model), model
    weights = {name: module.weight.detach().clone() for name, module in model.named_modules() if "value" in name}
    found = kept_groups(cut, batches, config, STEPS, learning_rate=RATE)
    monkeypatch.setattr(algorithm, "cut_groups", lambda *_: None)
    kept_groups(uncut, batches, config, STEPS, learning_rate=RATE)
    assert list(found["layers"]) == list(weights) and len(weights) == 2
    for name, layer in found["layers"].items():
        values = torch.linalg.svdvals(weights[name])
        assert layer["singular_values"] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)
        remaining = uncut.get_submodule(name).remaining
        assert len(remaining) == 32 and layer["kept"] == remaining.nonzero().squeeze(1).tolist()
        assert cut.get_submodule(name).width == len(layer["kept"]) == found["ranks"][name] > 0
    assert len(found["ranks"]) == 12


def test_kept_groups_of_a_chosen_layer(model, batches):
    name = "bert.encoder.layer.0.output.dense"
    found = kept_groups(model, batches, RankDynaConfig(rank_ratio=0.3), STEPS, [name])
    assert list(found["layers"]) == [name]
    with pytest.raises(ValueError, match="classifier is not among the layers"):
        kept_groups(
            BertForSequenceClassification(model.config), batches, RankDynaConfig(rank_ratio=0.3), 3, ["classifier"]
        )


def test_bins():
    assert [len(part) for part in bins_of(768, 14)] == [55] * 13 + [53]
    assert [number for part in bins_of(32, 14) for number in part] == list(range(32))
    assert portions([0, 1, 5], bins_of(6, 2)) == pytest.approx([2 / 3, 1 / 3])
    assert portions([], bins_of(6, 2)) == [0, 0]


def positions_of(steps, removal_step):
    matrix = {"groups": 50, "positions": {"1": [0.02] * steps, "40": [0.8] * steps}, "movement": [0.0] * (steps - 1)}
    return {
        **{"steps": steps, "removal_step": removal_step, "removed_part": 0.8, "block": "layer.1", "removed": {}},
        "matrices": {"W_o": {"layer": "o"} | matrix, "W_f2": {"layer": "f"} | matrix},
    }


def labelled(axes):
    return bool(axes.get_xlabel() and axes.get_ylabel())


def test_figure1_draws_the_positions():
    figure = figure1(positions_of(5, 3), positions_of(5, None), "a title")
    assert len(figure.axes) == 4 and labelled(figure.axes[2])
    for axes in figure.axes:
        first, second = axes.lines[:2]
        assert list(first.get_xdata()) == [1, 2, 3, 4, 5]
        assert list(first.get_ydata()) == [0.02] * 5 and list(second.get_ydata()) == [0.8] * 5
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 2, 2]
    assert list(figure.axes[0].lines[2].get_xdata()) == [3, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["group 1", "group 40"]


def test_figure2_draws_means_and_spreads():
    rows = [["global", 0.5, 0, 0.6, 80.0], ["global", 0.5, 1, 0.4, 90.0], ["local", 0.5, 0, 0.4, 70.0]]
    runs = pd.DataFrame(rows, columns=["scope", "ratio", "seed", "parameters", "score"])
    figure = figure2_scores(runs, "a title", "accuracy, %")
    left, right = figure.axes
    assert left.get_xlabel() and right.get_xlabel() and left.get_ylabel() == "accuracy, %"
    means = [[list(bars.lines[0].get_xydata()[0]) for bars in axes.containers] for axes in (left, right)]
    assert means == [[[0.5, 85], [0.5, 70]], [[0.5, 85], [0.4, 70]]]
    spread = left.containers[0].lines[2][0].get_segments()[0]
    assert spread[:, 1] == pytest.approx([85 - 50**0.5, 85 + 50**0.5])

    rows = [
        [scope, seed, step, step + seed, 9 - step]
        for scope in ("global", "local")
        for seed in (0, 1)
        for step in (1, 2)
    ]
    losses = pd.DataFrame(rows, columns=["scope", "seed", "step", "loss", "rank_budget"])
    loss, budget = figure2_loss(losses, "a title", window=1).axes
    assert labelled(loss) and budget.get_ylabel()
    assert [line.get_ydata().tolist() for line in loss.lines] == [[1.5, 2.5]] * 2
    assert budget.lines[0].get_xydata().tolist() == [[1, 8], [2, 7]]
    smooth = figure2_loss(losses, "a title", window=3).axes[0]
    assert smooth.lines[0].get_ydata().tolist() == [2, 2]


def test_figure3_has_one_scale_of_colours():
    def report(ranks):
        rows = {f"layer.{i}.query": {"rank": rank, "full_rank": 8, "form": "low rank"} for i, rank in enumerate(ranks)}
        return pd.DataFrame.from_dict(rows, orient="index")

    figure = figure3({"one": report([1, 2]), "two": report([4, 0])}, "a title")
    one, two, colours = figure.axes
    assert [axes.get_title() for axes in (one, two)] == ["one", "two"] and labelled(one) and labelled(two)
    assert [text.get_text() for text in (*one.texts, *two.texts)] == ["1", "2", "4", "0"]
    assert one.images[0].get_clim() == two.images[0].get_clim() == (0, 0.5)
    assert colours.get_ylabel() == "rank / full rank"


def test_figure4_draws_the_portions():
    figure = figure4([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0, 5], "a title", bins=3)
    svd, own = figure.axes
    assert [[bar.get_height() for bar in axes.containers[1]] for axes in (svd, own)] == [[1, 0, 0], [0.5, 0, 0.5]]
    assert [label.get_text() for label in own.get_xticklabels()] == ["1\u20132\n5.5", "3\u20134\n3.5", "5\u20136\n1.5"]
    assert own.get_xlabel() and own.get_ylabel() and svd.get_ylabel()


def test_a_finding_is_kept(tmp_path):
    path, calls = tmp_path / "studies" / "one.json", []
    compute = lambda: calls.append(1) or {"numbers": [1.5]}  # noqa: E731
    for _ in range(2):
        assert kept(path, {"steps": (1, 2)}, compute) == {"numbers": [1.5]}
    assert len(calls) == 1
    with pytest.raises(ValueError, match="found with other settings"):
        kept(path, {"steps": (1, 3)}, compute)


@pytest.fixture
def grid(tmp_path, folder_of):
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        write_rows(data / f"{split}.jsonl", sentences(16))
    return Grid(SCALE, tmp_path / "grid", {"encoder": folder_of("bert")}, tmp_path / "data")


def test_batches_are_those_of_the_task(grid):
    folder = grid.cell_folder("sst2", DENSE, 1.0, 0)
    script, options = grid._options("sst2", DENSE, 1.0, 0)
    write(folder / "request.json", {"script": script, "options": {key: str(value) for key, value in options.items()}})
    request = request_of_cell(grid, "sst2", DENSE, 1.0, 0)
    assert run_of_request(request, folder).training.learning_rate == 2e-3

    def some(seed, count=4):
        return [
            row for row, _ in zip(training_batches(run_of_request(request, folder), seed), range(count), strict=False)
        ]

    one, again, other = some(0), some(0), some(1)
    ids = [[row for batch in batches for row in batch["input_ids"].tolist()] for batches in (one, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(ids[0][:16]) == sorted(ids[0][16:]) == sorted(ids[2][:16])  # two batches of 8 are an epoch
    assert sum(batch["labels"].sum() for batch in one) == 16
    first, second = (run_of_request(request, folder).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)  # the new head too


def narrow(path):
    """Markdown without the blanks that align its tables."""
    return re.sub(r" +\|", " |", re.sub(r"\| +", "| ", path.read_text()))


@pytest.mark.slow
@pytest.mark.long
def test_every_figure_is_made_and_nothing_runs_twice(grid, tmp_path, monkeypatch):
    paths = {name: make_figure(name, grid, tmp_path / "figures") for name in FIGURES}
    for name, files in paths.items():
        stems = ["figure2a", "figure2b"] if name == "figure2" else [name]
        assert [file.name for file in files] == [f"{s}{e}" for s in stems for e in (".png", ".svg")] + [f"{name}.md"]
        assert all(file.stat().st_size > 0 for file in files)
    dense, runs = grid.cell("sst2", DENSE), sorted(tmp_path.glob("grid/runs/sst2/*/*"))
    assert {run.name for run in runs} == {
        "none",
        "rankdyna-0.5",
        "rankdyna-0.2",
        "rankdyna_local-0.5",
        "rankdyna_local-0.2",
    }
    assert dense["steps"]["final"] == STEPS

    text = narrow(tmp_path / "figures" / "figure2.md")
    for scope, method in (("global", GLOBAL), ("local", LOCAL)):
        scores = [grid.score("sst2", grid.cell("sst2", method, 0.2, seed)) for seed in (0, 1)]
        assert f"| 0.2 | {scope} | {sum(scores) / 2:.1f} |" in text
    text = narrow(tmp_path / "figures" / "figure6.md")
    for layer, row in grid.cell("sst2", GLOBAL, 0.5)["layers"].items():
        assert f"| 0.5 | {layer} | {row['rank']} | 32 | 16 |" in text
    assert len(text.splitlines()) == 2 + 2 + 2 * 12
    found = json.loads((tmp_path / "grid/studies/figure4-sst2-0.2-seed0.json").read_text())["found"]
    assert sum(found["ranks"].values()) == sum(
        row["rank"] for row in grid.cell("sst2", GLOBAL, 0.2)["layers"].values()
    )
    text = narrow(tmp_path / "figures" / "figure4.md")
    for layer, groups in found["layers"].items():
        shared = len({*groups["kept"]} & {*range(len(groups["kept"]))})
        assert f"| {layer} | {len(groups['kept'])} | {shared} |" in text

    before = {file: file.read_bytes() for files in paths.values() for file in files}
    for study in ("importance_positions", "kept_groups"):
        monkeypatch.setattr(figure_data, study, lambda *_, **__: pytest.fail("a study ran again"))
    monkeypatch.setattr("run_glue.main", lambda _: pytest.fail("a cell ran again"))
    for name in FIGURES:
        make_figure(name, grid, tmp_path / "figures")
    assert all(Path(file).read_bytes() == content for file, content in before.items())
