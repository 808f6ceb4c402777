"""Weight decay shrinks the weight that a layer stands for as it would shrink that weight itself."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from pytorch_optimizer import AdaBound, ScheduleFreeAdamW
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rankdyna_trainer import LowRankLinear, RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups
from rankdyna_trainer.layers import weight_decay

STEPS = 10
LR = DECAY = 0.1


class Union(Optimizer):
    """Two optimizers behind one face, as those have it that Muon takes only matrices of."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([{"params": [nn.Parameter(torch.zeros(1))]}], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def muon(parameters: Iterable[nn.Parameter]) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon yet")
    parameters = list(parameters)
    matrices = torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=LR, weight_decay=DECAY)
    return Union(matrices, AdamW([p for p in parameters if p.ndim != 2], lr=LR, weight_decay=DECAY))


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=LR, weight_decay=DECAY),
    "adamw fused": lambda parameters: AdamW(parameters, lr=LR, weight_decay=DECAY, fused=True),
    "sgd": lambda parameters: SGD(parameters, lr=LR, weight_decay=DECAY),
    "sgd nesterov": lambda parameters: SGD(parameters, lr=LR, weight_decay=DECAY, momentum=0.9, nesterov=True),
    "adafactor": lambda parameters: Adafactor(parameters, lr=LR, weight_decay=DECAY),
    "lion": lambda parameters: Lion(parameters, lr=LR, weight_decay=DECAY),
    "schedule-free": lambda parameters: ScheduleFreeAdamW(parameters, lr=LR, weight_decay=DECAY),
    "muon": muon,
    "a number by group": lambda parameters: AdaBound(parameters, lr=LR, weight_decay=DECAY, weight_decouple=True),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 20)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.blocks]).sum()


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = Model().double()
    in_groups = inject_singular_groups(copy.deepcopy(dense), RankDynaConfig(rank_ratio=0.5))
    for layer in in_groups.modules():
        if isinstance(layer, SingularGroupLinear):
            layer.set_remaining(torch.arange(12) < 4)
            for factor in layer.factors().values():
                factor.data[4:] = 0
    return {"dense": dense, "in groups": in_groups, "compacted": compact(copy.deepcopy(in_groups))}


def norms(model: nn.Module) -> Tensor:
    layers: list[Any] = [block[0] for block in model.blocks]
    weights = [layer.weight if isinstance(layer, nn.Linear) else layer.to_dense_weight() for layer in layers]
    return torch.stack([weight.detach().norm() for weight in weights])


def train(model: nn.Module, optimizer: Optimizer, steps: int = STEPS) -> Tensor:
    """How much of the norms is left after some steps whose gradients are zero."""
    before = norms(model)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return norms(model) / before


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_target_decays_as_the_dense_layer_would(make: Callable[[Any], Optimizer]) -> None:
    found = {name: train(model, make(model.parameters())) for name, model in models().items()}
    assert (found["dense"] < 0.95).all()
    torch.testing.assert_close(found["in groups"], found["dense"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["compacted"], found["dense"], rtol=1e-6, atol=0)


def test_the_optimizer_shows_nothing_of_it() -> None:
    """Not to its scheduler, nor in its state: the groups are those that the user made."""
    model = models()["in groups"]
    optimizer = AdamW([{"params": list(model.parameters()), "lr": 0.2}], lr=LR, weight_decay=DECAY)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    shape = [list(group["params"]) for group in optimizer.param_groups]
    left = train(model, optimizer, 1)
    scheduler.step()
    left *= train(model, optimizer, 1)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [list(map(id, shape[0]))]
    assert optimizer.param_groups[0]["weight_decay"] == DECAY
    assert len(optimizer.state) == len(shape[0]), "a parameter was left out, or has two states"
    torch.testing.assert_close(left, torch.full_like(left, (1 - 0.2 * DECAY) * (1 - 0.1 * DECAY)))


def test_what_a_step_notes_is_kept() -> None:
    model = models()["in groups"]
    optimizer = ScheduleFreeAdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    train(model, optimizer, 3)
    assert optimizer.param_groups[0]["step"] == 3

    class Counting(AdamW):
        taken = 0

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.taken += 1

    optimizer = Counting(model.parameters(), lr=LR, weight_decay=DECAY)
    train(model, optimizer, 3)
    assert optimizer.taken == 3 and vars(optimizer).keys() == vars(Counting(model.parameters())).keys() | {"taken"}


def test_a_step_that_fails_leaves_the_groups_as_they_were() -> None:
    model = models()["in groups"]
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert len(optimizer.param_groups) == 1
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, before))


@pytest.mark.parametrize("kind", ["in groups", "compacted"])
def test_a_factor_that_is_trained_alone_decays(kind: str) -> None:
    model = models()[kind]
    for layer in model.modules():
        if isinstance(layer, SingularGroupLinear):
            layer.u.requires_grad_(False)
            layer.sigma.requires_grad_(False)
        elif isinstance(layer, LowRankLinear):
            layer.p.weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim == 2]
    left = train(model, SGD(trained, lr=LR, weight_decay=DECAY), 1)
    torch.testing.assert_close(left, torch.full_like(left, 1 - LR * DECAY))


@pytest.mark.parametrize("kind", ["in groups", "compacted"])
def test_copies_and_files_decay_as_well(kind: str) -> None:
    original = models()[kind]
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        left = train(copied, SGD(copied.parameters(), lr=LR, weight_decay=DECAY), 1)
        torch.testing.assert_close(left, torch.full_like(left, 1 - LR * DECAY))


def test_nothing_is_held() -> None:
    gc.collect()
    before = len(weight_decay._layers)
    kept = models()
    assert len(weight_decay._layers) > before
    del kept
    gc.collect()
    assert len(weight_decay._layers) == before
