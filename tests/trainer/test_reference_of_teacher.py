"""A run with a teacher against Algorithm 1 of `reference.py` with the teacher's loss written out, in float64."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from reference import rankdyna
from support.paper import PAPER
from support.reference_network import BLOCKS, DenseNetwork, ReferenceNetwork, adamw, build_dense, make_batches, sgd
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rankdyna_trainer import RankDynaConfig

from .test_reference import BATCH, STEPS, train

ALPHA, HIDDEN, TEMPERATURE = 0.4, 0.7, 3.0
# The layers after which a block ends.
ENDS = [sum(2 + gated for *_, gated in BLOCKS[: i + 1]) - 1 for i in range(len(BLOCKS))]


class PretrainedNetwork(PreTrainedModel):
    """The network of the other references as a model of transformers, of which alone a teacher can be asked."""

    config_class = PretrainedConfig

    def __init__(self, dense: nn.Module) -> None:
        super().__init__(PretrainedConfig(num_labels=dense.classifier.out_features))
        self.blocks, self.classifier = dense.blocks, dense.classifier

    def forward(self, x: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> dict[str, Tensor]:
        return DenseNetwork.forward(self, x, labels)  # type: ignore[arg-type]


def states_and_logits(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], head: Sequence[Tensor]):
    """The output of each block, and the logits."""
    states = []
    for number, (W, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.tanh(x @ W.T + bias)
        if number in ENDS:
            states.append(x)
    return states, x @ head[0].T + head[1]


class TaughtReference(ReferenceNetwork):
    """Its loss has the teacher's parts."""

    def __init__(self, dense: nn.Module, teacher: nn.Module) -> None:
        super().__init__(dense)
        taught = ReferenceNetwork(teacher)
        self.of_teacher = [phi.W().detach() for phi in taught.phis.values()], taught.biases, taught.head

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        states, logits = states_and_logits(x, [phi.W() for phi in self.phis.values()], self.biases, self.head)
        with torch.no_grad():
            wanted, soft = states_and_logits(x, *self.of_teacher)
            p = torch.softmax(soft / TEMPERATURE, dim=1)
        task = -torch.log(torch.softmax(logits, dim=1)[torch.arange(len(labels)), labels]).mean()
        q = torch.softmax(logits / TEMPERATURE, dim=1)
        divergence = TEMPERATURE**2 * (p * (p / q).log()).sum() / len(labels)
        errors = [((h - t) ** 2).mean() / (t**2).mean() for h, t in zip(states, wanted, strict=True)]
        return (1 - ALPHA) * task + ALPHA * divergence + HIDDEN * sum(errors) / len(errors)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_same_ranks_and_weights_as_the_equations_with_a_teacher(optimizer: str, tmp_path: Path) -> None:
    learning_rate = {"sgd": 0.1, "adamw": 0.005}[optimizer]
    batches = make_batches(1, STEPS, BATCH)
    network, following = TaughtReference(build_dense(0), build_dense(7)), iter(batches)
    phis = list(network.phis.values())
    step = {"sgd": sgd, "adamw": adamw}[optimizer](network.parameters, learning_rate)
    steps = rankdyna(phis, lambda: network.backward(next(following), 1.0), step, c=0.3, t0=5, t1=10, T=STEPS)
    expected = [tuple(int(phi.remain.sum()) for phi in phis) for _ in steps]

    parts = {"teacher_weight": ALPHA, "hidden_weight": HIDDEN, "teacher_temperature": TEMPERATURE}
    schedule = {"rank_warmup_steps": 5, "rank_cooldown_steps": 10}
    config = RankDynaConfig(rank_ratio=0.3, **schedule, **parts, **PAPER)
    model, teacher = PretrainedNetwork(build_dense(0)), PretrainedNetwork(build_dense(7))
    optim = {"sgd": "sgd", "adamw": "adamw_torch"}[optimizer]
    trainer, ranks = train(model, batches, config, tmp_path, teacher, optim=optim, learning_rate=learning_rate)

    assert ranks == expected
    assert {"task_loss", "teacher_logits_loss", "teacher_hidden_loss"} <= trainer.state.log_history[0].keys()
    for name, phi in network.phis.items():
        p, q = phi.PQ()
        layer = model.get_submodule(name)
        found = layer.weight if isinstance(layer, nn.Linear) else layer.to_dense_weight()
        torch.testing.assert_close(found, p @ q, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.classifier.weight, network.head[0].detach(), rtol=0, atol=1e-9)
