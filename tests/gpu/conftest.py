"""Runs on a CUDA device, for `make test-gpu`; where there is none they are skipped."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.gpu_processes import BASES, WRAPPERS, Started
from support.on_gpu import logged
from transformers import Trainer

from rankdyna_trainer import SingularGroupLinear, rank_report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Started]]:
    """The runs under torchrun, by wrapper and basis of the groups."""
    folder = tmp_path_factory.mktemp("processes")
    runs = {
        (wrapper, basis): Started(folder / f"{wrapper}-{basis}", WRAPPERS[wrapper] | BASES[basis])
        for wrapper in WRAPPERS
        for basis in BASES
    }
    yield runs
    for run in runs.values():
        run.stop()


@pytest.fixture(scope="session", autouse=True)
def start_early(request: pytest.FixtureRequest) -> None:
    """Most of their time is the start of Python and of NCCL: it passes while other tests run."""
    if any("started" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("started")


@pytest.fixture
def make_trainer(make_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """As in all tests, but on the device that a `Trainer` finds by itself."""
    return functools.partial(make_trainer, use_cpu=False)


@pytest.fixture
def check_compressed(device: torch.device) -> Callable[[Trainer], None]:
    """Checks that a finished run on the device met a `rank_ratio` of 0.2, and that its folder has the same weights."""

    def check(trainer: Trainer) -> None:
        assert not any(isinstance(module, SingularGroupLinear) for module in trainer.model.modules())
        assert {parameter.device.type for parameter in trainer.model.parameters()} == {device.type}
        report = rank_report(trainer.model)
        groups = int(report[["out_features", "in_features"]].min(axis=1).sum())
        ranks = report["rank"].tolist()
        assert sum(ranks) == math.ceil(0.2 * groups), f"of {groups} groups remain {sum(ranks)}: {ranks}"
        losses = logged(trainer, "loss")
        assert losses and all(map(math.isfinite, losses)), f"losses: {losses}"
        loaded = type(trainer.model).from_pretrained(trainer.args.output_dir, dtype=trainer.model.dtype).state_dict()
        own = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
        assert own.keys() == loaded.keys()
        different = [name for name in own if not torch.equal(own[name], loaded[name])]
        assert not different, f"weights that are not loaded as they were: {different}"

    return check


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled is left, and no precision: training arguments that compile leave theirs to all that follows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    precision = getattr(torch.backends, "fp32_precision", None)  # of torch 2.9 and later
    yield
    if precision is not None:
        torch.backends.fp32_precision = precision
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
