"""The ways to fine-tune and compress a model that `benchmark.py` compares."""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from rankdyna_trainer import RankDyna, RankDynaConfig, SingularGroupLinear, rank_report
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.method.budget import uniform_rank
from rankdyna_trainer.method.cutting import GroupCutting
from rankdyna_trainer.method.schedule import RankBudgetSchedule
from rankdyna_trainer.method.teaching import Teaching

from .device_time import Mark, wait
from .models import DEVICE, Batch, singular_group_layers, truncate
from .operations import Workload, compacted, in_factors, in_training


@dataclass(frozen=True)
class Run:
    """What all sides of a comparison have in common."""

    config: RankDynaConfig
    steps: int
    bf16: bool
    rows: Sequence[Batch] = ()  # what the groups are made of, if not of the weights
    backend: str | None = None  # of torch.compile, if the forward pass is compiled


class Side:
    """Dense fine-tuning, and the part of the others that is the same."""

    takes_groups = False  # whether it begins with an injected model
    compresses = False

    def __init__(self, model: Any, run: Run) -> None:
        self.model = model.train()
        self.forward: Any = model if run.backend is None else torch.compile(model, backend=run.backend)
        self.run = run
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)
        self._marks: list[list[Mark]] = []

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        wait()
        return [marks[-1].seconds_since(marks[0]) for marks in self._marks]

    @property
    def own_seconds(self) -> list[float]:
        """Of each step, what the method adds to forward, backward and optimizer."""
        wait()
        return [
            scored.seconds_since(before) + enforced.seconds_since(stepped)
            for _, before, scored, stepped, enforced, _ in self._marks
        ]

    def step(self, number: int, batch: Batch) -> None:
        """The optimizer step `number`, from 1 on. Nothing here waits for the device."""
        start = Mark()
        self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before = Mark()
        self.before_optimizer()
        scored = Mark()
        self.optimizer.step()
        stepped = Mark()
        self.after_optimizer(number)
        enforced = Mark()
        self.optimizer.zero_grad()
        self._marks.append([start, before, scored, stepped, enforced, Mark()])

    def warm_up(self, batch: Batch) -> None:
        """What only the first call of a process pays for."""
        self.backward(batch)
        self.optimizer.zero_grad()

    def backward(self, batch: Batch) -> None:
        """The gradients of a batch."""
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.run.bf16):
            loss = self.forward(**batch).loss
        loss.backward()

    def before_optimizer(self) -> None:
        """The method's work on the gradients."""

    def after_optimizer(self, step: int) -> None:
        """The method's work on the ranks."""

    def finish(self) -> None:
        """After the last step."""

    def multiply_adds(self, work: Workload) -> Callable[[], int]:
        """
        Of the next training step, as operation counts promise it: a backward pass is two forward passes. To be called
        when the device may be waited for.
        """
        return lambda: 3 * (work.dense + work.rest)

    def trained_numbers(self) -> int:
        """How many the optimizer holds."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    def bytes_held(self) -> int:
        """By parameters, and for those that are trained a gradient and Adam's two moments."""
        return sum(p.nbytes * (4 if p.requires_grad else 1) for p in self.model.parameters())


class RankDynaSide(Side):
    """As in the paper: in groups of the weights from the first step on."""

    takes_groups = compresses = True
    algorithm = RankDyna

    def __init__(self, model: Any, run: Run) -> None:
        super().__init__(model, run)
        self.first_in_groups = 1 if self.takes_groups else 0  # the step, once it is known
        compiled = run.backend is not None
        self.rankdyna = self.algorithm(
            model, run.config, self.optimizer, run.steps, compiled=compiled, **self.observed()
        )

    def observed(self) -> dict[str, Any]:
        """What the groups are made of, if not of the weights."""
        return {}

    def before_optimizer(self) -> None:
        self.rankdyna.update_importance()

    def after_optimizer(self, step: int) -> None:
        self.rankdyna.enforce_budget(step)
        if not self.first_in_groups and singular_group_layers(self.model):
            self.first_in_groups = step + 1

    def finish(self) -> None:
        self.rankdyna.finish(self.run.steps)

    def multiply_adds(self, work: Workload) -> Callable[[], int]:
        layers = singular_group_layers(self.model)
        if not layers:
            return super().multiply_adds(work)
        # Not by `rank`, which waits for the device and is kept: the next step would be spared that.
        remaining, widths = torch.cat([layer.remaining for layer in layers]), [layer.width for layer in layers]

        def promised() -> int:
            ranks = [int(mask.sum()) for mask in torch.split(remaining.cpu(), widths)]
            return 3 * (work.of_targets(in_training, ranks) + work.rest)

        return promised


