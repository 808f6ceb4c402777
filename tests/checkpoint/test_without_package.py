"""Checkpoints with the code that loads them, where this library is not installed."""

import filecmp
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import damage
from support.self_contained import INPUT, is_self_contained, logits
from support.without_package import run_without_package
from tasks import tiny_tasks
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from rankdyna_trainer import make_self_contained, rank_report
from rankdyna_trainer.layers.stock_refusal import SELF_CONTAINED


def all_families() -> dict[str, tuple[PreTrainedModel, str]]:
    """Compacted models and the Auto class of each; at last Mixtral, whose tensors have other names in a file."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    mixtral = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    torch.manual_seed(0)
    language = ["gpt2", "llama", "bart", "t5", "encoder-decoder"]
    models = {kind: tiny_tasks.model(kind) for kind in language} | {"mixtral": MixtralForCausalLM(mixtral)}
    seq2seq = {"bart", "t5", "encoder-decoder"}
    kinds = {kind: "AutoModelForSeq2SeqLM" if kind in seq2seq else "AutoModelForCausalLM" for kind in models}
    return {kind: (make_self_contained(damage.compacted(model)), kinds[kind]) for kind, model in models.items()}


LOAD_ALL = """
import warnings
from pathlib import Path
import torch
import transformers

warnings.filterwarnings("error", message="Initializing zero-element tensors")
folder = Path.cwd()
cases = torch.load(folder / "cases.pt")
outcomes = {}

def load(name, **options):
    return getattr(transformers, cases[name]["auto_class"]).from_pretrained(folder / name, **options)

for name in cases:
    try:
        load(name)
    except ValueError as error:
        outcomes[name, "untrusted"] = str(error)
for name, case in cases.items():
    try:
        model = load(name, trust_remote_code=True, **case["options"])
    except Exception as error:
        outcomes[name, "error"] = f"{type(error).__name__}: {error}"
        continue
    with torch.no_grad():
        outcomes[name, "output"] = model(**case["inputs"])[0]
        if model.can_generate():
            outcomes[name, "text"] = model.generate(case["inputs"]["input_ids"], max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder / "again" / name)
for name in cases:  # which has become no easier by the code that has run
    try:
        load(name, ignore_mismatched_sizes=True)
    except ValueError as error:
        outcomes[name, "ignoring"] = str(error)
