"""What a card says, and what it should say."""

from huggingface_hub import ModelCard
from transformers import Trainer


def evaluations(trainer: Trainer) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in trainer.state.log_history if "eval_loss" in row}


def scores(card: ModelCard) -> dict[str, list[str]]:
    """The cells of the table of scores, by the first one."""
    return _cells(card, "Scores")


def table(card: ModelCard, heading: str) -> dict[str, str]:
    """The second cell of each row of the tables of a section, by the first one."""
    return {name: cells[0] for name, cells in _cells(card, heading).items() if cells}


def _cells(card: ModelCard, heading: str) -> dict[str, list[str]]:
    section = card.text.split(f"## {heading}\n")[1].split("\n## ")[0] if f"## {heading}\n" in card.text else ""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {line[0]: line[1:] for line in lines if not line[0].startswith(":")}
