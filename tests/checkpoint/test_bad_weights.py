"""Weight files that are damaged or hostile: each is refused by an error of ours that says what is wrong."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from support.damage import (
    KEY,
    TRANSFORMERS_4,
    Case,
    all_of,
    config,
    edited_file,
    edited_index,
    edited_tensors,
    fingerprint,
    first,
    flipped,
    pickled,
    removed,
    renamed,
    sharded,
    swapped,
    tensor,
    to_int,
    truncated,
    without,
)
from transformers import AutoModel, AutoModelForMaskedLM

EMBEDDING = "bert.embeddings.word_embeddings.weight"
NORM = "bert.embeddings.LayerNorm.weight"
OFFSETS = [0, 0.0002, 0.01, *sorted(random.Random(seed).random() for seed in range(20))]

DAMAGED = r"model.*\.safetensors is damaged: .*Copy or download it again"
GONE = r"is damaged: .*No such file"
NOT_OPENED = r"\.bin is no safetensors file.*not opened"


def no_weights(name: str) -> str:
    return rf"has no weights for {name}.* of a \w+: it is incomplete"


# safetensors 0.4 writes a file without tensors, but does not read it.
NO_TENSORS = r"is damaged: .*InvalidHeader" if safetensors.__version__.startswith("0.4.") else no_weights("bert.")


def forget_a_shard(weights: dict[str, str]) -> None:
    shard = min(weights.values())
    for name in [name for name, file in weights.items() if file == shard]:
        del weights[name]


FILES = [
    *(Case("truncated", f"at-{part:.4f}", truncated(part), DAMAGED) for part in OFFSETS),
    *(Case("truncated", f"auto-at-{part:.4f}", truncated(part), DAMAGED, {"dtype": "auto"}) for part in OFFSETS[::5]),
    *(Case("header", f"byte-{offset}", flipped(offset), DAMAGED) for offset in (0, 6, 7, 8, 30)),
    Case("header", "zeros", edited_file(lambda _: bytes(100)), DAMAGED),
    Case("header", "list", edited_file(lambda _: (8).to_bytes(8, "little") + b"[1, 2] \n"), DAMAGED),
    Case("header", "huge", edited_file(lambda _: (2**60).to_bytes(8, "little") + b"{}"), DAMAGED),
    Case("header", "one-byte-more", edited_file(lambda data: data + b"0"), DAMAGED),
    Case("shards", "truncated", sharded(truncated(0.7, "model-*")), DAMAGED),
    Case("shards", "missing", sharded(removed("model-*")), rf"model-00001.*{GONE}"),
    Case("shards", "forgotten", sharded(edited_index(forget_a_shard)), no_weights("bert.")),
    Case("shards", "elsewhere", sharded(edited_index(lambda names: names.update(x="x.safetensors"))), GONE),
    Case(
        "shards",
        "pickle",
        sharded(all_of(pickled("x.bin"), edited_index(lambda names: names.update(x="x.bin")))),
        NOT_OPENED,
    ),
    Case("pickle", "only", all_of(pickled("pytorch_model.bin"), removed("model.safetensors")), NOT_OPENED),
    Case("pickle", "asked-for", pickled("pytorch_model.bin"), NOT_OPENED, {"use_safetensors": False}),
    Case(
        "pickle",
        "named-in-config",
        all_of(pickled("adapter_model.bin"), config(transformers_weights="adapter_model.bin")),
        NOT_OPENED,
    ),
]
if TRANSFORMERS_4:  # it refuses a file of another format itself
    FILES = [case for case in FILES if case.name != "named-in-config"]

TENSORS = [
    Case(
        "shape",
        "p-transposed",
        tensor(f"{KEY}.p.weight", torch.t),
        rf"layer {KEY} has rank 3, so its p\.weight should be \(32, 3\), but it is \(3, 32\) in the file",
    ),
    Case("shape", "q-cut", tensor(f"{KEY}.q.weight", lambda q: q[:2]), r"q\.weight should be \(3, 32\), .* \(2, 32\)"),
    Case(
        "shape", "p-and-q-swapped", swapped(f"{KEY}.p.weight", f"{KEY}.q.weight"), r"should be \(32, 3\), .*\(3, 32\)"
    ),
    Case(
        "shape", "bias", tensor(f"{KEY}.p.bias", lambda bias: bias[:5]), rf"{KEY}\.p\.bias is \(5,\) in the file, .*32"
    ),
    Case(
        "shape",
        "dense-instead",
        tensor(f"{KEY}.weight", lambda _: torch.ones(32, 32)),
        r"its weight should be \(2,\), but it is \(32, 32\)",
    ),
    Case(
        "shape",
        "norm",
        tensor(NORM, lambda weight: weight[:-1]),
        r"LayerNorm\.weight is \(31,\) in the file, .*\(32,\)",
    ),
    Case("shape", "scalar", tensor(NORM, lambda weight: weight[0]), r"LayerNorm\.weight is \(\) in the file"),
    *(
        Case("type", name, tensor(name, to_int), rf"{name} has the type I32 in the file, which is damaged")
        for name in (f"{KEY}.q.weight", NORM, "classifier.bias")
    ),
    Case("type", "bool", tensor("classifier.bias", torch.Tensor.bool), r"classifier\.bias has the type BOOL"),
    *(
        Case(
            "values",
            f"{value}-{name}",
            tensor(name, first(value)),
            rf"{name} has inf or nan: the checkpoint is damaged",
        )
        for name in (f"{KEY}.p.weight", f"{KEY}.q.weight", f"{KEY}.p.bias", EMBEDDING, "classifier.weight")
        for value in (float("nan"), float("-inf"))
    ),
    Case(
        "values",
        "beyond-float16",
        tensor("classifier.weight", first(1e5)),
        r"classifier\.weight has inf or nan: .*exceed torch\.float16",
        {"dtype": torch.float16},
    ),
    *(
        Case("missing", name, without(name), no_weights(name))
        for name in (
            f"{KEY}.p.weight",
            f"{KEY}.q.weight",
            f"{KEY}.p.bias",
            "bert.embeddings.LayerNorm",
            EMBEDDING,
            "bert.encoder.layer.1.output.LayerNorm.bias",
            "bert.encoder.layer.0.attention.output.dense",
            "bert.encoder.layer.1",
            "bert.pooler",
            "bert.pooler.dense.bias",
            "classifier",
            "classifier.bias",
        )
    ),
    *(
        Case("missing", f"{name}-for-{load.__name__}", without(f"bert.{name}"), no_weights(f".*{name}"), load=load)
        for load in (AutoModel, AutoModelForMaskedLM)
        for name in (
            KEY.removeprefix("bert.") + ".q.weight",
            "embeddings.LayerNorm",
            "encoder.layer.0.attention.output.dense",
            "encoder.layer.1.output.LayerNorm",
        )
    ),
    Case("missing", "all", edited_tensors(dict.clear), NO_TENSORS),
    Case("missing", "renamed", renamed(f"{KEY}.q.weight", f"{KEY}.r.weight"), no_weights(KEY)),
]


@pytest.mark.parametrize("case", FILES + TENSORS, ids=str)
def test_weights_are_refused_and_left_as_they_were(
    case: Case, checkpoint: Path, assert_refused: Callable[[Callable[[], object], type[Exception], str], None]
) -> None:
    case.damage(checkpoint)
    before = fingerprint(checkpoint.parent)
    assert_refused(lambda: case.load.from_pretrained(checkpoint, **case.options), ValueError, case.message)
    assert fingerprint(checkpoint.parent) == before
