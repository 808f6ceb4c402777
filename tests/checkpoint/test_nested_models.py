"""Models with models in them: what is saved, by whatever route, is what its layers are."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import TRANSFORMERS_4
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    VisionTextDualEncoderModel,
)

from rankdyna_trainer import (
    LowRankLinear,
    RankDynaConfig,
    SingularGroupLinear,
    compact,
    inject_singular_groups,
    make_self_contained,
    merge,
)

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = LlamaConfig(vocab_size=64, num_key_value_heads=1, **SIZES)
VISION = CLIPVisionConfig(image_size=28, patch_size=14, **SIZES)


def small(model: PreTrainedModel) -> Any:
    """Compacted, with a rank of its own in each layer."""
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.3))
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, SingularGroupLinear)):
        layer.set_remaining(torch.arange(layer.width) < number % 5)
    return compact(model).eval()


def bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=64, max_position_embeddings=16, **SIZES)).eval()


def decoder() -> BertLMHeadModel:
    causal = {"is_decoder": True, "add_cross_attention": True}
    return BertLMHeadModel(BertConfig(vocab_size=64, max_position_embeddings=16, **SIZES, **causal)).eval()


def llava() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=VISION, text_config=TEXT, image_token_index=63)
    ).eval()


def clip() -> CLIPModel:
    text = CLIPTextConfig(vocab_size=64, max_position_embeddings=16, **SIZES)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=VISION.to_dict(), projection_dim=8)).eval()


def check_saved(model: nn.Module, folder: Path, loads: Any = None) -> Any:
    """What is loaded from where the model was saved, after a look at each of its tensors."""
    before = copy.deepcopy(model.config.to_dict())
    model.save_pretrained(folder)
    after = model.config.to_dict()
    assert {name: after[name] for name in before if name not in ("dtype", "architectures")} == {
        name: value for name, value in before.items() if name not in ("dtype", "architectures")
    }
    loaded = (loads or type(model)).from_pretrained(folder).eval()
    check_same(loaded, model)
    return loaded


def check_same(loaded: nn.Module, model: nn.Module) -> None:
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    low_rank = [sum(isinstance(m, LowRankLinear) for m in one.modules()) for one in (loaded, model)]
    assert low_rank[0] == low_rank[1]


@pytest.mark.parametrize("by", ["the constructor", "its folder"])
def test_a_compacted_model_becomes_a_part(by: str, tmp_path: Path) -> None:
    if by == "the constructor":
        model = EncoderDecoderModel(encoder=small(bert()), decoder=decoder())
    else:
        small(bert()).save_pretrained(tmp_path / "encoder")
        small(decoder()).save_pretrained(tmp_path / "decoder")
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    loaded = check_saved(model.eval(), tmp_path / "whole")
    again = check_saved(loaded, tmp_path / "again")
    check_saved(again.encoder, tmp_path / "part", AutoModel)
    check_saved(again.decoder, tmp_path / "other part", AutoModelForCausalLM)


def put_in_place(model: Any) -> Any:
    small(model.model.language_model)
    return model


def put_in_anew(model: Any) -> Any:
    model.model.language_model = small(LlamaModel(TEXT))
    return model


@pytest.mark.parametrize("change", [small, put_in_place, put_in_anew])
def test_parts_of_a_compacted_model_are_saved_alone(change: Callable[[Any], Any], tmp_path: Path) -> None:
    trained = change(llava())
    loaded = check_saved(trained, tmp_path / "whole")
    for number, model in enumerate((trained, loaded)):
        check_saved(model.model, tmp_path / f"base {number}", AutoModel)
        check_saved(model.model.language_model, tmp_path / f"language {number}", AutoModel)
        check_saved(model.model.vision_tower, tmp_path / f"vision {number}", CLIPVisionModel)


def test_two_compacted_models_of_different_kinds(tmp_path: Path) -> None:
    check_saved(
        VisionTextDualEncoderModel(vision_model=small(CLIPVisionModel(VISION)), text_model=small(bert())).eval(),
        tmp_path,
    )


def test_a_part_is_loaded_from_the_folder_of_the_whole(tmp_path: Path) -> None:
    model = small(clip())
    check_saved(model, tmp_path)
    for name, kind in (("text_model", CLIPTextModel), ("vision_model", CLIPVisionModel)):
        part = kind.from_pretrained(tmp_path)
        # Under transformers 4 the whole has what is inside of the part.
        check_same(getattr(part, name) if TRANSFORMERS_4 else part, getattr(model, name))


def test_a_merged_model_leaves_no_ranks_in_its_parts(tmp_path: Path) -> None:
    model = merge(EncoderDecoderModel(encoder=small(bert()), decoder=small(decoder())).eval())
    for part in (model, model.encoder, model.decoder):
        assert not hasattr(part.config, "rankdyna")
    check_saved(model.encoder, tmp_path / "part")
    check_saved(model, tmp_path / "whole")
    assert "rankdyna" not in (tmp_path / "whole" / "config.json").read_text()


@pytest.mark.parametrize("self_contained", [False, True])
def test_a_model_made_by_the_configuration_of_a_compacted_one_is_dense(self_contained: bool, tmp_path: Path) -> None:
    compacted = small(bert())
    if self_contained:
        make_self_contained(compacted)
    ranks = copy.deepcopy(compacted.config.rankdyna)
    check_saved(AutoModel.from_config(compacted.config).eval(), tmp_path / "dense", AutoModel)
    saved = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"rankdyna", "transformers_weights", "auto_map"} & saved.keys()
    assert compacted.config.rankdyna == ranks, "another model's save changed the one it shares it with"
    check_saved(compacted, tmp_path / "compacted", AutoModel)
    check_saved(AutoModelForImageTextToText.from_config(small(llava()).config).eval(), tmp_path / "composite")


def test_a_part_in_training_is_saved_without_ranks(tmp_path: Path) -> None:
    model = EncoderDecoderModel(encoder=small(bert()), decoder=decoder())
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5, target_modules=r"decoder.*query"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not any("rankdyna" in part for part in (config, config["encoder"], config["decoder"]))
    assert "running compression" in config["transformers_weights"]


def test_an_interrupted_save_leaves_the_configuration_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EncoderDecoderModel(encoder=small(bert()), decoder=decoder())
    before = copy.deepcopy(model.config.to_dict())
    monkeypatch.setattr(type(model.config), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert model.config.to_dict()["encoder"] == before["encoder"]
    assert not hasattr(model.config, "rankdyna")
