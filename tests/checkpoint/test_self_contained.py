"""Checkpoints with the code that loads them, where this library is installed and where it is not."""

import copy
import filecmp
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from support import damage
from support.without_package import run_without_package
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPT2DoubleHeadsModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    dynamic_module_utils,
)

from rankdyna_trainer import (
    LowRankLinear,
    RankDynaCallback,
    RankDynaConfig,
    compact,
    inject_singular_groups,
    make_self_contained,
    merge,
    rank_report,
)
from rankdyna_trainer.checkpoint import modeling_rankdyna
from rankdyna_trainer.checkpoint.saving import save_compacted, whole_state_dict

FILE = Path(modeling_rankdyna.__file__)
INPUT = torch.arange(2, 22).reshape(2, 10)


@pytest.fixture
def small(tiny_bert: BertForSequenceClassification) -> PreTrainedModel:
    return make_self_contained(damage.compacted(tiny_bert))


@pytest.fixture
def saved(small: PreTrainedModel, tmp_path: Path) -> Path:
    small.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def trusting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What checkpoints bring along is copied to the test's folder instead of the user's cache."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def logits(model: nn.Module) -> torch.Tensor:
    arguments = {"decoder_input_ids": INPUT} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(INPUT, **arguments).logits


def is_self_contained(folder: Path) -> bool:
    copied = folder / FILE.name
    has_file = copied.exists() and filecmp.cmp(copied, FILE, shallow=False)
    named = f"{FILE.stem}." in (folder / "config.json").read_text()
    assert has_file == named
    return has_file


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
    except RuntimeError:
        outcomes[name, "untrusted"] = "refused"
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
torch.save(outcomes, folder / "outcomes.pt")
"""
NO_LAYER = "bert.encoder.layer.7.attention.self.key"
NORM = "bert.embeddings.LayerNorm.weight"
CANNOT = f"ValueError: config.json is damaged: {damage.KEY} cannot have rank"
ERROR = "RuntimeError: Error(s) in loading" if damage.TRANSFORMERS_4 else f"RuntimeError: {damage.MISMATCHED}"
# Where a quantizer is at work transformers 5.6 to 5.22 leave it to our file to say this.
SAYS_SIZES = damage.TRANSFORMERS_4 or Version(transformers.__version__) >= Version("5.23")
SIZES = ERROR if SAYS_SIZES else "ValueError: The checkpoint has no bert."
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
    "other-rank": (damage.rank(damage.KEY, 4), SIZES),
    "ignored-other-rank": (damage.rank(damage.KEY, 4), NOT_LOADED),
    "unlisted": (damage.unlisted(damage.KEY), SIZES),
    "norm": (damage.tensor(NORM, lambda weight: weight[:-1]), SIZES),
    "other-method": (damage.record(quant_method="other"), ERROR),
}


@pytest.mark.slow
def test_every_family_loads_without_the_package_to_the_last_bit(small: PreTrainedModel, tmp_path: Path) -> None:
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
        expected[name, "untrusted"] = "refused"
        with torch.no_grad():
            expected[name, "output"] = (model.base_model if auto_class == "AutoModel" else model)(**inputs)[0]
            if auto_class != "AutoModel" and model.can_generate():
                expected[name, "text"] = model.generate(INPUT, max_new_tokens=4, do_sample=False)

    for name, (model, auto_class) in all_families().items():
        save(name, model, auto_class)
    save("mixtral-body", model, "AutoModel")
    classifier = "AutoModelForSequenceClassification"
    save("bert", small, classifier)
    save("body", small, "AutoModel")
    save("sharded", small, classifier, max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    for name, (change, message) in DAMAGES.items():
        change(shutil.copytree(tmp_path / "bert", tmp_path / name))
        options = {"ignore_mismatched_sizes": True} if name.startswith("ignored") else {}
        cases[name] = cases["bert"] | {"options": options}
        expected[name, "untrusted"], expected[name, "error"] = "refused", message
    save("bfloat16", small.bfloat16(), classifier)
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
    small: PreTrainedModel, saved: Path, tmp_path: Path
) -> None:
    tiny_tasks.tokenizer().save_pretrained(saved)
    torch.save([{"input_ids": row, "labels": label} for label, row in enumerate(INPUT)], tmp_path / "rows.pt")
    printed = run_without_package(tmp_path, TRAIN_ON)
    assert "LABEL_" in printed and "score" in printed
    assert is_self_contained(tmp_path / "tuned") and is_self_contained(tmp_path / "tuned" / "checkpoint-2")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert rank_report(tuned).equals(rank_report(small))
    assert (logits(tuned) - logits(small)).abs().max() > 1e-3


def test_the_file_is_small_and_needs_nothing_of_the_package() -> None:
    lines = FILE.read_text().splitlines()
    assert len(lines) < 150
    assert dynamic_module_utils.check_imports(FILE) == []  # no relative ones; those outside of a try are installed
    assert sorted(dynamic_module_utils.get_imports(FILE)) == [
        "importlib",
        "torch",
        "transformers",
        "typing",
        "warnings",
    ]


def test_the_package_loads_it_without_trust_and_keeps_it_self_contained(
    small: PreTrainedModel, saved: Path, tmp_path: Path
) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    assert torch.equal(logits(loaded), logits(small))
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules())
    loaded.save_pretrained(tmp_path / "again")
    assert is_self_contained(tmp_path / "again")
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path / "body")
    assert is_self_contained(tmp_path / "body")


def test_where_the_package_is_installed_its_layers_and_checks_are_used(
    saved: Path, tmp_path: Path, trusting: None, assert_refused: Callable[..., None]
) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules())
    merge(loaded).save_pretrained(tmp_path / "dense")
    assert not is_self_contained(tmp_path / "dense")
    damage.rank(damage.KEY, 4)(saved)
    assert_refused(
        lambda: AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True),
        ValueError,
        damage.KEY,
    )


def test_merge_makes_a_stock_model_again(small: PreTrainedModel, tmp_path: Path) -> None:
    small.config.auto_map |= {"AutoModel": "user/repository--modeling_rankdyna.BertModel"}
    small.config.auto_map |= {"AutoTokenizer": ["other.Slow", None]}
    merge(small).save_pretrained(tmp_path / "dense")
    assert type(small) is BertForSequenceClassification
    assert not is_self_contained(tmp_path / "dense")
    assert small.config.auto_map == {"AutoTokenizer": ["other.Slow", None]}


def test_made_before_training_the_trainer_writes_it(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, trusting: None
) -> None:
    rows = [{"input_ids": row, "labels": label} for label, row in enumerate(INPUT)]
    args = TrainingArguments(output_dir=tmp_path / "run", max_steps=3, use_cpu=True, report_to="none")
    plugin = RankDynaCallback(RankDynaConfig(rank_ratio=0.2))
    trainer = Trainer(make_self_contained(tiny_bert), args, train_dataset=rows, callbacks=[plugin])
    trainer.train()
    assert is_self_contained(tmp_path / "run") and is_self_contained(tmp_path / "run" / "checkpoint-3")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))


def test_copies_and_pickles_stay_self_contained(small: PreTrainedModel, tmp_path: Path) -> None:
    assert make_self_contained(small) is small
    for i, model in enumerate((copy.deepcopy(small), pickle.loads(pickle.dumps(small)))):
        model.save_pretrained(tmp_path / str(i))
        assert is_self_contained(tmp_path / str(i))


def test_a_sharded_model(tiny_bert: BertForSequenceClassification, tmp_path: Path, trusting: None) -> None:
    """FSDP2 derives a class of its own."""
    model = inject_singular_groups(make_self_contained(tiny_bert), RankDynaConfig(rank_ratio=0.5))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        compact(model)
        save_compacted(model, tmp_path / "saved", state_dict=whole_state_dict(model))
        expected = logits(model)
    finally:
        distributed.destroy_process_group()
    assert is_self_contained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(logits(loaded), expected)


def test_a_class_that_no_auto_class_makes_is_what_auto_model_loads(tmp_path: Path, trusting: None) -> None:
    config = tiny_tasks.model("gpt2").config
    model = make_self_contained(damage.compacted(GPT2DoubleHeadsModel(config)))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert isinstance(loaded, GPT2DoubleHeadsModel)
    assert torch.equal(logits(loaded), logits(model))


class OwnBert(BertForSequenceClassification):
    pass


def test_other_models_are_refused(
    tiny_bert: BertForSequenceClassification, assert_refused: Callable[..., None]
) -> None:
    assert_refused(
        lambda: make_self_contained(OwnBert(tiny_bert.config)), ValueError, "OwnBert is no class of transformers"
    )
    adapted = get_peft_model(tiny_bert, LoraConfig(target_modules=["query"]))
    assert_refused(lambda: make_self_contained(adapted), TypeError, "got a PeftModel")
    assert_refused(lambda: make_self_contained(nn.Linear(2, 2)), TypeError, "got a Linear")
