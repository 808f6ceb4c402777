"""
Tiny models, in folders as users have them, and tiny tasks which they learn in a few steps: those of `--tiny`, and of
the tests.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
NAMES, PLACES, VERBS = ["alice", "bob", "carol", "dave"], ["paris", "oslo", "rome", "york"], ["sees", "likes", "left"]
WORDS = [*SPECIAL, *NAMES, *PLACES, *VERBS, "new", "and", "the", "is", "good", "film", "day"]
SHAPES, IMAGE_SIZE = ["disc", "line", "ring"], 32
PITCHES, SAMPLING_RATE = {"low": 300, "middle": 900, "high": 2700}, 16000
TRAINING = ["--learning_rate=1e-2", "--per_device_train_batch_size=8", "--use_cpu", "--disable_tqdm=true"]
TRAINING += ["--save_strategy=no", "--report_to=none"]
DEMO = ["--learning_rate=3e-3", "--per_device_train_batch_size=16", "--per_device_eval_batch_size=32"]
DEMO += ["--save_strategy=no", "--report_to=none", "--disable_tqdm=true", "--dataloader_pin_memory=false"]


def tokenizer(ends: bool = True) -> PreTrainedTokenizerFast:
    """A word a token; with `ends` it puts [CLS] before and [SEP] after a text."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    if ends:
        template = "[CLS] $A [SEP]"
        words.post_processor = TemplateProcessing(single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **tokens)


def model(kind: str, layers: int = 2) -> PreTrainedModel:
    """With random weights that are easy to train, and no dropout; BART, Marian and T5 have one layer on each side."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": len(WORDS), "max_position_embeddings": 40}
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    seq2seq: dict[str, Any] = {"d_model": 32, "dropout": 0.0, "max_position_embeddings": 40, "vocab_size": len(WORDS)}
    for part in ("encoder", "decoder"):
        seq2seq |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 64}
    seq2seq |= ends | {"decoder_start_token_id": 3, "forced_eos_token_id": None}
    if kind == "bert":
        return BertModel(BertConfig(**sizes, **still, initializer_range=0.2))
    if kind == "roberta":
        return RobertaModel(RobertaConfig(**sizes, **still, **ends, initializer_range=0.2))
    if kind == "encoder-decoder":
        config = BertConfig(**sizes, **still, initializer_range=0.2)
        joined = EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
        joined.decoder_start_token_id, joined.pad_token_id, joined.eos_token_id = 2, 0, 3
        return EncoderDecoderModel(joined)
    if kind == "bart":
        return BartForConditionalGeneration(BartConfig(**seq2seq))
    if kind == "marian":
        return MarianMTModel(MarianConfig(**seq2seq))
    if kind == "t5":
        t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        starts = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**t5, **starts, vocab_size=len(WORDS)))
    if kind == "gpt2":
        gpt2 = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 40, "vocab_size": len(WORDS)}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**gpt2, **still, bos_token_id=2, eos_token_id=3))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **ends))
    if kind == "vit":
        del sizes["vocab_size"], sizes["max_position_embeddings"]
        return ViTModel(ViTConfig(**sizes, image_size=IMAGE_SIZE, patch_size=8))
    if kind == "wav2vec2":
        filters = {"conv_dim": (32, 32), "conv_kernel": (16, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2}
        filters |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 32}
        still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0}
        still |= {"activation_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0}
        del sizes["max_position_embeddings"]
        return Wav2Vec2Model(Wav2Vec2Config(**sizes, **filters, **still))
    raise ValueError(kind)


def processor(kind: str) -> Any:
    """What makes the inputs of a model."""
    if kind == "vit":
        # The one that needs no torchvision, which is the only one in transformers 4.
        processor_class = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
        return processor_class(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    if kind == "wav2vec2":
        return Wav2Vec2FeatureExtractor(sampling_rate=SAMPLING_RATE)
    return tokenizer(ends=kind not in ("gpt2", "llama"))


def save_model(kind: str, folder: Path) -> str:
    """The folder of a saved model."""
    model(kind).save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def sentences(count: int) -> list[dict[str, Any]]:
    """Rows of `run_glue.py` with two classes, by their first word."""
    words = ["good", "new"]
    return [{"sentence": f"{words[i % 2]} {NAMES[i % 4]} {VERBS[i % 3]}", "label": i % 2} for i in range(count)]


def entities(count: int) -> list[dict[str, Any]]:
    """Rows of `run_ner.py`: a name is a person; a place, with or without "new" before it, is a location."""
    rows = []
    for i in range(count):
        place = (["new"] if i % 2 else []) + [PLACES[i % 4]]
        tags = ["B-PER", "O", "B-LOC", "I-LOC"][: 2 + len(place)]
        rows.append({"tokens": [NAMES[i // 4 % 4], VERBS[i % 3], *place], "ner_tags": tags})
    return rows


def dialogues(count: int) -> list[dict[str, Any]]:
    """Rows of `run_summarization.py`, all of them with the same summary."""
    texts = [f"{NAMES[i % 4]} {VERBS[i % 3]} {PLACES[i // 4 % 4]}" for i in range(count)]
    return [{"dialogue": text, "summary": "the film is good"} for text in texts]


def lines(count: int) -> list[dict[str, Any]]:
    """Rows of `run_clm.py`: the same words over and over."""
    return [{"text": "alice sees paris and bob likes rome"} for _ in range(count)]


def draw_shapes(folder: Path, count: int) -> str:
    """A folder of images for each shape, of any colour and size, at any place."""
    random = np.random.default_rng(count)
    for name in SHAPES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(random.integers(0, 80, 3).tolist()))
            size = random.integers(12, 20)
            left, top = random.integers(1, IMAGE_SIZE - size - 1, 2)
            box = [(left, top), (left + size, top + size)]
            colour = tuple(random.integers(150, 256, 3).tolist())
            draw = ImageDraw.Draw(image)
            if name == "disc":
                draw.ellipse(box, fill=colour)
            elif name == "ring":
                draw.ellipse(box, outline=colour, width=3)
            else:
                draw.line([box[0], box[1]], fill=colour, width=4)
            image.save(folder / name / f"{i}.png")
    return str(folder)


def play_tones(folder: Path, count: int) -> str:
    """A folder of sounds for each pitch, of a tone in noise."""
    import soundfile  # texts and images do without it

    random = np.random.default_rng(count)
    for name, pitch in PITCHES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seconds = np.arange(random.integers(1600, 3200)) / SAMPLING_RATE
            frequency, phase = pitch * random.uniform(0.9, 1.1), random.uniform(0, 2 * np.pi)
            tone = random.uniform(0.2, 0.8) * np.sin(2 * np.pi * frequency * seconds + phase)
            soundfile.write(folder / name / f"{i}.wav", tone + random.normal(0, 0.05, len(tone)), SAMPLING_RATE)
    return str(folder)


def tiny_images(folder: Path) -> tuple[str, list[str]]:
    """For `run_image_classification.py --tiny`."""
    data = [f"--train_dir={draw_shapes(folder / 'train', 64)}"]
    data += [f"--validation_dir={draw_shapes(folder / 'validation', 24)}"]
    return save_model("vit", folder / "model"), [*data, *DEMO, "--num_train_epochs=20"]


def tiny_sounds(folder: Path) -> tuple[str, list[str]]:
    """For `run_audio_classification.py --tiny`."""
    data = [f"--train_dir={play_tones(folder / 'train', 32)}"]
    data += [f"--validation_dir={play_tones(folder / 'validation', 16)}"]
    return save_model("wav2vec2", folder / "model"), [*data, *DEMO, "--num_train_epochs=10"]


def tiny_text_task(kind: str, folder: Path, *rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A model, and rows to train on and to evaluate on."""
    model = save_model(kind, folder / "model")
    names = ("train", "validation")
    files = [f"--{name}_file={write(folder / f'{name}.jsonl', of)}" for name, of in zip(names, rows, strict=True)]
    return model, [*files, *DEMO]


