"""scripts/run_audio_classification.py: sounds of any rate and length, families of models, and what it refuses."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import run_audio_classification
import soundfile
from datasets import Dataset, Features
from tasks.tiny_tasks import PITCHES, play_tones, write
from transformers import (
    AutoModelForAudioClassification,
    HubertConfig,
    HubertForSequenceClassification,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    pipeline,
)

from rankdyna_trainer import LowRankLinear

NAME = "run_audio_classification"
FILTERS = {"conv_dim": (32, 32), "conv_kernel": (16, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2}


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> str:
    return play_tones(tmp_path_factory.mktemp("tones"), 12)


@pytest.fixture
def plain(folder_of) -> list[str]:
    return [f"--model_name_or_path={folder_of('wav2vec2')}", "--method=none"]


def save_hubert(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"mask_time_prob": 0.0, "layerdrop": 0.0, "hidden_dropout": 0.0, "num_conv_pos_embedding_groups": 2}
    labels = {"num_labels": len(PITCHES), "num_conv_pos_embeddings": 8, "classifier_proj_size": 32}
    HubertForSequenceClassification(HubertConfig(**sizes, **still, **labels, **FILTERS)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)


def save_whisper(folder: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 16}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0}
    config = WhisperConfig(
        **sizes, **ends, num_mel_bins=16, max_source_positions=50, init_std=0.2, num_labels=len(PITCHES)
    )
    WhisperForAudioClassification(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_hubert, save_whisper])
def test_a_compressed_model_learns_and_is_loaded_again(save, tones, run_script, tmp_path):
    save(tmp_path / "model")
    data, output = [f"--train_dir={tones}", f"--validation_dir={tones}"], tmp_path / "out"
    options = ["--param_ratio=0.5", f"--model_name_or_path={tmp_path / 'model'}", "--do_train", "--do_eval"]
    run = run_script(NAME, output, *data, *options, "--num_train_epochs=10", "--learning_rate=3e-3")
    assert run["scores"]["final"]["accuracy"] > 0.8  # by chance 0.33
    assert 0 < run["target_parameter_ratio"] <= 0.5

    model = AutoModelForAudioClassification.from_pretrained(output)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    options = ["--method=none", f"--model_name_or_path={output}", "--do_eval", f"--validation_dir={tones}"]
    assert run_script(NAME, tmp_path / "again", *options)["scores"] == run["scores"]
    wave, _ = soundfile.read(f"{tones}/high/0.wav", dtype="float32")
    assert pipeline("audio-classification", model=str(output))(wave)[0]["label"] in PITCHES


def test_other_rates_and_channels(tmp_path):
    """A tone stays the tone that it is, whatever it was sampled with, and is cut to the seconds that are asked for."""
    for rate in (8000, 16000, 44100):
        seconds = np.arange(rate) / rate
        tone = np.sin(2 * np.pi * 440 * seconds)
        soundfile.write(tmp_path / f"{rate}.flac", np.stack([tone, 0 * tone], 1), rate)
        wave = run_audio_classification.read(str(tmp_path / f"{rate}.flac"), 16000, 0.5)
        assert wave.shape == (8000,)
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
        assert np.abs(wave - expected)[200:-200].max() < 0.01


def test_a_set_of_the_hub(plain, tones, run_script, tmp_path, monkeypatch):
    """Its sounds are in the rows, and need no decoder of datasets."""
    files = [(i, path) for i, name in enumerate(PITCHES) for path in sorted(Path(tones, name).iterdir())[:4]]
    columns = {"audio": [{"bytes": path.read_bytes(), "path": path.name} for _, path in files]}
    raw = Dataset.from_dict(columns | {"label": [i for i, _ in files]})
    features = Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=list(PITCHES))})
    monkeypatch.setattr(
        "tasks.media.load_dataset", lambda *_: {"train": raw.cast(features), "test": raw.cast(features)}
    )
    options = [*plain, "--dataset_name=some/tones", "--do_train", "--do_predict", "--max_steps=2"]
    run = run_script(NAME, tmp_path / "out", *options)
    assert 0 <= run["scores"]["test"]["accuracy"] <= 1
    labels = AutoModelForAudioClassification.from_pretrained(tmp_path / "out").config.label2id
    assert labels == {"high": 0, "low": 1, "middle": 2}


def test_refusals(refuse, plain, tones, tmp_path):
    plain = [*plain, "--do_train"]
    refuse(NAME, "--max_length_seconds must be more than 0: got 0.0", *plain, f"--train_dir={tones}",
           "--max_length_seconds=0")  # fmt: skip
    refuse(NAME, "--train_dir no/folder is not a folder", *plain, "--train_dir=no/folder")
    rows = [{"audio": f"{name}.wav", "label": name} for name in ("empty", "text", "gone")]
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    (tmp_path / "text.wav").write_text("no sound")
    refuse(NAME, f"3 of 3 files cannot be read. The first: row 0, {tmp_path}/empty.wav: it is empty", *plain,
           f"--train_file={write(tmp_path / 'rows.jsonl', rows)}")  # fmt: skip
    with pytest.raises(soundfile.LibsndfileError):
        run_audio_classification.check(io.BytesIO(b"no sound"))
