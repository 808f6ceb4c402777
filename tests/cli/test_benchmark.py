import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.damage import compacted
from support.training_runs import Folders
from tasks import tiny_tasks
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from rankdyna_trainer.report import timing as clock
from rankdyna_trainer.report.card_sections import section_of
from rankdyna_trainer.report.generated import is_unchanged, unmarked
from rankdyna_trainer.report.speed import HEADING

Document = Callable[..., Any]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def vision() -> Any:
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8))


def waves() -> Any:
    convolutions = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 16}
    config = Wav2Vec2Config(**SIZES, **convolutions, num_conv_pos_embedding_groups=2, vocab_size=20)
    return Wav2Vec2ForCTC(config)


def speech() -> Any:
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": 100, "max_source_positions": 50, "num_mel_bins": 16}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **ends, suppress_tokens=None, begin_suppress_tokens=None)
    )


MODELS: dict[str, Callable[[], Any]] = {"vision": vision, "waves": waves, "speech": speech}
MODELS |= {kind: lambda kind=kind: tiny_tasks.model(kind) for kind in ("t5", "encoder-decoder")}
SHAPES: dict[str, dict[str, list[int]]] = {
    "vision": {"pixel_values": [2, 3, 32, 32]},
    "waves": {"input_values": [2, 40]},
    "speech": {"input_features": [2, 16, 100], "decoder_input_ids": [2, 40]},
    "t5": {"input_ids": [2, 40], "decoder_input_ids": [2, 40]},
    "encoder-decoder": {"input_ids": [2, 40], "decoder_input_ids": [2, 40]},
}


def test_writes_the_speed_into_the_card(
    document: Document, refusal: Callable[..., str], rankdyna: Callable[..., str], folders: Folders, tmp_path: Path
) -> None:
    for place in (folders.compacted, "alice/model"):
        assert f"--card writes into the README.md of a model's folder, and {place} has none" in refusal(
            2, "benchmark", place, "--card"
        )
    rankdyna("compress", folders.dense, "--method", "svd", "--rank_ratio", 0.3, "-o", tmp_path / "small")
    readme = tmp_path / "small" / "README.md"
    before = readme.read_text()
    for _ in range(2):  # the second one replaces what the first one wrote
        found = document("benchmark", tmp_path / "small", "--card", "--repeats", 3, "--length", 16)
        assert found["card"] == str(readme)
        text = readme.read_text()
        for batch, timing in zip((1, 32), found["timings"], strict=True):
            dense, compacted = (1000 * timing[side]["median"] for side in ("dense", "compacted"))
            assert f"| {batch} | {dense:.4g} | {compacted:.4g} | {timing['ratio']:.3g} |" in text
        assert text.count("## Speed") == 1 and f"in float32 on {found['device']}, input_ids of 16" in text
    section = section_of(readme, HEADING)
    assert unmarked(text).replace(f"{section}\n\n", "") == unmarked(before) and is_unchanged(readme)
    readme.write_text("# By hand\n")
    found = document("benchmark", tmp_path / "small", "--card", "--repeats", 1, "--length", 16)
    assert found["card"].endswith("README.rankdyna.md") and readme.read_text() == "# By hand\n"


@pytest.mark.parametrize("kind", MODELS)
def test_makes_its_own_inputs(kind: str, document: Document, tmp_path: Path) -> None:
    compacted(MODELS[kind]()).save_pretrained(tmp_path)  # type: ignore[operator]
    options = ["--batch_size", 2, "--length", 40, "--repeats", 3]
    found = document("benchmark", tmp_path, *options, *(["--generate", 2] if kind == "t5" else []))
    assert found["inputs"] == SHAPES[kind]
    assert [timing["work"] for timing in found["timings"]] == ["forward", *(["generate 2"] if kind == "t5" else [])]
    for timing in found["timings"]:
        medians = [statistics.median(timing[side]["seconds"]) for side in ("compacted", "dense")]
        assert timing["ratio"] == medians[0] / medians[1]
        assert [len(timing[side]["seconds"]) for side in ("compacted", "dense")] == [3, 3]
    assert 0 < found["promised_ratio"] < 1


def test_each_side_is_timed_under_its_own_name(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the operations that torch counts in the place of seconds."""

    def operations(work: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    monkeypatch.setattr(clock, "timed", operations)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=2))
    compacted(model)
    model.save_pretrained(tmp_path)
    found = document("benchmark", tmp_path, "--repeats", 1)
    assert found["timings"][0]["ratio"] == pytest.approx(found["promised_ratio"], rel=0.1)


def test_the_table_and_the_precision(rankdyna: Callable[..., str], folders: Folders) -> None:
    options = ["--length", 8, "--repeats", 2, "--dtype", "bfloat16"]
    shown = rankdyna("benchmark", folders.compacted, *options)
    assert "BertForSequenceClassification, bfloat16" in shown
    assert "input_ids 1x8" in shown
    assert "compacted, ms" in shown


def test_what_cannot_be_timed(refusal: Callable[..., str], folders: Folders) -> None:
    assert "holds no compacted model" in refusal(1, "benchmark", folders.dense)
    assert "texts of at most 40 tokens: got a length of 50" in refusal(
        1, "benchmark", folders.compacted, "--length", 50
    )
    message = refusal(2, "benchmark", folders.compacted, "--length", 8, "--repeats", 1, "--generate", 5)
    assert "a BertForSequenceClassification generates nothing" in message
    assert "--batch_size" in refusal(2, "benchmark", folders.compacted, "--batch_size", 0)
