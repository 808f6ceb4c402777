import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from rankdyna_trainer import LowRankLinear, RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups, merge

CONFIG = RankDynaConfig(rank_ratio=0.5, target_modules=".*(query|output\\.dense|c_attn)")


def keep(layer: SingularGroupLinear, rank: int) -> None:
    """Leave `rank` random groups of a layer, as training does: the others are zeros, and not cut yet."""
    remaining = torch.zeros(layer.width, dtype=torch.bool)
    remaining[torch.randperm(layer.width)[:rank]] = True
    with torch.no_grad():
        for factor in layer.factors().values():
            factor[~remaining] = 0
    layer.set_remaining(remaining)


def singular_groups(out_features: int, in_features: int, rank: int, bias: bool = True) -> SingularGroupLinear:
    full = min(out_features, in_features)
    parameter = nn.Parameter(torch.randn(out_features)) if bias else None
    layer = SingularGroupLinear(
        torch.randn(full, out_features), torch.rand(full), torch.randn(full, in_features), parameter
    )
    keep(layer, rank)
    return layer


@pytest.fixture
def trained_bert(tiny_bert: BertForSequenceClassification) -> BertForSequenceClassification:
    """Some layers at a low rank, one at rank 0, one at full rank, which costs less as one dense matrix."""
    inject_singular_groups(tiny_bert, CONFIG)
    ranks = {"0.attention.self.query": 3, "0.attention.output.dense": 0, "0.output.dense": 21}
    ranks |= {"1.attention.self.query": 16, "1.attention.output.dense": 17, "1.output.dense": 32}
    for name, rank in ranks.items():
        keep(tiny_bert.get_submodule(f"bert.encoder.layer.{name}"), rank)
    return tiny_bert


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20).reshape(2, 10)).logits


def assert_same(before: Tensor, after: Tensor) -> None:
    assert (after - before).norm() < 1e-6 * before.norm()


def test_compacted_model_computes_what_it_did_before(trained_bert: BertForSequenceClassification) -> None:
    before = logits(trained_bert)
    random_state = torch.get_rng_state()
    assert compact(trained_bert) is trained_bert
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(isinstance(module, SingularGroupLinear) for module in trained_bert.modules())
    assert_same(before, logits(trained_bert))


def test_what_each_layer_becomes(trained_bert: BertForSequenceClassification) -> None:
    """32 x 32 holds 1024 numbers, 64 in each group; 32 x 64 holds 2048, 96 in each group."""
    compact(trained_bert)
    layers = [trained_bert.bert.encoder.layer[i] for i in range(2)]
    low_rank = [
        (layers[0].attention.self.query, 3),
        (layers[0].attention.output.dense, 0),
        (layers[0].output.dense, 21),  # 2016 of 2048
        (layers[1].attention.self.query, 16),  # 1024 of 1024: as many, and still low rank
    ]
    for layer, rank in low_rank:
        assert isinstance(layer, LowRankLinear) and layer.rank == rank
    for dense in (layers[1].attention.output.dense, layers[1].output.dense):  # 1088 of 1024, 3072 of 2048
        assert type(dense) is nn.Linear


def test_ranks_are_recorded_in_the_configuration(trained_bert: BertForSequenceClassification) -> None:
    layer = "bert.encoder.layer"
    compact(trained_bert)
    assert trained_bert.config.to_dict()["rankdyna"] == {
        "ranks": {
            f"{layer}.0.attention.self.query": 3,
            f"{layer}.0.attention.output.dense": 0,
            f"{layer}.0.output.dense": 21,
            f"{layer}.1.attention.self.query": 16,
        },
        "dense": {f"{layer}.1.attention.output.dense": 17, f"{layer}.1.output.dense": 32},
    }


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_those_of_the_remaining_groups(rank: int, bias: bool) -> None:
    model = nn.Sequential(singular_groups(6, 20, rank, bias).double())
    (layer,) = model
    old_bias, order = layer.bias, layer.remaining.nonzero().flatten()
    x = torch.randn(3, 20, dtype=torch.float64)
    before = model(x)
    model.eval()
    compact(model)
    (compacted,) = model
    # 5 * 26 > 120
    assert isinstance(compacted, nn.Linear if rank == 5 else LowRankLinear)
    assert compacted.bias is old_bias
    assert not compacted.training
    assert {tensor.dtype for tensor in compacted.state_dict().values()} == {torch.float64}
    assert not any(0 in tensor.shape for tensor in compacted.state_dict().values())
    torch.testing.assert_close(model(x), before)
    if rank < 5:
        assert torch.equal(compacted.p.weight, layer.u[order].t() * layer.sigma[order])
        assert torch.equal(compacted.q.weight, layer.v[order])
        assert compacted.p.weight.is_contiguous() and compacted.q.weight.is_contiguous()
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in compacted.parameters())


