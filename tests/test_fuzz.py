"""Random input: it is used, or refused by an error of ours, and no file of the user is changed."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.damage import REFUSED_BY_READER, compacted, fingerprint, raised_by
from transformers import BertConfig, BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.config_file import CONFIG_NAME

INPUT = torch.arange(2, 22).reshape(2, 10)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 10**5000, -(10**5000), 0, 1, 2**63, 5e-324, float("nan"), float("inf")]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=10,
)
PATTERNS = st.one_of(
    st.text(st.sampled_from(r"()[]{}*+?.\|^$ab19-,:=!<P"), max_size=12),
    st.sampled_from(["(" * 10_000, "a{99999999999}", "(?P<x>a)(?P=y)", "\ud800", "[" * 1000]),
    st.lists(st.one_of(st.text(max_size=5), st.none(), st.integers(), st.binary(max_size=3)), max_size=3),
    st.sets(st.one_of(st.text(max_size=5), st.none(), st.integers()), max_size=3),
)
VALUES = st.one_of(NUMBERS, JSON, PATTERNS, st.binary(max_size=8), st.complex_numbers(), st.decimals(), st.fractions())
FIELDS = [field.name for field in fields(RankDynaConfig)]
TEXTS = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5).map(lambda values: json.dumps(values).encode()),
    st.tuples(st.sampled_from(["[", '{"a":', '{"rank_ratio":[']), st.integers(1, 10**5)).map(
        lambda nested: (nested[0] * nested[1]).encode()
    ),
    st.integers(4000, 5000).map(
        lambda digits: b'{"rank_ratio": 0.%s, "rank_update_interval": %s}' % ((b"1" * digits,) * 2)
    ),
)
fuzz = settings(max_examples=150, deadline=None)


def used_or_refused(action: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """What the action returns; none if it is refused."""
    try:
        return action()
    except Exception as error:
        if not isinstance(error, REFUSED_BY_READER):
            assert type(error) in refusals and raised_by(error) == "rankdyna_trainer", repr(error)
        assert 20 < len(str(error)) < 3000
        return None


@fuzz
@given(values=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), ratio=st.sampled_from([0.2, 1, None]))
def test_config(values: dict[str, Any], ratio: float | None) -> None:
    values = values if ratio is None else {"rank_ratio": ratio} | values
    config = used_or_refused(lambda: RankDynaConfig(**values), TypeError, ValueError)
    if config is not None:
        assert RankDynaConfig(**json.loads(json.dumps(config.to_dict()))) == config


@fuzz
@given(content=TEXTS)
@example(b'{"rank_ratio": 0.2}')
def test_config_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_NAME).write_bytes(content)
        before = fingerprint(Path(folder))
        config = used_or_refused(lambda: RankDynaConfig.from_pretrained(folder), ValueError)
        assert fingerprint(Path(folder)) == before
    assert config is None or isinstance(config, RankDynaConfig)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    folder = tmp_path_factory.mktemp("compacted")
    compacted(model).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits_of(files: dict[str, bytes]) -> torch.Tensor | None:
    """What the model of a checkpoint computes; none if it is refused."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "saved"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        before = fingerprint(Path(parent))
        model = used_or_refused(lambda: BertForSequenceClassification.from_pretrained(folder), ValueError)
        assert fingerprint(Path(parent)) == before
    if model is None:
        return None
    with torch.no_grad():
        return model(INPUT).logits


def header_size(weights: bytes) -> int:
    return 8 + int.from_bytes(weights[:8], "little")


@fuzz
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), in_header=st.booleans())
def test_flipped_byte(files: dict[str, bytes], place: float, flip: int, in_header: bool) -> None:
    weights = bytearray(files["model.safetensors"])
    weights[int(place * (header_size(weights) if in_header else len(weights)))] ^= flip
    logits = logits_of(files | {"model.safetensors": bytes(weights)})
    if logits is not None and weights[header_size(weights) :] == files["model.safetensors"][header_size(weights) :]:
        assert torch.equal(logits, logits_of(files))


@settings(fuzz, max_examples=50)
@given(place=st.floats(0, 1), inserted=st.binary(max_size=20), removed=st.integers(0, 20))
def test_other_length(files: dict[str, bytes], place: float, inserted: bytes, removed: int) -> None:
    weights = files["model.safetensors"]
    offset = int(place * len(weights))
    edited = weights[:offset] + inserted + weights[offset + removed :]
    logits = logits_of(files | {"model.safetensors": edited})
    assert logits is None or len(edited) == len(weights)


@fuzz
@given(
    data=st.data(),
    entry=st.one_of(
        st.sampled_from(["ranks", "dense", "self", "_", "dequantize", "modules_to_import"]), st.text(max_size=8)
    ),
    value=JSON,
)
def test_ranks(files: dict[str, bytes], data: st.DataObject, entry: str, value: object) -> None:
    config = json.loads(files["config.json"])
    record = config["rankdyna"]
    if data.draw(st.booleans(), "one rank"):
        layers = record[data.draw(st.sampled_from(["ranks", "dense"]))]
        layers[data.draw(st.one_of(st.sampled_from([*record["ranks"], *record["dense"]]), st.text(max_size=8)))] = (
            value
        )
    else:
        record[entry] = value
    logits = logits_of(files | {"config.json": json.dumps(config).encode()})
    assert logits is None or torch.equal(logits, logits_of(files))
