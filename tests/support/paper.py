"""The paper's own choices: groups of the weights from the first step on, chosen by their scores alone at each step."""

from typing import Any

PAPER: dict[str, Any] = {"group_basis": "weights", "block_floor": 0.0, "rank_update_interval": 1}
