"""Random networks of plain torch modules."""

import itertools
import random
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .subjects import Batch, Subject

ODD_SIZES = (1, 1, 2, 3, 4, 5, 8, 13, 24, 40)


class Network(nn.Module):
    """A stem, a stack of blocks and a head, which returns its loss."""

    def __init__(self, stem: nn.Module, blocks: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`x` `(rows, ..., features)`."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": F.mse_loss(logits, labels), "logits": logits}


class Residual(nn.Module):
    """`x + f(norm(x))`, with its parts where `f` has them."""

    def __init__(self, width: int, inside: nn.Module) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(width), inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(self.norm(x))


class Gated(nn.Module):
    """Two ways in, one out, in a dictionary of modules."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.ways = nn.ModuleDict({"gate": nn.Linear(width, inner, bias), "up": nn.Linear(width, inner, bias)})
        self.down = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.ways["gate"](x)) * self.ways["up"](x))


class WithUnused(nn.Module):
    """A layer that is called, and one that never is."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(width, width, bias), nn.Linear(width, inner, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class Attention(nn.Module):
    """torch's own, which reads the weight of its output layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.ndim == 3 else x.unsqueeze(1)
        return self.out(self.attention(rows, rows, rows, need_weights=False)[0]).reshape(x.shape)


class WrittenOut(nn.Linear):
    """The function of `nn.Linear` in other words."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


def chain(draw: random.Random, width: int, bias: bool) -> nn.Module:
    """Layers of random sizes one after the other."""
    sizes = [width, *(draw.choice(ODD_SIZES) for _ in range(draw.randint(1, 3))), width]
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layer = draw.choice([nn.Linear, nn.Linear, WrittenOut])
        layers += [layer(into, out, bias=bias), draw.choice([nn.GELU, nn.Tanh, nn.SiLU])()]
    return nn.Sequential(*layers[:-1])


def conv1d(draw: random.Random, width: int) -> nn.Module:
    """Layers that keep their weights the other way round."""
    inner = draw.choice(ODD_SIZES)
    return nn.Sequential(Conv1D(inner, width), nn.GELU(), Conv1D(width, inner))


def nested(draw: random.Random, width: int, bias: bool) -> nn.Module:
    """Blocks in blocks."""
    inside = nn.Sequential(Residual(width, chain(draw, width, bias)), Residual(width, chain(draw, width, bias)))
    return nn.Sequential(nn.ModuleDict({"a": inside})["a"], nn.Linear(width, width, bias))


def repeated(draw: random.Random, width: int, bias: bool) -> nn.Module:
    """One layer in two places."""
    layer = nn.Linear(width, width, bias)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied(draw: random.Random, width: int, bias: bool) -> nn.Module:
    """Two layers that share a weight, and one that does not."""
    one, other = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other, nn.Linear(width, width, bias))


BLOCKS: dict[str, Callable[[random.Random, int, bool], nn.Module]] = {
    "chain": chain,
    "Conv1D": lambda draw, width, bias: conv1d(draw, width),
    "gated": lambda draw, width, bias: Gated(width, draw.choice(ODD_SIZES), bias),
    "nested": nested,
    "repeated": repeated,
    "tied": tied,
    "unused": lambda draw, width, bias: WithUnused(width, draw.choice(ODD_SIZES), bias),
    "attention": lambda draw, width, bias: Attention(width),
    "torch's encoder": lambda draw, width, bias: nn.TransformerEncoderLayer(width, 2, 12, 0.0, batch_first=True),
}


def random_network(draw: random.Random) -> Subject:
    """A stack of some kinds of blocks, some of which may stand in it more than once."""
    width, classes, bias = draw.choice([2, 4, 6, 8, 16]), draw.choice([1, 2, 5]), draw.random() < 0.7
    kinds = [draw.choice([*BLOCKS]) for _ in range(draw.randint(1, 4))]
    blocks = [Residual(width, BLOCKS[kind](draw, width, bias)) for kind in kinds]
    if shared := draw.random() < 0.2:
        blocks.append(blocks[0])
    features = draw.choice(ODD_SIZES)
    shape = (draw.choice([1, 5, 16]), *draw.choice([(), (7,)]))
    model = Network(nn.Linear(features, width), blocks, nn.Linear(width, classes))

    def batch() -> Batch:
        return {"x": torch.randn(*shape, features), "labels": torch.randn(*shape, classes)}

    return Subject("plain", model, batch, [*kinds, *["a block twice"] * shared])
