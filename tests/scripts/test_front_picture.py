"""The picture at the head of the README shows the committed numbers, and so does the table below it."""

import json
import re
from pathlib import Path

import front_picture
import pytest
from front_picture import DENSE, OURS, ROOT, draw, read_latencies, read_scores

PAGE = """# A page

| rank ratio | method | target parameters | all parameters | sst2 |
| --- | --- | --- | --- | --- |
| 1 | dense | 1.000 | 1.000 | 80.00 ± 0.50 |
| 1 | dense, BERT-base, Hua et al. 2023 | | 86.2M without embeddings | 93.0 |
| 0.2 | SVD | 0.300 | 0.790 | 77.00 ± 0.60 |
| 0.2 | FWSVD | 0.300 | 0.790 | 76.00 ± 0.70 |
| 0.2 | TFWSVD | 0.300 | 0.790 | 75.00 ± 0.80 |
| 0.2 | RankDyna | 0.301 to 0.311 | 0.787 to 0.790 | 78.00 ± 0.20 |
| 0.2 | RankDyna, equal parameters | 0.300 | 0.790 | 79.00 ± 0.10 |

| rank ratio | method | target parameters | all parameters | stsb |
| --- | --- | --- | --- | --- |
| 1 | dense | 1.000 | 1.000 | 40.00 ± 0.50 |
"""


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[Path, Path]:
    scores, latencies = tmp_path / "page.md", tmp_path / "latencies.jsonl"
    scores.write_text(PAGE, encoding="utf-8")
    documents = [
        {"target_parameter_ratio": 0.3, "inputs": {"input_ids": [batch, 64]}, "timings": [{"ratio": ratio}]}
        for batch, ratio in ((1, 0.5), (32, 0.75))
    ]
    latencies.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return scores, latencies


def test_the_scores_and_times_are_drawn_from_the_dense_model_on(numbers: tuple[Path, Path]) -> None:
    scores, latencies = numbers
    left, right = draw(read_scores(scores), read_latencies(latencies)).axes
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in left.containers}
    assert drawn == {
        "SVD": [[0.3, 77]],
        "FWSVD": [[0.3, 76]],
        "TFWSVD": [[0.3, 75]],
        "RankDyna": [[1, 80], [0.3, 79]],
    }
    spread = left.containers[-1].lines[2][0].get_segments()[1]
    assert spread[:, 1].tolist() == pytest.approx([78.9, 79.1])
    times = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert times["batch of 1"] == [[1, 1], [0.3, 0.5]] and times["batch of 32"] == [[1, 1], [0.3, 0.75]]
    assert [label.get_text() for label in left.get_xticklabels()] == ["1.00\n(1.00)", "0.30\n(0.79)"]


def test_the_command_writes_the_picture(numbers: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "front.png"
    paths = [str(path) for path in (*numbers, picture)]
    front_picture.main(["--scores", paths[0], "--latencies", paths[1], "--output", paths[2]])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_the_committed_numbers() -> None:
    scores = read_scores(ROOT / "REPRODUCTION.md")
    rows = re.findall(r"^\| MiniLM-L3, SST-2 \|.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(scores[OURS]) == 3
    dense = scores[DENSE][0]
    for size, (row, ours) in enumerate(zip(rows, scores[OURS], strict=True)):
        name, best = max(
            ((name, found[size]) for name, found in scores.items() if name not in (DENSE, OURS)),
            key=lambda baseline: baseline[1].mean,
        )
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
            f"{ours.target:.2f} ({ours.all:.2f})",
            f"{dense.mean} ± {dense.spread}",
            f"**{ours.mean:.2f} ± {ours.spread:.2f}**",
            f"{best.mean:.2f} ± {best.spread:.2f}, {name}",
        ]


def test_the_page_of_costs_has_the_committed_times() -> None:
    measured = read_latencies(ROOT / "docs" / "_static" / "front.jsonl")
    sizes = [score.target for score in read_scores(ROOT / "REPRODUCTION.md")[OURS]]
    assert [latency.target for latency in measured] == pytest.approx(sizes * 2, abs=0.001)
    assert [latency.batch for latency in measured] == [1] * 3 + [32] * 3
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    table = page.partition("| batch of 1 | batch of 32 |\n")[2].partition("\n\n")[0].splitlines()[1:]
    times = [[float(cell.split()[0]) for cell in row.strip("| ").split("|")[2:]] for row in table]
    assert times == [[round(each.time, 2) for each in pair] for pair in zip(measured[:3], measured[3:], strict=True)]
