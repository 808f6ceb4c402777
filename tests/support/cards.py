"""What a card says, and what it should say."""

from huggingface_hub import ModelCard
from transformers import Trainer


def evaluations(trainer: Trainer) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in trainer.state.log_history if "eval_loss" in row}


def scores(card: ModelCard) -> dict[str, list[str]]:
    """The cells of the table of scores, by the first one."""
    table = card.text.split("## Scores\n")[1].split("\n## ")[0] if "## Scores\n" in card.text else ""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return {line[0]: line[1:] for line in lines if not line[0].startswith(":")}
