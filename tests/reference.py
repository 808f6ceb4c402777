"""RankDyna written straight from its equations: float64, dense tensors, boolean masks, slow and obvious.

It shares no code with the library, so that the library can be tested against it. Weights are
`(out, in)`; singular groups are dimension 0: `u (rank, out)`, `sigma (rank,)`, `v (rank, in)`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

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


def budget(t: int, initial: int, final: int, warmup: int, cooldown: int, total: int) -> int:
    """R(t) after `t` finished steps: eq. 12, corrected so that R(t0) = R(0) and R(T - t1) = R(T)."""
    end = total - cooldown
    if t >= end:
        return final
    if t <= warmup:
        return initial
    return final + math.ceil((initial - final) * (1 - Fraction(t - warmup, end - warmup)) ** 3)


def final_rank_budget(ratio: float, initial: int) -> int:
    """R(T) = ceil(c R(0)), eq. 4, for the decimal number that `ratio` is written as."""
    return math.ceil(Fraction(str(ratio)) * initial)


def final_parameter_budget(ratio: float, dense: int) -> int:
    """floor(ratio * dense): how many of `dense` parameters may remain."""
    return math.floor(Fraction(str(ratio)) * dense)


def score_groups(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Eq. 9 with S = |theta * gradient|: `(u, sigma, v)` and their gradients -> `(rank,)`."""
    (u, sigma, v), (du, dsigma, dv) = values, gradients
    return (sigma * dsigma).abs() + (u * du).abs().sum(dim=1) + (v * dv).abs().sum(dim=1)


def smooth(smoothed: Tensor, score: Tensor, beta: float) -> Tensor:
    """Eq. 11: `(rank,)`, `(rank,)` -> `(rank,)`."""
    return beta * smoothed + (1 - beta) * score