class DenseFirstSide(RankDynaSide):
    """As a `Trainer` does it by default: dense in the warm-up, then in groups in the metric of 512 rows."""

    takes_groups = False

    def observed(self) -> dict[str, Any]:
        return {"batches": self.run.rows}


class TaughtSide(DenseFirstSide):
    """The same, taught by a model of the same sizes."""

    def __init__(self, model: Any, run: Run) -> None:
        super().__init__(model, run)
        self.teaching = Teaching(model, copy.deepcopy(model).eval().requires_grad_(False), run.config)

    def finish(self) -> None:
        self.teaching.release()
        super().finish()

    def multiply_adds(self, work: Workload) -> Callable[[], int]:
        of_student = super().multiply_adds(work)
        return lambda: of_student() + work.dense + work.rest


class _NoCutting(GroupCutting):
    def cut(self, layers: Sequence[SingularGroupLinear], at_the_end: bool) -> None:
        pass


class _UncutRankDyna(RankDyna):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._cutting = _NoCutting(self.optimizer, held=False, compiled=False)


class _FactorsOnly(SingularGroupLinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v) * self.sigma, self.u.t(), self.bias)


class MaskedSide(RankDynaSide):
    """The naive way: removed groups are zeros that stay in the tensors, and every forward pass uses the factors."""

    algorithm = _UncutRankDyna

    def __init__(self, model: Any, run: Run) -> None:
        for layer in singular_group_layers(model):
            layer.__class__ = _FactorsOnly
        super().__init__(model, run)

    def multiply_adds(self, work: Workload) -> Callable[[], int]:
        widths = [layer.width for layer in singular_group_layers(self.model)]
        return lambda: 3 * (work.of_targets(in_factors, widths) + work.rest)


class TwoRoundSide(Side):
    """The second round: fine-tuning after a plain SVD. The first is that of the dense side."""

    takes_groups = compresses = True

    def __init__(self, model: Any, run: Run) -> None:
        super().__init__(truncate(model, run.config), run)

    def multiply_adds(self, work: Workload) -> Callable[[], int]:
        return lambda: 3 * (work.of_targets(compacted, rank_report(self.model)["rank"].tolist()) + work.rest)


class AdaLoraSide(Side):
    """AdaLoRA beside the frozen weights: from 1.5 times the mean rank of plain SVD down to that, as in its paper."""

    def __init__(self, model: Any, run: Run) -> None:
        targets = find_targets(model, run.config)
        ranks = [uniform_rank(run.config, *dense_weight(layer).shape) for layer in targets.values()]
        final = max(1, round(statistics.mean(ranks)))
        self.initial_rank = max(2, round(1.5 * final))
        schedule = RankBudgetSchedule.of(run.config, run.steps)
        adapter = AdaLoraConfig(
            task_type="SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM",
            target_modules=list(targets),
            init_r=self.initial_rank,
            target_r=final,
            tinit=schedule.warmup_steps,
            tfinal=schedule.cooldown_steps,
            total_step=run.steps,
        )
        super().__init__(get_peft_model(model, adapter), run)

    def after_optimizer(self, step: int) -> None:
        self.model.base_model.update_and_allocate(step)

    def multiply_adds(self, work: Workload) -> Callable[[], int]:
        # Frozen weights get no gradient: one of the three products is left out.
        adapters = work.of_targets(in_factors, [self.initial_rank] * len(work.layers))
        return lambda: 2 * (work.dense + work.rest) + 3 * adapters


SIDES: dict[str, type[Side]] = {
    "dense": Side,
    "rankdyna": RankDynaSide,
    "dense-first": DenseFirstSide,
    "taught": TaughtSide,
    "masked": MaskedSide,
    "adalora": AdaLoraSide,
    "two-round": TwoRoundSide,
}
