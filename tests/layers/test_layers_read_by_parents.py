from collections.abc import Callable

import pytest
import torch
from support.networks import model_of, names
from torch import Tensor, nn
from torch.nn import functional as F

from rankdyna_trainer.layers.architecture import layers_read_by_parents


class Reader(nn.Module):
    """The submodules that the modules below read, or do not read."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = model_of(proj=nn.Linear(4, 4))
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def read_other(self) -> Tensor:
        return self.other.weight

    @staticmethod
    def times(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class CallsOnly(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.proj(x))


class ReadsWeight(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.other(x), self.proj.weight)


class ReadsInner(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.times(self.proj(x), self.inner.proj.weight)


class ReadsEntries(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.parts)):
            x = x @ self.parts[i].weight
        return self.proj(x)


class ReadsInHelper(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.proj(x))

    def first(self, x: Tensor) -> Tensor:
        return self.second(x)

    def second(self, x: Tensor) -> Tensor:
        return x @ self.read_other() if x.ndim else self.first(x)


class ReadsInSuper(ReadsWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ReadsWhenDecorated(Reader):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight


class ReadsOnlyAttributes(Reader):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(device=self.proj.weight.device, dtype=self.proj.weight.dtype)
        if self.proj.weight is not None and isinstance(self.proj.weight, Tensor):
            x = self.proj(x)
        return x


class ReadsShape(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).view(-1, self.proj.weight.shape[0])


class ReadsElsewhere(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def penalty(self) -> Tensor:
        return self.proj.weight.square().sum()


class ReadsItsOwn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (CallsOnly, set()),
        (ReadsWeight, {"proj"}),
        (ReadsInner, {"inner.proj"}),
        (ReadsEntries, {"parts.0", "parts.1"}),
        (ReadsInHelper, {"other"}),
        (ReadsInSuper, {"proj"}),
        (ReadsWhenDecorated, {"proj"}),
        (ReadsOnlyAttributes, set()),
        (ReadsShape, {"proj"}),
        (ReadsElsewhere, set()),
        (lambda: ReadsItsOwn(4, 4), set()),
        (lambda: nn.MultiheadAttention(4, 2), {"out_proj"}),
        (lambda: nn.TransformerEncoderLayer(4, 2, 4), {"self_attn.out_proj", "linear1", "linear2"}),
    ],
)
def test_layers_read_by_their_parent(make: Callable[[], nn.Module], read: set[str]) -> None:
    model = model_of(inside=make())
    linear = {layer for layer in layers_read_by_parents(model) if isinstance(layer, nn.Linear)}
    assert names(model, linear) == {f"inside.{name}" for name in read}


def test_class_without_source_is_no_error() -> None:
    scope: dict[str, type] = {"Reader": Reader}
    exec("class Made(Reader):\n    def forward(self, x): return x @ self.proj.weight", scope)
    assert layers_read_by_parents(scope["Made"]()) == set()


class ReadsThroughLocalNames(nn.Module):
    """Names a layer, or runs through a list of layers, before it reads the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.called = nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        proj, called = self.proj, self.called
        gate = self.proj
        for expert in self.experts:
            x = x * expert.weight.norm()
        return called(x) * gate.weight.sum() + proj(x)


def test_weights_read_through_local_names_are_found() -> None:
    model = ReadsThroughLocalNames()
    assert layers_read_by_parents(model) == {model.proj, model.experts[0]}


def times_weight(x: Tensor, layer: nn.Module) -> Tensor:
    return F.linear(x, layer.weight)  # type: ignore[arg-type]


def times_weight_of_another(layer: nn.Module, *, inputs: Tensor) -> Tensor:
    return times_weight(inputs, layer)


def calls(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


class Helpers:
    @staticmethod
    def times(x: Tensor, layer: nn.Module) -> Tensor:
        return x @ layer.weight


class HandsOver(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return times_weight(calls(x, self.other), self.proj)


class HandsOverByName(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return times_weight_of_another(inputs=self.other(x), layer=self.inner.proj)


class HandsOverItself(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return of_block(self, x)


def of_block(block: Reader, x: Tensor) -> Tensor:
    return x @ block.proj.weight + block.other(x)


class HandsOverToMethods(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.other(x), layer=self.proj)

    def own(self, x: Tensor, layer: nn.Module) -> Tensor:
        return Helpers.times(x, layer)


class HasInnerFunctions(Reader):
    def forward(self, x: Tensor) -> Tensor:
        def inner(layer: nn.Module) -> Tensor:
            return x @ layer.weight

        last = lambda layer: layer.weight.sum()  # noqa: E731
        return inner(self.proj) + last(self.inner.proj) + self.other(x)


class RunsThroughLists(Reader):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.proj, self.other
        for _, layer in enumerate(self.parts):
            x = x @ layer.weight
        return first(x) + sum(one.weight.sum() for one in [second]) + getattr(self.inner.proj, "weight").sum()  # noqa: B009


class UsesPartly(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ layer.weight for layer in self.parts]).sum(0) + self.proj(x)


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (HandsOver, {"proj"}),
        (HandsOverByName, {"inner.proj"}),
        (HandsOverItself, {"proj"}),
        (HandsOverToMethods, {"proj"}),
        (HasInnerFunctions, {"proj", "inner.proj"}),
        (RunsThroughLists, {"parts.0", "parts.1", "inner.proj"}),
        (UsesPartly, {"parts.0", "parts.1"}),
    ],
)
def test_layers_read_by_functions_that_are_handed_them(make: Callable[[], Reader], read: set[str]) -> None:
    model = make()
    assert names(model, {layer for layer in layers_read_by_parents(model) if isinstance(layer, nn.Linear)}) == read