def tiny_sentences(folder: Path) -> tuple[str, list[str]]:
    """For `run_glue.py --tiny`."""
    model, options = tiny_text_task("bert", folder, sentences(96), sentences(24))
    return model, [*options, "--num_train_epochs=5"]


def tiny_entities(folder: Path) -> tuple[str, list[str]]:
    """For `run_ner.py --tiny`."""
    model, options = tiny_text_task("bert", folder, entities(96), entities(48))
    return model, [*options, "--num_train_epochs=5"]


def tiny_lines(folder: Path) -> tuple[str, list[str]]:
    """For `run_clm.py --tiny`."""
    model, options = tiny_text_task("gpt2", folder, lines(512), lines(64))
    return model, [*options, "--block_size=14", "--num_train_epochs=5"]


def reversals(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of `run_summarization.py`: the summary has the three words of the text backwards."""
    random = np.random.default_rng(seed)
    texts = [random.choice([*NAMES, *PLACES], 3).tolist() for _ in range(count)]
    return [{"dialogue": " ".join(words), "summary": " ".join(reversed(words))} for words in texts]


def tiny_reversals(folder: Path) -> tuple[str, list[str]]:
    """For `run_summarization.py --tiny`: to copy words in another order is what attention to a text is for."""
    model, options = tiny_text_task("bart", folder, reversals(768, 0), reversals(64, 1))
    return model, [*options, "--num_train_epochs=8", "--max_target_length=8"]
