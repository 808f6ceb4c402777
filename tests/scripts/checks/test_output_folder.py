"""The table of what stands in the way of a model in its folder."""

import pytest
from checks.output_folder import obstacles, result


@pytest.mark.parametrize(
    ("obstacle", "said", "words", "left"),
    [
        (
            "model.safetensors: a folder",
            "before training",
            "is a folder",
            "model: none; cards: none; what was there: kept",
        ),
        (
            "config.json: a folder, in the middle",
            "at the end",
            "it is in /output-compacted",
            "model: output-compacted;",
        ),
        pytest.param(
            *("another run that ends before", "not", "", "model: output; cards: output/README.md;"),
            marks=pytest.mark.long,
        ),
        ("a run before that was killed at its end", "before training", "is finished now", "model: output;"),
        ("README.md generated, then changed", "at the end", "README.rankdyna.md", "what was there: kept"),
        pytest.param(
            *("README.md generated, unchanged", "not", "", "cards: output/README.md; what was there: replaced"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_obstacle(obstacle: str, said: str, words: str, left: str) -> None:
    found = result(*obstacles()[obstacle])
    assert found["said"] == said and words in found["words"] and left in found["left"], found
