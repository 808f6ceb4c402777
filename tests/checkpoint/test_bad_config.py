"""A `config.json` edited by hand, or by an attacker: refused by an error of ours, or without effect."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.damage import (
    KEY,
    TRANSFORMERS_4,
    Case,
    all_of,
    compacted,
    config,
    edited_config,
    fingerprint,
    no_ranks,
    pickled,
    rank,
    record,
    unlisted,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

INPUT = torch.arange(2, 22).reshape(2, 10)
NO_MAPPING = r"ranks must be a mapping from layer names to ranks, got "
NO_RANK = rf"the rank of layer {KEY} must be a whole number of at least 0, got "
UNLISTED = r"\.weight is compressed in the file, but config\.json does not list its layer"
NAMES = [
    "../../x",
    "/etc/passwd",
    "__class__",
    "",
    "bert..x",
    "a" * 10_000,
    "config",
    "dummy_inputs",
    "bert.encoder",
    "bert.embeddings.word_embeddings",
    f"{KEY}.weight",
]


def no_layer(name: str) -> str:
    return (
        rf"lists the compressed layer {name:.200}, which a \w+ of this .*load the checkpoint with the class that saved"
    )


CASES = [
    Case("config.json", "more-layers", config(num_hidden_layers=3), r"has no weights for bert\.encoder\.layer\.2"),
    Case("config.json", "fewer-layers", config(num_hidden_layers=1), no_layer(r"bert\.encoder\.layer\.1.*")),
    Case("config.json", "no-layers", config(num_hidden_layers=0), no_layer(r"bert\.encoder\.layer\.0.*")),
    Case("config.json", "hidden-size", config(hidden_size=64), r"should be \(64, 3\), but it is \(32, 3\)"),
    Case("config.json", "hidden-size-10^6", config(hidden_size=10**6), r"should be \(1000000, 3\)"),
    Case(
        "config.json",
        "intermediate-size",
        config(intermediate_size=65),
        r"output\.dense has rank 3, .* \(3, 65\), but it is \(3, 64\)",
    ),
    Case("config.json", "vocab-size", config(vocab_size=10**10), r"\(64, 32\) in the file, but \(10000000000, 32\)"),
    Case(
        "config.json", "positions", config(max_position_embeddings=10**5), r"position_embeddings\.weight is \(32, 32\)"
    ),
    Case(
        "config.json",
        "vocab-size-ignored",
        config(vocab_size=70),
        r"word_embeddings\.weight is \(64, 32\) in the file",
        {"ignore_mismatched_sizes": True},
    ),
    Case("ranks", "absent", no_ranks, f"{NO_MAPPING}None"),
    *(
        Case("ranks", f"are-{value!r:.20}", record(ranks=value), NO_MAPPING)
        for value in (None, [], [[KEY, 3]], "x" * 10**5, 3, True)
    ),
    *(Case("ranks", f"dense-are-{value!r}", record(dense=value), NO_MAPPING) for value in ([], "x", 0)),
    *(
        Case("ranks", f"is-{value!r:.20}", rank(KEY, value), NO_RANK)
        for value in (None, -1, -(10**30), 3.0, float("nan"), float("inf"), True, "3", [3], {"rank": {"rank": 3}})
    ),
    Case("ranks", "10^12", rank(KEY, 10**12), rf"{KEY} has rank 1000000000000, but its weight has at most 32 groups"),
    Case(
        "ranks", "dense-10^12", record(dense={"classifier": 10**12}), "classifier has rank 1000000000000, .*at most 2"
    ),
    Case("ranks", "other", rank(KEY, 4), rf"layer {KEY} has rank 4, .*different checkpoints"),
    *(Case("ranks", f"of-{name!r:.30}", rank(name, 3), no_layer(name)) for name in NAMES),
    *(Case("ranks", f"dense-of-{name!r:.30}", record(dense={name: 3}), no_layer(name)) for name in NAMES[:3]),
    *(
        Case("ranks", f"of-{name!r:.30}-for-{load.__name__}", rank(name, 3), no_layer(name), load=load)
        for name in NAMES[:5]
        for load in (AutoModel, AutoModelForMaskedLM)
    ),
    Case("ranks", "of-a-dense-layer", rank("bert.pooler.dense", 3), r"weight should be \(2,\), but it is \(32, 32\)"),
    Case("ranks", "twice", rank(KEY.removeprefix("bert."), 3), rf"lists the layer {KEY.removeprefix('bert.')} twice"),
    Case("ranks", "and-dense", record(dense={KEY: 3}), rf"lists the layer {KEY} twice"),
    Case("ranks", "without-a-layer", unlisted(KEY), KEY + UNLISTED),
    Case(
        "ranks", "without-a-layer-for-AutoModel", unlisted(KEY), KEY.removeprefix("bert.") + UNLISTED, load=AutoModel
    ),
    Case("ranks", "empty", record(ranks={}, dense={}), UNLISTED),
]
if TRANSFORMERS_4:  # it allocates all that config.json says, for a moment, before our code is asked
    CASES = [case for case in CASES if case.name not in ("hidden-size-10^6", "vocab-size")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_config_is_refused_and_nothing_is_written(
    case: Case, checkpoint: Path, assert_refused: Callable[[Callable[[], object], type[Exception], str], None]
) -> None:
    case.damage(checkpoint)
    before = fingerprint(checkpoint.parent)
    assert_refused(lambda: case.load.from_pretrained(checkpoint, **case.options), ValueError, case.message)
    assert fingerprint(checkpoint.parent) == before


def test_a_tied_layer_is_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    compacted(model).save_pretrained(tmp_path)
    rank("lm_head", 3)(tmp_path)
    with pytest.raises(ValueError, match="lists the layer lm_head, whose weight is tied to another"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def remote_code(folder: Path) -> None:
    (folder / "modeling_x.py").write_text(f"open({str(folder.parent / 'opened')!r}, 'w')\n")
    config(auto_map={"AutoModelForSequenceClassification": "modeling_x.X"})(folder)


HARMLESS = {
    "class": record(original_class="os.system", quantizer_class="subprocess.Popen"),
    "modules": record(modules_to_import=["antigravity"], modules_to_not_convert=["../../x"], dequantize=True),
    "self": record(self="x", _="y", kwargs={"cls": 1}),
    "file": record(output_dir="../opened", save_directory="../opened", factorization_cache="../opened"),
    "auto_map": remote_code,
    "quantization": config(quantization_config={"quant_method": "x"}),
    "pickle": all_of(pickled("pytorch_model.bin"), pickled("model.pt"), pickled("training_args.bin")),
}


@pytest.mark.parametrize("entries", HARMLESS)
def test_entries_of_others_do_nothing(entries: str, checkpoint: Path, small: nn.Module) -> None:
    HARMLESS[entries](checkpoint)
    before = fingerprint(checkpoint.parent)
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        assert torch.equal(loaded(INPUT).logits, small(INPUT).logits)
    assert fingerprint(checkpoint.parent) == before
    assert set(loaded.config.rankdyna) == {"ranks", "dense"} and not hasattr(loaded.config, "quantization_config")


REFUSED_NAME = ValueError if TRANSFORMERS_4 else OSError
BEFORE_OUR_CODE = {
    "no-such-folder": (lambda folder: None, "elsewhere", REFUSED_NAME, "elsewhere"),
    "config-no-json": (lambda folder: (folder / "config.json").write_text("{"), "", OSError, r"config\.json"),
    "config-missing": (lambda folder: (folder / "config.json").unlink(), "", (OSError, ValueError), "config"),
    "weights-missing": (lambda folder: (folder / "model.safetensors").unlink(), "", OSError, r"model\.safetensors"),
    "no-ranks": (
        edited_config(lambda config: config.pop("rankdyna")),
        "",
        ValueError,
        "compressed with rankdyna-trainer",
    ),
}


@pytest.mark.parametrize("case", BEFORE_OUR_CODE, ids=lambda case: f"before our code-{case}")
def test_what_transformers_refuses_before_our_code_runs(case: str, checkpoint: Path) -> None:
    damage, path, exception, message = BEFORE_OUR_CODE[case]
    damage(checkpoint)
    before = fingerprint(checkpoint.parent)
    with pytest.raises(exception, match=message):
        AutoModelForSequenceClassification.from_pretrained(checkpoint / path, local_files_only=True)
    assert fingerprint(checkpoint.parent) == before


def test_new_parameters_of_another_head_or_option_are_allowed(checkpoint: Path, tmp_path: Path) -> None:
    ids = {"num_labels": 5, "ignore_mismatched_sizes": True}
    assert AutoModelForSequenceClassification.from_pretrained(checkpoint, **ids).classifier.out_features == 5
    assert AutoModelForTokenClassification.from_pretrained(checkpoint, **ids).classifier.out_features == 5
    crossed = BertLMHeadModel.from_pretrained(checkpoint, is_decoder=True, add_cross_attention=True)
    assert crossed.bert.encoder.layer[1].crossattention.self.query.weight.isfinite().all()
    AutoModelForMaskedLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "without a pooler")
    assert BertModel.from_pretrained(tmp_path / "without a pooler").pooler.dense.weight.isfinite().all()


def test_parameters_that_are_never_saved_or_come_with_an_option_are_allowed(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
    marian = MarianMTModel(MarianConfig(vocab_size=96, decoder_vocab_size=96, **sizes, **heads))
    compacted(marian).save_pretrained(tmp_path / "marian")
    MarianMTModel.from_pretrained(tmp_path / "marian")

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    speech = Wav2Vec2Config(mask_time_prob=0.0, mask_feature_prob=0.0, **sizes, **convolutions, **positions)
    compacted(Wav2Vec2Model(speech)).save_pretrained(tmp_path / "speech")
    loaded = Wav2Vec2Model.from_pretrained(tmp_path / "speech", mask_time_prob=0.05)
    assert loaded.masked_spec_embed.isfinite().all()
