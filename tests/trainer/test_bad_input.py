"""Wrong uses of everything but checkpoints: each with the error that it must raise, from our own code."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.damage import compacted
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import BertForSequenceClassification, Trainer, TrainerControl, TrainerState

from rankdyna_trainer import (
    RankDyna,
    RankDynaCallback,
    RankDynaConfig,
    compact,
    inject_singular_groups,
    merge,
    rank_report,
)
from rankdyna_trainer.checkpoint.loader import RankDynaCheckpointConfig
from rankdyna_trainer.checkpoint.saving import save_compacted
from rankdyna_trainer.config_file import CONFIG_NAME
from rankdyna_trainer.method.schedule import RankBudgetSchedule

NAN, INF, HUGE = float("nan"), float("inf"), 10**5000
CONFIG = RankDynaConfig(rank_ratio=0.5)
BERT = BertForSequenceClassification
Refusal = Callable[[Callable[[], object], type[Exception], str], None]

PATTERN = "must be a regular expression or a list of name endings: got "
DIGITS = "a number of thousands of digits"
VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "neither-ratio": ({"rank_ratio": None}, "Give exactly one of rank_ratio and param_ratio: got rank_ratio=None"),
    "both-ratios": ({"param_ratio": 0.5}, r"Give exactly one of .*rank_ratio=0\.2 and param_ratio=0\.5"),
    "both-huge": ({"rank_ratio": HUGE, "param_ratio": HUGE}, f"rank_ratio={DIGITS} and param_ratio={DIGITS}"),
    "ratio-0": ({"rank_ratio": 0}, r"rank_ratio .* must be in \(0, 1\]: got 0"),
    "ratio-negative": ({"rank_ratio": -0.2}, r"must be in \(0, 1\]: got -0\.2"),
    "ratio-percent": ({"rank_ratio": 20}, r"must be in \(0, 1\]: got 20"),
    "ratio-nan": ({"rank_ratio": NAN}, "rank_ratio must be finite: got nan"),
    "ratio-numpy-nan": ({"rank_ratio": np.float32(NAN)}, "rank_ratio must be finite: got .*nan"),
    "ratio-10^400": ({"rank_ratio": 10**400}, r"rank_ratio must be finite: got 1000+\.\.\.0+"),
    "ratio-10^5000": ({"rank_ratio": HUGE}, f"rank_ratio must be finite: got {DIGITS}"),
    "warmup-negative": ({"rank_warmup_steps": -1}, "rank_warmup_steps must be a whole number .* got -1"),
    "warmup-one-and-a-half": ({"rank_warmup_steps": 1.5}, r"rank_warmup_steps must be a whole number .* got 1\.5"),
    "warmup-10^400": ({"rank_warmup_steps": -(10**400)}, "rank_warmup_steps must be finite"),
    "cooldown-inf": ({"rank_cooldown_steps": INF}, "rank_cooldown_steps must be finite: got inf"),
    "no-step-left": ({"rank_warmup_steps": 0.5, "rank_cooldown_steps": 0.5}, "no step to remove groups .* Decrease"),
    "beta-1": ({"importance_beta": 1}, r"importance_beta must be in \[0, 1\): got 1"),
    "beta-nan": ({"importance_beta": NAN}, "importance_beta must be finite"),
    "score-unknown": ({"importance_score": "first order"}, "must be one of first_order, .*: got 'first order'"),
    "score-none": ({"importance_score": None}, "importance_score must be one of .*: got None"),
    "score-array": ({"importance_score": np.array(["fisher", "x"])}, "importance_score must be one of .*: got array"),
    "scope-list": ({"rank_scope": ["local"]}, r"rank_scope must be one of .*: got \['local'\]"),
    "scope-long": (
        {"rank_scope": "x" * 10**6},
        r"rank_scope must be one of global, local: got 'x{90,100}\.\.\.x+'\.$",
    ),
    "interval-0": ({"rank_update_interval": 0}, "rank_update_interval must be at least 1: got 0"),
    "interval-huge": ({"rank_update_interval": HUGE}, f"rank_update_interval must be at most .*: got {DIGITS}"),
    "interval-minus-huge": ({"rank_update_interval": -HUGE}, f"must be at least 1: got {DIGITS}"),
    "targets-empty": ({"target_modules": []}, f"target_modules {PATTERN}"),
    "targets-numbers": ({"target_modules": [1]}, f"target_modules {PATTERN}"),
    "targets-mixed-set": ({"target_modules": {"query", 1, None}}, f"target_modules {PATTERN}"),
    "targets-bracket": ({"target_modules": "("}, r"target_modules='\(' is not a regular expression: "),
    "targets-deep": ({"target_modules": "(" * 10_000}, "is not a regular expression: maximum recursion"),
    "targets-overflow": ({"target_modules": "a{99999999999}"}, "is not a regular expression: .*too large"),
    "excludes-bracket": ({"exclude_modules": ["[a-"]}, r"exclude_modules='\[a-' is not a regular expression"),
}
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "ratio-str": ({"rank_ratio": "0.2"}, r"rank_ratio must be a number: got '0\.2'"),
    "ratio-bool": ({"rank_ratio": True}, "rank_ratio must be a number: got True"),
    "ratio-complex": ({"rank_ratio": 0.2j}, "rank_ratio must be a number"),
    "ratio-tensor": ({"rank_ratio": torch.tensor(0.2)}, "rank_ratio must be a number: got tensor"),
    "ratio-deep": ({"rank_ratio": DEEP}, r"rank_ratio must be a number: got \[\[\["),
    "warmup-none": ({"rank_warmup_steps": None}, "rank_warmup_steps must be a number: got None"),
    "cooldown-bytes": ({"rank_cooldown_steps": b"1"}, "rank_cooldown_steps must be a number"),
    "beta-list": ({"importance_beta": [0.85]}, "importance_beta must be a number"),
    "interval-float": ({"rank_update_interval": 2.0}, r"rank_update_interval must be an int: got 2\.0"),
    "interval-bool": ({"rank_update_interval": True}, "rank_update_interval must be an int: got True"),
    "cache-path": ({"factorization_cache": Path("x")}, "factorization_cache must be a folder's path as str"),
    "targets-bytes": ({"target_modules": b"query"}, f"target_modules {PATTERN}"),
    "targets-dict": ({"target_modules": {"query": 1}}, f"target_modules {PATTERN}"),
    "excludes-empty": ({"exclude_modules": ""}, f"exclude_modules {PATTERN}''"),
}


@pytest.mark.parametrize("case", VALUES, ids=lambda case: f"config values-{case}")
def test_config_values(case: str, assert_refused: Refusal) -> None:
    values, message = VALUES[case]
    assert_refused(lambda: RankDynaConfig(**({"rank_ratio": 0.2} | values)), ValueError, message)


@pytest.mark.parametrize("case", TYPES, ids=lambda case: f"config types-{case}")
def test_config_types(case: str, assert_refused: Refusal) -> None:
    values, message = TYPES[case]
    assert_refused(lambda: RankDynaConfig(**({"rank_ratio": 0.2} | values)), TypeError, message)


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "half": (b'{"rank_ratio": 0.', "is not valid JSON"),
    "no-text": (b"\xff\xfe\x00\xd8", "is not valid JSON"),
    "deep": (b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
    "deep-value": (b'{"rank_ratio": ' + b'{"a":' * 100_000, "is not valid JSON: maximum recursion depth"),
    "many-digits": (b'{"rank_ratio": ' + b"1" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    "list": (b"[0.2]", f"{CONFIG_NAME} is no RankDynaConfig: it has list, known are"),
    "null": (b"null", "is no RankDynaConfig: it has NoneType"),
    "unknown": (b'{"rank_ratio": 0.2, "ranks": {}}', r"is no RankDynaConfig: it has \['ranks'\]"),
    "dunder": (b'{"__class__": "os.system"}', r"is no RankDynaConfig: it has \['__class__'\]"),
    "infinite": (b'{"rank_ratio": 1e999}', "is no valid RankDynaConfig: rank_ratio must be finite: got inf"),
    "wrong-type": (b'{"rank_ratio": {"x": []}}', "is no valid RankDynaConfig: rank_ratio must be a number"),
    "out-of-range": (b'{"rank_ratio": 2}', "is no valid RankDynaConfig: rank_ratio is the part to keep"),
}


@pytest.mark.parametrize("case", FILES, ids=lambda case: f"config files-{case}")
def test_config_files(case: str, tmp_path: Path, assert_refused: Refusal) -> None:
    content, message = FILES[case]
    (tmp_path / CONFIG_NAME).write_bytes(content)
    assert_refused(lambda: RankDynaConfig.from_pretrained(tmp_path), ValueError, message)
    assert (tmp_path / CONFIG_NAME).read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def first_weight(model: BERT) -> nn.Linear:
    return model.bert.encoder.layer[0].attention.self.query


def with_weight(model: BERT, weight: torch.Tensor) -> BERT:
    first_weight(model).weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return model


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def inject_sharded(model: BERT, folder: Path) -> None:
    with one_process(folder):
        mesh = init_device_mesh("cpu", (1,))
        inject_singular_groups(
            with_weight(model, distribute_tensor(first_weight(model).weight.detach(), mesh)), CONFIG
        )


def inject(model: Any, **choices: Any) -> nn.Module:
    return inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5, **choices))


def run(model: nn.Module, optimized: nn.Module, config: RankDynaConfig = CONFIG, steps: int = 10) -> RankDyna:
    return RankDyna(model, config, torch.optim.SGD(optimized.parameters()), steps)


def save_in_file(model: nn.Module, folder: Path) -> None:
    (folder / "file").write_text("mine")
    save_compacted(model, folder / "file")


QUERY = r"bert\.encoder\.layer\.0\.attention\.self\.query"
NO_MATCH = "No layer to compress matches target_modules="
USES: dict[str, tuple[Callable[[BERT, Path], object], type[Exception], str]] = {
    "models-str": (lambda m, _: inject("bert-base"), TypeError, "takes a model and a RankDynaConfig.*got a str"),
    "models-none": (lambda m, _: inject(None), TypeError, "takes a model and a RankDynaConfig.*got a NoneType"),
    "models-dict": (lambda m, _: inject(m.state_dict()), TypeError, "takes a model .*got a OrderedDict"),
    "models-single-layer": (lambda m, _: inject(nn.Linear(4, 4)), ValueError, "is a single linear layer"),
    "models-no-linear-layer": (lambda m, _: inject(nn.Conv1d(3, 3, 1)), ValueError, "linear layers are: none"),
    "models-peft": (lambda m, _: inject(get_peft_model(m, LoraConfig(target_modules=["key"]))), ValueError, "by peft"),
    "models-injected-twice": (
        lambda m, _: inject(inject(m)),
        ValueError,
        "already has singular groups .*Call compact",
    ),
    "models-meta": (lambda m, _: inject(m.to("meta")), ValueError, f"weight of {QUERY} has no values"),
    "models-nan": (
        lambda m, _: inject(with_weight(m, torch.full((32, 32), NAN))),
        ValueError,
        f"{QUERY} has inf or nan",
    ),
    "models-inf": (
        lambda m, _: inject(with_weight(m, torch.full((32, 32), INF))),
        ValueError,
        f"{QUERY} has inf or nan",
    ),
    "models-int8": (
        lambda m, _: inject(with_weight(m, torch.zeros(32, 32).char())),
        ValueError,
        f"{QUERY} .*quantized",
    ),
    "models-packed": (lambda m, _: inject(with_weight(m, torch.zeros(512, 1).byte())), ValueError, "quantized weight"),
    "models-float8": (lambda m, _: inject(m.to(torch.float8_e4m3fn)), ValueError, "quantized weight .*float8"),
    "models-sharded": (inject_sharded, ValueError, rf"{QUERY} is sharded \(DTensor\).*inject before sharding"),
    "models-frozen": (lambda m, _: inject(m.requires_grad_(False)), ValueError, r"Left alone: {'frozen"),
    "models-compact-dense": (lambda m, _: compact(m), ValueError, "has no singular groups to compact"),
    "models-merge-dense": (lambda m, _: merge(m), ValueError, "has no low-rank layers to merge"),
    "models-merge-injected": (lambda m, _: merge(inject(m)), ValueError, "has no low-rank layers to merge"),
    "models-compact-twice": (lambda m, _: compact(compacted(m)), ValueError, "has no singular groups to compact"),
    "models-report-dense": (lambda m, _: rank_report(m), ValueError, "has no compressed layers to report"),
    "targets-no-match": (lambda m, _: inject(m, target_modules=["c_attn"]), ValueError, rf"{NO_MATCH}\['c_attn'\]"),
    "targets-embedding": (lambda m, _: inject(m, target_modules=["word_embeddings"]), ValueError, NO_MATCH),
    "targets-norm": (lambda m, _: inject(m, target_modules=".*LayerNorm"), ValueError, NO_MATCH),
    "targets-ending-of-a-word": (lambda m, _: inject(m, target_modules=["ery", "ey"]), ValueError, NO_MATCH),
    "targets-part-of-a-name": (lambda m, _: inject(m, target_modules="query"), ValueError, f"{NO_MATCH}'query'"),
    "targets-all-excluded": (lambda m, _: inject(m, exclude_modules=".*"), ValueError, rf"{NO_MATCH}None .*='\.\*'"),
    "training-dense": (lambda m, _: run(m, m), ValueError, "has no singular groups.*callbacks="),
    "training-compacted": (lambda m, _: run(compacted(m), m), ValueError, "has no singular groups"),
    "training-other-optimizer": (lambda m, _: run(inject(m), m.classifier), ValueError, "does not hold 36 factors"),
    "training-early-optimizer": (lambda m, _: run(inject(m), copy.deepcopy(m)), ValueError, "optimizer does not hold"),
    "training-no-steps": (
        lambda m, _: run(inject(m), m, steps=0),
        ValueError,
        "has no step to fall in: 0 .* of 0 in all",
    ),
    "training-one-step": (lambda m, _: run(inject(m), m, steps=1), ValueError, "Decrease rank_warmup_steps"),
    "training-long-warmup": (
        lambda m, _: run(inject(m), m, RankDynaConfig(rank_ratio=0.5, rank_warmup_steps=10**6)),
        ValueError,
        "has no step to fall in: 1000000 warm-up",
    ),
    "training-schedule": (
        lambda m, _: RankBudgetSchedule(5, 5, 10),
        ValueError,
        "5 warm-up and 5 cool-down steps of 10",
    ),
    "training-no-config": (
        lambda m, _: RankDynaCallback(None),
        TypeError,
        "takes a RankDynaConfig, such as .*got None",
    ),
    "training-dict": (lambda m, _: RankDynaCallback({"rank_ratio": 0.2}), TypeError, "takes a RankDynaConfig"),
    "training-inject-dict": (lambda m, _: inject_singular_groups(m, {}), TypeError, "takes a model .*and a dict"),
    "training-added-while-it-runs": (
        lambda m, _: RankDynaCallback(CONFIG).on_pre_optimizer_step(None, TrainerState(), TrainerControl()),
        RuntimeError,
        "was added while training runs. Give it to the Trainer's constructor",
    ),
    "training-deepspeed": (
        lambda m, _: RankDynaCallback(CONFIG).on_init_end(SimpleNamespace(deepspeed_plugin=1), None, None, model=m),
        ValueError,
        "cannot run under DeepSpeed.*Use DDP or FSDP",
    ),
    "paths-config-none": (lambda m, _: RankDynaConfig.from_pretrained(None), TypeError, "Give a folder .*got None"),
    "paths-config-bytes": (lambda m, _: RankDynaConfig.from_pretrained(b"x"), TypeError, "Give a folder .*got b'x'"),
    "paths-config-missing": (lambda m, f: RankDynaConfig.from_pretrained(f), ValueError, "cannot be read from"),
    "paths-config-null": (
        lambda m, _: RankDynaConfig.from_pretrained("a\0b"),
        ValueError,
        f"{CONFIG_NAME} cannot be read from",
    ),
    "paths-config-long": (
        lambda m, _: RankDynaConfig.from_pretrained("a" * 10**4),
        ValueError,
        "cannot be read from .*too long",
    ),
    "paths-save-config-in-file": (
        lambda m, f: CONFIG.save_pretrained(__file__),
        NotADirectoryError,
        "is a file: give",
    ),
    "paths-save-model-in-file": (save_in_file, NotADirectoryError, "file is a file: give the folder"),
    "format-no-ranks": (lambda m, _: RankDynaCheckpointConfig(), ValueError, "ranks must be a mapping .*got None"),
    "format-long": (lambda m, _: RankDynaCheckpointConfig({"x" * 10**6: -1}), ValueError, "^.{1,400}$"),
    "format-huge": (lambda m, _: RankDynaCheckpointConfig({"x": -HUGE}), ValueError, f"of layer x .*got {DIGITS}"),
}


@pytest.mark.parametrize("case", USES)
def test_uses(case: str, tiny_bert: BERT, tmp_path: Path, assert_refused: Refusal) -> None:
    action, exception, message = USES[case]
    assert_refused(lambda: action(tiny_bert, tmp_path), exception, message)


def test_callback_that_is_added_too_late(
    tiny_bert: BERT, make_trainer: Callable[..., Trainer], assert_refused: Refusal
) -> None:
    trainer = make_trainer(tiny_bert)
    trainer.add_callback(RankDynaCallback(CONFIG))
    assert_refused(trainer.train, ValueError, "Pass the RankDynaCallback to the Trainer's constructor")
