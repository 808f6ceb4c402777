"""What `device_map` does to layers, and who refuses it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from support.networks import FalconLinear
from torch import nn
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.baselines import fwsvd, svd, tfwsvd, whitened_svd
from rankdyna_trainer.baselines.fisher import fisher_information
from rankdyna_trainer.layers.offloaded import device_of, has_own_forward, ties_kept
from rankdyna_trainer.layers.targets import find_targets

Batch = dict[str, torch.Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.3)
REFUSED = (
    r'Its device_map has bert\.embeddings\.word_embeddings offloaded, and only svd, whitened_svd with .*"local".* '
    r"Training needs all .*: load the model without device_map\. If there is no room .* smaller first"
)


@pytest.fixture
def offloaded(tiny_bert: BertForSequenceClassification) -> nn.Module:
    return cpu_offload(tiny_bert, torch.device("cpu"))


@pytest.mark.parametrize("use", ["inject", "fwsvd", "tfwsvd", "global", "fisher"])
def test_all_that_trains_or_runs_backwards_refuses(use: str, offloaded: nn.Module, batch: Batch) -> None:
    uses: dict[str, Callable[[], object]] = {
        "inject": lambda: inject_singular_groups(offloaded, CONFIG),
        "fwsvd": lambda: fwsvd(offloaded, CONFIG, [batch]),
        "tfwsvd": lambda: tfwsvd(offloaded, CONFIG, [batch]),
        "global": lambda: whitened_svd(offloaded, CONFIG, [batch], "global"),
        "fisher": lambda: fisher_information(offloaded, find_targets(offloaded, CONFIG), [batch]),
    }
    with pytest.raises(ValueError, match=REFUSED):
        uses[use]()


@pytest.mark.parametrize("group_basis", [None, "weights"])
def test_a_trainer_with_the_callback_says_so_when_it_is_made(
    group_basis: str | None,
    tiny_bert: BertForSequenceClassification,
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    """The `Trainer` itself trains a model that is offloaded in part, and leaves those layers as they are."""
    tiny_bert.save_pretrained(tmp_path / "dense")
    in_memory = ["bert.embeddings", "bert.encoder.layer.0", "bert.pooler", "classifier"]
    places = dict.fromkeys(in_memory, "cpu") | {"bert.encoder.layer.1": "disk"}
    model = type(tiny_bert).from_pretrained(tmp_path / "dense", device_map=places)
    config = RankDynaConfig(rank_ratio=0.3, group_basis=group_basis)
    with pytest.raises(ValueError, match=r"has bert\.encoder\.layer\.1\.attention\.self\.query offloaded"):
        make_trainer(model, RankDynaCallback(config))


def test_a_model_on_several_devices_is_not_trained(tiny_bert: BertForSequenceClassification) -> None:
    spread = dispatch_model(tiny_bert, {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match="Its device_map spreads the model over devices, and only svd"):
        inject_singular_groups(spread, CONFIG)
    svd(spread, CONFIG)


def test_a_class_with_another_forward_is_tried_with_its_weights() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Sequential(FalconLinear(8, 8)), nn.Sequential(FalconLinear(8, 8))]))
    cpu_offload(model, torch.device("cpu"))
    assert list(find_targets(model, CONFIG)) == ["0.0.0", "0.1.0"]


def test_a_forward_of_its_own_below_that_of_accelerate() -> None:
    plain, wrapped = nn.Linear(4, 4), nn.Linear(4, 4)
    wrapped.forward = lambda x: 2 * x  # type: ignore[method-assign]
    model = cpu_offload(nn.Sequential(plain, wrapped), torch.device("cpu"))
    assert [has_own_forward(layer) for layer in model] == [False, True]


def test_device_of() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
    assert device_of(model) == torch.device("cpu")
    assert device_of(model.to("meta")) == torch.device("meta")
    assert device_of(cpu_offload(nn.Sequential(nn.Linear(4, 4)), torch.device("cpu"))) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(4, affine=False)) == torch.device("cpu")


def test_ties_are_kept() -> None:
    """Accelerate leaves another tensor without values in each of the layers that it brings in."""
    model = cpu_offload(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.device("cpu"))
    model[1].weight = model[0].weight
    with ties_kept(model):
        model(torch.ones(1, 4))
        assert model[0].weight is not model[1].weight
    assert model[0].weight is model[1].weight