def parameter_cost(ranks: Sequence[int], shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters of layers `(out, in)`: of both factors, or of the matrix where that is not larger."""
    return sum(min(r * (out + in_), out * in_) for r, (out, in_) in zip(ranks, shapes, strict=True))


def _best_first(values: list[Tensor], remaining: list[Tensor]) -> list[tuple[int, int]]:
    """(layer, group) of every remaining group, highest value first, ties by layer, then by group."""
    groups = []
    for layer, (value, mask) in enumerate(zip(values, remaining, strict=True)):
        groups += [(-value[k].item(), layer, k) for k in range(len(mask)) if mask[k]]
    return [(layer, k) for _, layer, k in sorted(groups)]


def select_by_rank(scores: list[Tensor], remaining: list[Tensor], budget: int | list[int]) -> list[Tensor]:
    """The `budget` best remaining groups of all layers, or of each layer if `budget` is a list of budgets.

    Scores, masks and the new masks that it returns are `(rank,)` for each layer.
    """
    if isinstance(budget, list):
        layers = zip(scores, remaining, budget, strict=True)
        return [select_by_rank([score], [mask], b)[0] for score, mask, b in layers]
    kept = [torch.zeros_like(mask) for mask in remaining]
    for layer, k in _best_first(scores, remaining)[:budget]:
        kept[layer][k] = True
    return kept


def select_by_parameters(
    scores: list[Tensor], remaining: list[Tensor], shapes: list[tuple[int, int]], budget: int | list[int]
) -> list[Tensor]:
    """Like `select_by_rank`, but by score per parameter, and `budget` limits the parameters of what is kept.

    A group is kept if the total stays within the budget. So in a layer that has reached its dense cost
    further groups are free, and where one group does not fit, no later group of that layer does.
    """
    if isinstance(budget, list):
        layers = zip(scores, remaining, shapes, budget, strict=True)
        return [select_by_parameters([score], [mask], [shape], b)[0] for score, mask, shape, b in layers]
    kept = [torch.zeros_like(mask) for mask in remaining]
    density = [score / (out + in_) for score, (out, in_) in zip(scores, shapes, strict=True)]
    for layer, k in _best_first(density, remaining):
        kept[layer][k] = True
        if parameter_cost([int(mask.sum()) for mask in kept], shapes) > budget:
            kept[layer][k] = False
    return kept


class ReferenceModel:
    """The dense network with the weight of every linear layer in its blocks as a sum of singular groups.

    `parameters` maps names to leaf tensors: `<layer>.u`, `<layer>.sigma`, `<layer>.v`, `<layer>.bias`,
    `classifier.weight`, `classifier.bias`; `masks[i] (rank,)` tells which groups of `names[i]` remain.
    """

    def __init__(self, dense: nn.Module) -> None:
        layers = {n: m for n, m in dense.blocks.named_modules(prefix="blocks") if isinstance(m, nn.Linear)}
        self.names = list(layers)
        self.shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
        self.masks = [torch.ones(min(shape), dtype=torch.bool) for shape in self.shapes]
        values = {"classifier.weight": dense.classifier.weight, "classifier.bias": dense.classifier.bias}
        for name, layer in layers.items():
            u, sigma, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            values |= dict(zip(self.keys(name), (u.T, sigma, vh), strict=True)) | {f"{name}.bias": layer.bias}
        self.parameters = {key: value.detach().clone().requires_grad_() for key, value in values.items()}

    @staticmethod
    def keys(name: str) -> tuple[str, str, str]:
        """Names of a layer's u, sigma and v."""
        return f"{name}.u", f"{name}.sigma", f"{name}.v"

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of `x (batch, features)`, each weight being eq. 5 over its remaining groups."""
        for name, mask in zip(self.names, self.masks, strict=True):
            u, sigma, v = (self.parameters[key] for key in self.keys(name))
            weight = torch.einsum("k,ko,ki->oi", sigma * mask, u, v)
            x = torch.tanh(x @ weight.T + self.parameters[f"{name}.bias"])
        logits = x @ self.parameters["classifier.weight"].T + self.parameters["classifier.bias"]
        return (logits.logsumexp(dim=1) - logits[torch.arange(len(labels)), labels]).mean()


@dataclass
class History:
    """For every step: the budget enforced (a list with one for each layer if local), ranks, loss.

    At the end: masks and smoothed scores `(rank,)` of each layer (0 where removed), and all parameters.
    """

    names: list[str]
    budgets: list[int | list[int]]
    ranks: list[tuple[int, ...]]
    losses: list[float]
    masks: list[Tensor]
    smoothed: list[Tensor]
    parameters: dict[str, Tensor]


def run_reference(
    dense: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    *,
    kind: str = "rank",
    ratio: float = 0.2,
    scope: str = "global",
    warmup: int = 0,
    cooldown: int = 0,
    beta: float = 0.85,
    optimizer: str = "sgd",
    lr: float = 0.01,
    max_grad_norm: float | None = 1.0,
) -> History:
    """Algorithm 1, one step for each batch at a constant learning rate; `dense` is left as it is.

    `kind` is "rank" or "param", `scope` "global" or "local", `optimizer` "sgd" (no momentum) or "adamw"
    (betas 0.9 and 0.999, eps 1e-8, no weight decay); `warmup` and `cooldown` count steps.
    """
    assert kind in ("rank", "param") and scope in ("global", "local") and optimizer in ("sgd", "adamw")
    total = len(batches)
    assert warmup + cooldown <= total
    model = ReferenceModel(dense)
    values = model.parameters
    first = {key: torch.zeros_like(value) for key, value in values.items()}
    second = {key: torch.zeros_like(value) for key, value in values.items()}
    smoothed = [torch.zeros(len(mask), dtype=torch.float64) for mask in model.masks]
    history = History(model.names, [], [], [], [], [], {})

    sizes = [min(shape) if kind == "rank" else shape[0] * shape[1] for shape in model.shapes]
    initial = sizes if scope == "local" else [sum(sizes)]
    to_final = final_rank_budget if kind == "rank" else final_parameter_budget

    for n, batch in enumerate(batches, start=1):
        loss = model.loss(batch["x"], batch["labels"])
        grads = dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))
        if max_grad_norm is not None:
            norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
            grads = {key: g * min(1.0, max_grad_norm / (norm + 1e-6)) for key, g in grads.items()}

        for i, name in enumerate(model.names):
            keys = model.keys(name)
            score = score_groups([values[key].detach() for key in keys], [grads[key] for key in keys])
            smoothed[i] = smooth(smoothed[i], score, beta)

        for key, g in grads.items():
            if optimizer == "sgd":
                values[key].data -= lr * g  # eq. 6 - 8
            else:
                first[key] = 0.9 * first[key] + 0.1 * g
                second[key] = 0.999 * second[key] + 0.001 * g.square()
                mean, square = first[key] / (1 - 0.9**n), second[key] / (1 - 0.999**n)
                values[key].data -= lr * mean / (square.sqrt() + 1e-8)

        now = [budget(n, r0, to_final(ratio, r0), warmup, cooldown, total) for r0 in initial]
        allowed = now if scope == "local" else now[0]
        if kind == "rank":
            model.masks = select_by_rank(smoothed, model.masks, allowed)
        else:
            model.masks = select_by_parameters(smoothed, model.masks, model.shapes, allowed)
        smoothed = [score * mask for score, mask in zip(smoothed, model.masks, strict=True)]
        for name, mask in zip(model.names, model.masks, strict=True):
            for key in model.keys(name):
                for tensor in (values[key].data, first[key], second[key]):
                    tensor[~mask] = 0.0

        history.budgets.append(allowed)
        history.ranks.append(tuple(int(mask.sum()) for mask in model.masks))
        history.losses.append(loss.item())

    history.masks, history.smoothed = model.masks, smoothed
    history.parameters = {key: value.detach() for key, value in values.items()}
    return history