torch.save(outcomes, folder / "outcomes.pt")
"""
NO_LAYER = "bert.encoder.layer.7.attention.self.key"
NORM = "bert.embeddings.LayerNorm.weight"
CANNOT = f"ValueError: config.json is damaged: {damage.KEY} cannot have rank"
ERROR = "RuntimeError: Error(s) in loading" if damage.TRANSFORMERS_4 else f"RuntimeError: {damage.MISMATCHED}"
NOT_LOADED = f"ValueError: The checkpoint has no {damage.KEY}.p.weight, or one of another size"
DAMAGES: dict[str, tuple[damage.Damage, str]] = {
    "negative": (damage.rank(damage.KEY, -1), f"{CANNOT} -1."),
    "string": (damage.rank(damage.KEY, "3"), f"{CANNOT} '3'."),
    "fraction": (damage.rank(damage.KEY, 3.0), f"{CANNOT} 3.0."),
    "true": (damage.rank(damage.KEY, True), f"{CANNOT} True."),
    "too-large": (damage.rank(damage.KEY, 33), f"ValueError: config.json is damaged: {damage.KEY} has 32 groups, not"),
    "no-such-layer": (damage.rank(NO_LAYER, 3), "ValueError: config.json is damaged: a BertForSequenceClassification"),
    "no-such-dense": (damage.record(dense={NO_LAYER: 3}), f"has no linear layer {NO_LAYER}."),
    "list": (damage.record(ranks=["key"]), "ValueError: config.json is damaged: RankDyna's ranks must be by layer"),
    "no-ranks": (damage.no_ranks, "ValueError: config.json is damaged: RankDyna's ranks must be by layer, got None"),
    "no-p": (damage.without(f"{damage.KEY}.p.weight"), NOT_LOADED),
    "other-rank": (damage.rank(damage.KEY, 4), ERROR),
    "ignored-other-rank": (damage.rank(damage.KEY, 4), NOT_LOADED),
    "unlisted": (damage.unlisted(damage.KEY), ERROR),
    "norm": (damage.tensor(NORM, lambda weight: weight[:-1]), ERROR),
    "no-record": (damage.edited_config(lambda config: config.pop("rankdyna")), SELF_CONTAINED),
    "ignored-unlisted": (
        damage.unlisted(damage.KEY),
        f"ValueError: The checkpoint has no {damage.KEY}.weight, or one of",
    ),
}


@pytest.mark.slow
def test_every_family_loads_without_the_package_to_the_last_bit(
    self_contained: PreTrainedModel, tmp_path: Path
) -> None:
    """
    Layers of rank 0, layers that stayed dense and `Conv1D`; in shards and in bfloat16; without the saved head. Damaged
    checkpoints, and whole ones without `trust_remote_code`, are refused: never is a layer random.
    """
    cases: dict[str, dict[str, Any]] = {}
    expected: dict[tuple[str, str], Any] = {}

    def save(name: str, model: PreTrainedModel, auto_class: str, **options: Any) -> None:
        model.save_pretrained(tmp_path / name, **options)
        assert is_self_contained(tmp_path / name)
        inputs = {"input_ids": INPUT}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = INPUT
        cases[name] = {"auto_class": auto_class, "inputs": inputs, "options": {}}
        expected[name, "untrusted"] = expected[name, "ignoring"] = SELF_CONTAINED
        with torch.no_grad():
            expected[name, "output"] = (model.base_model if auto_class == "AutoModel" else model)(**inputs)[0]
            if auto_class != "AutoModel" and model.can_generate():
                expected[name, "text"] = model.generate(INPUT, max_new_tokens=4, do_sample=False)

    for name, (model, auto_class) in all_families().items():
        save(name, model, auto_class)
    save("mixtral-body", model, "AutoModel")
    classifier = "AutoModelForSequenceClassification"
    save("bert", self_contained, classifier)
    save("body", self_contained, "AutoModel")
    save("sharded", self_contained, classifier, max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    for name, (change, message) in DAMAGES.items():
        change(shutil.copytree(tmp_path / "bert", tmp_path / name))
        options = {"ignore_mismatched_sizes": True} if name.startswith("ignored") else {}
        cases[name] = cases["bert"] | {"options": options}
        expected[name, "untrusted"] = expected[name, "ignoring"] = SELF_CONTAINED
        expected[name, "error"] = message
    save("bfloat16", self_contained.bfloat16(), classifier)
    cases["bfloat16"]["options"] = {"dtype": "auto"}  # transformers 4 makes it float32 otherwise
    torch.save(cases, tmp_path / "cases.pt")

    run_without_package(tmp_path, LOAD_ALL)
    outcomes = torch.load(tmp_path / "outcomes.pt")
    assert outcomes.keys() == expected.keys()
    for key, outcome in expected.items():
        same = torch.equal(outcomes[key], outcome) if isinstance(outcome, torch.Tensor) else outcome in outcomes[key]
        assert same, (key, outcomes[key])
    for name in sorted(cases.keys() - DAMAGES.keys()):
        assert is_self_contained(tmp_path / "again" / name), name
    for name in ("bert", "gpt2", "mixtral"):
        for file in ("config.json", "model.safetensors"):
            assert filecmp.cmp(tmp_path / name / file, tmp_path / "again" / name / file, shallow=False), (name, file)


TRAIN_ON = """
from pathlib import Path
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

folder = Path.cwd()
model = AutoModelForSequenceClassification.from_pretrained(folder / "saved", trust_remote_code=True)
rows = torch.load(folder / "rows.pt")
args = TrainingArguments(output_dir=folder / "tuned", max_steps=2, use_cpu=True, report_to="none", learning_rate=1e-2)
trainer = Trainer(model, args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder / "saved"))
trainer.train()
trainer.save_model()
print(pipeline("text-classification", str(folder / "tuned"), trust_remote_code=True)("alice sees paris"))
"""


@pytest.mark.slow
def test_a_model_is_trained_on_without_the_package_and_comes_back(
    self_contained: PreTrainedModel, saved: Path, tmp_path: Path
) -> None:
    tiny_tasks.tokenizer().save_pretrained(saved)
    torch.save([{"input_ids": row, "labels": label} for label, row in enumerate(INPUT)], tmp_path / "rows.pt")
    printed = run_without_package(tmp_path, TRAIN_ON)
    assert "LABEL_" in printed and "score" in printed
    assert is_self_contained(tmp_path / "tuned") and is_self_contained(tmp_path / "tuned" / "checkpoint-2")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert rank_report(tuned).equals(rank_report(self_contained))
    assert (logits(tuned) - logits(self_contained)).abs().max() > 1e-3
