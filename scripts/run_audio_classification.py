"""
Fine-tunes a classifier of speech or other sounds on folders of files, or on a set of the Hub, and compresses it on the
way.

    python scripts/run_audio_classification.py --model_name_or_path facebook/wav2vec2-base \\
        --train_dir sounds/train --validation_dir sounds/validation --rank_ratio 0.2 --do_train --do_eval

A folder has a folder for each class, which has its name. The files are WAV, FLAC, OGG or MP3, of any sampling rate,
and are read with soundfile. `--tiny` needs none of it: see `tasks/tiny_run.py`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import soundfile
from scipy.signal import resample_poly
from tasks.arguments import parse_args
from tasks.media import MediaArguments, MediaFile, Medium, make_media_run
from tasks.run import Run
from tasks.tiny_run import complete
from tasks.tiny_tasks import tiny_sounds
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

SUFFIXES = {f".{kind.lower()}" for kind in soundfile.available_formats()} - {".raw"}  # which tells no sampling rate


@dataclass
class ScriptArguments(MediaArguments):
    audio_column_name: str = field(default="audio", metadata={"help": "The column with the sounds, or their paths."})
    max_length_seconds: float = field(default=20.0, metadata={"help": "Cut longer sounds to so many seconds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.max_length_seconds < math.inf:
            raise ValueError(f"--max_length_seconds must be more than 0: got {self.max_length_seconds}.")


def check(file: MediaFile) -> None:
    """That there is a sound."""
    if soundfile.info(file).frames == 0:
        raise ValueError("it is empty")


def read(file: MediaFile, sampling_rate: int, seconds: float) -> np.ndarray:
    """The beginning of a sound, at another sampling rate, the mean of its channels: shape `(samples,)`."""
    with soundfile.SoundFile(file) as sound:
        rate = sound.samplerate
        wave = sound.read(math.ceil(seconds * rate), dtype="float32", always_2d=True).mean(axis=1)
    common = math.gcd(rate, sampling_rate)
    return resample_poly(wave, sampling_rate // common, rate // common) if rate != sampling_rate else wave


def make_run(args: list[str] | None = None) -> Run:
    choices = parse_args(args, ScriptArguments)
    script = choices.script
    extractor = AutoFeatureExtractor.from_pretrained(script.model_name_or_path)

    def encode(file: MediaFile) -> dict[str, Any]:
        wave = read(file, extractor.sampling_rate, script.max_length_seconds)
        encoded = extractor(wave, sampling_rate=extractor.sampling_rate)
        return {key: values[0] for key, values in encoded.items()}

    medium = Medium(script.audio_column_name, datasets.Audio(decode=False), SUFFIXES, check, encode)
    return make_media_run("run_audio_classification", choices, medium, AutoModelForAudioClassification, extractor)


def main(args: list[str] | None = None) -> None:
    complete(make_run, args, tiny_sounds)


if __name__ == "__main__":
    main()
