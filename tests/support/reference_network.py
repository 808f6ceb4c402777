"""A network, batches and optimizers, in float64, on which Algorithm 1 of `reference.py` and the library both run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from reference import RANKS, SingularGroups, rankdyna
from torch import Tensor, nn

from .reference_parameters import PARAMETERS

FEATURES, CLASSES = 8, 3
BLOCKS = ((8, 14, 10, True), (10, 16, 6, False), (6, 12, 9, True))  # in, inner, out, has a gate


class Block(nn.Module):
    """Linear layers, each followed by tanh: tall, square (where there is a gate), wide."""

    def __init__(self, features: int, inner: int, out: int, gated: bool) -> None:
        super().__init__()
        self.up = nn.Linear(features, inner)
        self.gate = nn.Linear(inner, inner) if gated else None
        self.down = nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        x = x if self.gate is None else torch.tanh(self.gate(x))
        return torch.tanh(self.down(x))


class DenseNetwork(nn.Module):
    """A stack of blocks and a linear head, with the forward signature that a Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*sizes) for sizes in BLOCKS)
        self.classifier = nn.Linear(BLOCKS[-1][2], CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`x (batch, features)`, `labels (batch,)` -> `logits (batch, classes)` and, given labels, `loss`."""
        for block in self.blocks:
            x = block(x)
        logits = self.classifier(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def build_dense(seed: int) -> nn.Module:
    """The network in float64, its weights drawn from `seed`; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DenseNetwork().double()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def make_batches(seed: int, steps: int, size: int = 16) -> list[dict[str, Tensor]]:
    """`steps` batches of `x (size, features)`, float64 but exact in float32 too, and `labels (size,)`."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator)
    inputs = [torch.randn(size, FEATURES, generator=generator) for _ in range(steps)]
    return [{"x": x.double(), "labels": (x @ teacher).argmax(dim=1)} for x in inputs]


class ReferenceNetwork:
    """The dense network, left as it is, with the weight of each linear layer in its blocks as singular groups."""

    def __init__(self, dense: nn.Module) -> None:
        layers = {n: m for n, m in dense.blocks.named_modules(prefix="blocks") if isinstance(m, nn.Linear)}
        self.phis = {name: SingularGroups(layer.weight) for name, layer in layers.items()}
        self.biases = [layer.bias.detach().clone().requires_grad_() for layer in layers.values()]
        self.head = [parameter.detach().clone().requires_grad_() for parameter in dense.classifier.parameters()]
        factors = [factor for phi in self.phis.values() for factor in (phi.u, phi.sigma, phi.v)]
        self.parameters = factors + self.biases + self.head

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of `x (batch, features)`."""
        for phi, bias in zip(self.phis.values(), self.biases, strict=True):
            x = torch.tanh(x @ phi.W().T + bias)
        weight, bias = self.head
        logits = x @ weight.T + bias
        return (logits.logsumexp(dim=1) - logits[torch.arange(len(labels)), labels]).mean()

    def backward(self, batch: dict[str, Tensor], max_grad_norm: float) -> None:
        """New gradients, clipped together."""
        gradients = torch.autograd.grad(self.loss(**batch), self.parameters)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient * min(1.0, max_grad_norm / (norm + 1e-6))


def sgd(parameters: Sequence[Tensor], lr: float) -> Callable[[], None]:
    """A step without momentum."""

    def step() -> None:
        for parameter in parameters:
            parameter.data -= lr * parameter.grad

    return step


def adamw(parameters: Sequence[Tensor], lr: float) -> Callable[[], None]:
    """A step with betas of 0.9 and 0.999, eps 1e-8, no weight decay."""
    moments = [[torch.zeros_like(parameter), torch.zeros_like(parameter), 0] for parameter in parameters]

    def step() -> None:
        for parameter, state in zip(parameters, moments, strict=True):
            g, (first, second, n) = parameter.grad, state
            first, second, n = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square(), n + 1
            state[:] = first, second, n
            parameter.data -= lr * first / (1 - 0.9**n) / ((second / (1 - 0.999**n)).sqrt() + 1e-8)

    return step


@dataclass
class Result:
    """Of each step the budget and the ranks; at the end the weights by layer, each P Q, and that of the head."""

    budgets: list[int]
    ranks: list[tuple[int, ...]]
    weights: dict[str, Tensor]
    head: Tensor


def run_reference(
    dense: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    *,
    kind: str = "rank",
    optimizer: str = "sgd",
    lr: float = 0.01,
    max_grad_norm: float = 1.0,
    **choices: object,
) -> Result:
    """Algorithm 1, one step for each batch at a constant learning rate, with the `choices` c, t0, t1, beta, scope."""
    network, following = ReferenceNetwork(dense), iter(batches)
    phis = list(network.phis.values())
    steps = rankdyna(
        phis,
        lambda: network.backward(next(following), max_grad_norm),
        {"sgd": sgd, "adamw": adamw}[optimizer](network.parameters, lr),
        T=len(batches),
        unit={"rank": RANKS, "param": PARAMETERS}[kind],
        **choices,
    )
    result = Result([], [], {}, network.head[0].detach())
    for budget in steps:
        result.budgets.append(budget)
        result.ranks.append(tuple(int(phi.remain.sum()) for phi in phis))
    for name, phi in network.phis.items():
        p, q = phi.PQ()
        result.weights[name] = p @ q
    return result
