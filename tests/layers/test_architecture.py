import pytest
from support.networks import model_of, names
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rankdyna_trainer.layers.architecture import block_prefixes, module_places, output_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)


class NormBlock(nn.Module):
    """A block without a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)


class Base(PreTrainedModel):
    config_class = PretrainedConfig
    base_model_prefix = "base"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.pooler = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])


class WithHead(PreTrainedModel):
    """A head that is a stack of blocks itself, as of some detectors."""

    config_class = PretrainedConfig
    base_model_prefix = "base"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.base = Base(config)
        self.head_blocks = nn.ModuleList([Block(), Block()])


class Ensemble(PreTrainedModel):
    """A base model inside of a container, which is no head."""

    config_class = PretrainedConfig
    base_model_prefix = "base"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.base = Base(config)
        self.others = nn.ModuleDict({"second": WithHead(config)})


def small_bert(**options: bool) -> BertConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(vocab_size=8, **sizes, **options)


def test_places_of_a_shared_module() -> None:
    shared = nn.Linear(4, 4)
    model = model_of(first=model_of(a=shared, b=nn.Linear(4, 4)), second=model_of(c=shared))
    places = module_places(model)
    assert places[shared] == [(model.first, "a"), (model.second, "c")]
    assert places[model.first.b] == [(model.first, "b")]
    assert model not in places


def test_places_skip_a_submodule_that_is_none() -> None:
    model = model_of(a=nn.Linear(4, 4))
    model.register_module("absent", None)
    assert module_places(model).keys() == {model.a}


@pytest.mark.parametrize(
    ("model", "prefixes"),
    [
        (model_of(blocks=nn.ModuleList([Block(), Block()]), out=nn.Linear(4, 4)), ("blocks.",)),
        (model_of(blocks=nn.ModuleList([Block()])), ("blocks.",)),
        (
            model_of(
                encoder=model_of(layers=nn.ModuleList([Block()])), decoder=model_of(layers=nn.ModuleList([Block()]))
            ),
            ("encoder.layers.", "decoder.layers."),
        ),
        # nested: the outermost one
        (
            model_of(stages=nn.ModuleList([model_of(blocks=nn.ModuleList([Block()]), merge=nn.Linear(4, 4))])),
            ("stages.",),
        ),
        (model_of(groups=nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([Block()])])), ("groups.",)),
        # the model itself is the stack
        (nn.ModuleList([Block(), Block()]), ("",)),
        # some blocks have no linear layer
        (model_of(blocks=nn.ModuleList([NormBlock(), Block(), NormBlock()])), ("blocks.",)),
        (model_of(blocks=nn.Sequential(Block(), Block())), ("blocks.",)),
        # lists of heads, and other lists
        (model_of(heads=nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])), ()),
        (model_of(norms=nn.ModuleList([NormBlock(), NormBlock()])), ()),
        (model_of(empty=nn.ModuleList()), ()),
        (model_of(mlp=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), ()),
        (model_of(mixed=nn.Sequential(Block(), NormBlock())), ()),
        (model_of(one=nn.Sequential(Block())), ()),
        (nn.Linear(4, 4), ()),
        # a name that only begins like the stack's
        (model_of(b=nn.ModuleList([Block()]), b2=nn.ModuleList([Block()])), ("b.", "b2.")),
    ],
)
def test_stacks_of_blocks(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    assert block_prefixes(model) == prefixes


def test_a_block_that_was_replaced_by_the_identity() -> None:
    assert block_prefixes(model_of(blocks=nn.ModuleList([Block(), nn.Identity(), Block()]))) == ("blocks.",)


def test_heads_of_different_depth_are_no_stack() -> None:
    heads = [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))]
    assert block_prefixes(model_of(heads=nn.ModuleList(heads))) == ()


def test_blocks_of_bert(tiny_bert: BertForSequenceClassification) -> None:
    assert block_prefixes(tiny_bert) == ("bert.encoder.layer.",)
    assert block_prefixes(tiny_bert.bert) == ("encoder.layer.",)


def test_stack_of_a_head_is_not_a_stack_of_blocks() -> None:
    model = WithHead(PretrainedConfig())
    assert block_prefixes(model) == ("base.blocks.",)
    assert block_prefixes(model_of(model=model)) == ("model.base.blocks.",)
    assert block_prefixes(model.base) == ("blocks.",)


def test_head_is_all_outside_of_the_base_model() -> None:
    model = WithHead(PretrainedConfig())
    heads = {"head_blocks", *(f"head_blocks.{i}{part}" for i in range(2) for part in ("", ".proj"))}
    assert names(model, output_layers(model)) == heads
    assert output_layers(model.base) == set()


def test_container_around_a_base_model_is_no_head() -> None:
    model = Ensemble(PretrainedConfig())
    assert not names(model, output_layers(model)) & {"others", "others.second", "others.second.base"}


def test_output_layers_of_real_models(tiny_bert: BertForSequenceClassification) -> None:
    assert names(tiny_bert, output_layers(tiny_bert)) == {"dropout", "classifier"}
    masked = BertForMaskedLM(small_bert())
    assert {"cls.predictions.transform.dense", "cls.predictions.decoder"} <= names(masked, output_layers(masked))
    assert not any(name.startswith("bert") for name in names(masked, output_layers(masked)))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    assert names(gpt2, output_layers(gpt2)) == {"lm_head"}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert t5.base_model is t5
    assert names(t5, output_layers(t5)) == {"lm_head"}


def test_model_of_two_models_has_the_blocks_of_both() -> None:
    decoder = small_bert(is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(small_bert(), decoder))
    assert block_prefixes(model) == ("encoder.encoder.layer.", "decoder.bert.encoder.layer.")
    assert {"decoder.cls.predictions.transform.dense"} <= names(model, output_layers(model))
    assert not any(".layer." in name for name in names(model, output_layers(model)))
