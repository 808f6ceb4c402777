"""A loop of one's own on the reference network, for tests of what a run does between its first and last step."""

from torch import nn
from torch.optim import AdamW, Optimizer

from rankdyna_trainer import RankDyna

from .reference_network import make_batches

STEPS = 20


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.005, weight_decay=0.01)


def train(
    model: nn.Module, optimizer: Optimizer, first: int, last: int, rankdyna: RankDyna | None = None
) -> list[float]:
    losses = []
    for step, batch in list(enumerate(make_batches(1, STEPS), start=1))[first - 1 : last]:
        loss = model(**batch)["loss"]
        losses.append(loss.item())
        loss.backward()
        if rankdyna is not None:
            rankdyna.update_importance()
        optimizer.step()
        if rankdyna is not None:
            rankdyna.enforce_budget(step)
        optimizer.zero_grad()
    return losses