def test_compacted_layer_can_be_trained_and_cast() -> None:
    model = compact(nn.Sequential(singular_groups(6, 20, 2)))
    model(torch.randn(3, 20)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.half()[0].weight.dtype == torch.float16


def test_compaction_of_the_cut_layer_is_the_same() -> None:
    layer = singular_groups(6, 20, 3)
    kept = layer.remaining
    cut = SingularGroupLinear(layer.u[kept].detach(), layer.sigma[kept].detach(), layer.v[kept].detach(), layer.bias)
    one, other = compact(nn.Sequential(layer)), compact(nn.Sequential(cut))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_shared_layer_is_compacted_once() -> None:
    layer = singular_groups(6, 6, 2)
    model = nn.ModuleDict({"first": layer, "second": nn.Sequential(layer)})
    compact(model)
    assert isinstance(model["first"], LowRankLinear)
    assert model["second"][0] is model["first"]
    merge(model)
    assert type(model["first"]) is nn.Linear
    assert model["second"][0] is model["first"]


def test_albert_is_compacted_and_merged() -> None:
    sizes = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    model = AlbertForSequenceClassification(AlbertConfig(vocab_size=64, num_attention_heads=2, **sizes)).eval()
    inject_singular_groups(model, CONFIG)
    query = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.query
    keep(query, 5)
    before = logits(model)
    assert_same(before, logits(compact(model)))
    assert model.config.rankdyna["ranks"] == {
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query": 5
    }
    assert_same(before, logits(merge(model)))


def test_merged_model_is_a_stock_model(trained_bert: BertForSequenceClassification) -> None:
    stock = copy.deepcopy(trained_bert.config)
    compact(trained_bert)
    query = trained_bert.bert.encoder.layer[0].attention.self.query
    p, q = query.p.weight.detach(), query.q.weight.detach()
    before = logits(trained_bert)
    random_state = torch.get_rng_state()
    assert merge(trained_bert) is trained_bert
    assert torch.equal(torch.get_rng_state(), random_state)

    merged = trained_bert.bert.encoder.layer[0].attention.self.query
    assert type(merged) is nn.Linear and merged.bias is query.bias
    torch.testing.assert_close(merged.weight, p @ q)
    assert_same(before, logits(trained_bert))
    assert trained_bert.config.to_dict() == stock.to_dict()
    assert not hasattr(trained_bert.config, "rankdyna")
    fresh = BertForSequenceClassification(trained_bert.config).eval()
    fresh.load_state_dict(trained_bert.state_dict())
    assert torch.equal(logits(fresh), logits(trained_bert))


def test_merged_layers_of_gpt2_are_conv1d_again() -> None:
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    keys = model.state_dict().keys()
    model.config.pad_token_id = 0
    inject_singular_groups(model, CONFIG)
    keep(model.transformer.h[0].attn.c_attn, 4)  # the other stays at full rank: dense
    before = logits(model)
    compact(model)
    assert isinstance(model.transformer.h[0].attn.c_attn, LowRankLinear)
    assert type(model.transformer.h[1].attn.c_attn) is Conv1D
    assert_same(before, logits(model))
    merge(model)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    assert model.transformer.h[0].attn.c_attn.weight.shape == (16, 48)
    assert model.state_dict().keys() == keys
    assert_same(before, logits(model))


def test_merged_model_can_be_compressed_again(tiny_bert: BertForSequenceClassification) -> None:
    trained_bert = inject_singular_groups(tiny_bert, CONFIG)
    compact(trained_bert)
    merge(trained_bert)
    inject_singular_groups(trained_bert, CONFIG)
    assert isinstance(trained_bert.bert.encoder.layer[0].attention.self.query, SingularGroupLinear)


def test_merge_when_all_layers_were_kept_dense(tiny_bert: BertForSequenceClassification) -> None:
    compact(inject_singular_groups(tiny_bert, CONFIG))
    assert not any(isinstance(module, LowRankLinear) for module in tiny_bert.modules())
    assert tiny_bert.config.rankdyna["ranks"] == {}
    merge(tiny_bert)
    assert not hasattr(tiny_bert.config, "rankdyna")


def test_config_of_a_model_inside_of_a_plain_module(trained_bert: BertForSequenceClassification) -> None:
    model = nn.ModuleDict({"encoder": trained_bert, "head": nn.Sequential(singular_groups(6, 20, 2))})
    compact(model)
    assert "bert.encoder.layer.0.attention.self.query" in trained_bert.config.rankdyna["ranks"]
    assert isinstance(model["head"][0], LowRankLinear)
    merge(model)
    assert not hasattr(trained_bert.config, "rankdyna")
    assert type(model["head"][0]) is nn.Linear


def test_model_without_target_layers_gets_no_record(tiny_bert: BertForSequenceClassification) -> None:
    compact(nn.ModuleDict({"encoder": tiny_bert, "head": nn.Sequential(singular_groups(6, 20, 2))}))
    assert not hasattr(tiny_bert.config, "rankdyna")


def test_merge_keeps_the_quantization_of_another_part(tiny_bert: BertForSequenceClassification) -> None:
    tiny_bert.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    merge(compact(nn.ModuleDict({"encoder": tiny_bert, "head": nn.Sequential(singular_groups(6, 20, 2))})))
    assert tiny_bert.config.quantization_config["quant_method"] == "bitsandbytes"


def test_nothing_to_compact_or_to_merge(tiny_bert: BertForSequenceClassification) -> None:
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification has no singular groups to compact: call inject"
    ):
        compact(tiny_bert)
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification has no low-rank layers to merge: call compact"
    ):
        merge(tiny_bert)
    inject_singular_groups(tiny_bert, CONFIG)
    with pytest.raises(ValueError, match="has no low-rank layers to merge"):
        merge(tiny_bert)
    compact(tiny_bert)
    with pytest.raises(ValueError, match="has no singular groups to compact"):
        compact(tiny_bert)


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (10, 3, 10, 3)])  # 10 groups: dense again
def test_old_layers_are_freed_on_the_way(ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Sequential(singular_groups(10, 10, rank)) for rank in ranks))
    assert surplus_layers(model, compact, SingularGroupLinear, "to_factors", monkeypatch) == [0] * 4
    assert surplus_layers(model, merge, LowRankLinear, "to_dense_weight", monkeypatch) == [0] * ranks.count(3)


def surplus_layers(
    model: nn.Module,
    change: Callable[[nn.Module], nn.Module],
    layer_class: type[nn.Module],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> list[int]:
    """How many layers are alive and no longer in the model, each time that the next one is read."""
    old = [weakref.ref(module) for module in model.modules() if isinstance(module, layer_class)]
    original = getattr(layer_class, method)
    surplus: list[int] = []

    def watched(layer: nn.Module, *args: object) -> object:
        waiting = sum(isinstance(module, layer_class) for module in model.modules())
        surplus.append(sum(reference() is not None for reference in old) - waiting)
        return original(layer, *args)

    monkeypatch.setattr(layer_class, method, watched)
    change(model)
    assert not any(reference() for reference in old)
    return surplus
