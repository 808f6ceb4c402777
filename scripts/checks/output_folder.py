"""
What stands in the way of a model in its `output_dir`, when that is said, and what is left: for each obstacle a run of
a tiny random BERT.

    python scripts/checks/output_folder.py
"""

import contextlib
import errno
import io
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig
from rankdyna_trainer.report.generated import marked

CONFIG = RankDynaConfig(rank_ratio=0.3, rank_warmup_steps=2, rank_cooldown_steps=4, group_basis="weights")
STEPS, MIDDLE = 20, 10
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TAGGED = "---\ntags:\n- rankdyna\n---\n"
READMES = {
    "without metadata": "# Mine\n",
    "with a list item rankdyna": "---\ntags:\n- bert\n---\n\n- rankdyna\n",
    "with the tag rankdyna": f"{TAGGED}\nMine.\n",
    "generated, then changed": f"{marked(TAGGED)}Mine.\n",
    "generated, unchanged": marked(TAGGED),
}
# What happens to a folder; the stack undoes what it does to the system.
Act = Callable[[Path, ExitStack], object]


class Observer(TrainerCallback):
    """Does something in the middle of a run, and knows how far the run is."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.step = act, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        if self.step == MIDDLE:
            self.act()


def train(output: Path, observer: TrainerCallback) -> None:
    """A run into a folder."""
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **SIZES))
    rows: Any = [{"input_ids": torch.randint(64, (8,)), "labels": i % 2} for i in range(16)]
    settings: Any = {"max_steps": STEPS, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(str(output), use_cpu=True, **settings)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Trainer(model, args, train_dataset=rows, callbacks=[RankDynaCallback(CONFIG), observer]).train()


def folder(name: str) -> Act:
    """A folder of the user's, with something in it."""

    def act(output: Path, _: ExitStack) -> None:
        (output / name).mkdir(parents=True)
        (output / name / "mine.txt").touch()

    return act


def link(name: str, target: str = "nowhere") -> Act:
    """A link of the user's, in the folder or in its place."""

    def act(output: Path, _: ExitStack) -> None:
        if name:
            output.mkdir()
        (output / name).symlink_to(target)

    return act


def file(name: str, text: str = "mine") -> Act:
    """A file of the user's."""

    def act(output: Path, _: ExitStack) -> None:
        if name:
            output.mkdir()
        (output / name).write_text(text)

    return act


def refusing(number: int) -> Act:
    """The system writes nothing into the folder."""

    def act(output: Path, stack: ExitStack) -> None:
        def refuse(*args: Any, real: Callable[..., str] = tempfile.mkdtemp, **options: Any) -> str:
            if options.get("dir") == output:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        stack.enter_context(patch("tempfile.mkdtemp", refuse))

    return act


def without_room(_: Path, stack: ExitStack) -> None:
    """A full disk."""
    stack.enter_context(patch.object(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000)))


def another_run(output: Path, _: ExitStack) -> None:
    """Another one ends meanwhile."""
    train(output, TrainerCallback())


def killed_run(output: Path, _: ExitStack) -> None:
    """Another process dies between the files of the old model and those of the new one."""

    def die() -> None:
        with patch("os.link", lambda *_: os._exit(9)):
            train(output, TrainerCallback())

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()


def obstacles() -> dict[str, tuple[Act | None, Act | None]]:
    """By name: what is there before the run, and what comes in its middle."""
    names = ("config.json", "model.safetensors", "README.md", "ranks.png")
    found: dict[str, tuple[Act | None, Act | None]] = {f"{name}: a folder": (folder(name), None) for name in names}
    found |= {f"{name}: a folder, in the middle": (None, folder(name)) for name in names}
    found |= {f"{name}: a link to nowhere": (link(name), None) for name in names}
    found |= {
        "output_dir: a link to nowhere": (link(""), None),
        "output_dir: a link in a circle": (link("", "output"), None),
        "output_dir: a file": (file(""), None),
        "no room": (without_room, None),
        "no room, in the middle": (None, without_room),
        "read-only": (refusing(errno.EROFS), None),
        "read-only, in the middle": (None, refusing(errno.EROFS)),
        "another run that ends before": (None, another_run),
        "another run that is killed at its end": (None, killed_run),
        "a run before that was killed at its end": (killed_run, None),
    }
    return found | {f"README.md {kind}": (file("README.md", text), None) for kind, text in READMES.items()}


def result(before: Act | None, middle: Act | None) -> Mapping[str, str]:
    """When something is said, the words, and where a model that loads, a card, and the user's own are afterwards."""
    said: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        output = Path(root, "output")
        observer = Observer(lambda: middle and middle(output, stack))
        handler = logging.Handler()
        handler.emit = lambda record: said.append((observer.step, record.getMessage()))  # type: ignore[method-assign]
        logging.getLogger("rankdyna_trainer").addHandler(handler)
        stack.callback(logging.getLogger("rankdyna_trainer").removeHandler, handler)
        if before is not None:
            before(output, stack)
        mine = users_files(Path(root))
        try:
            train(output, observer)
        except Exception as error:
            said.append((observer.step, f"{type(error).__name__}: {error}"))
        folders = [path.parent for path in sorted(Path(root).rglob("config.json")) if loaded(path.parent)]
        cards = [str(path.relative_to(root)) for path in sorted(Path(root).rglob("README*")) if path.is_file()]
        kept = all(users_files(Path(root)).get(path) == text for path, text in mine.items())
    moments = {0: "before training", STEPS: "at the end"}
    left = {
        "model": ", ".join(str(place.relative_to(root)) for place in folders) or "none",
        "cards": ", ".join(cards) or "none",
        "what was there": "kept" if kept else "replaced",
    }
    return {
        "said": ", ".join(dict.fromkeys(moments.get(step, "in training") for step, _ in said)) or "not",
        "words": " / ".join(text.replace(root, "") for _, text in said),
        "left": "; ".join(f"{what}: {how}" for what, how in left.items()),
    }


def users_files(root: Path) -> dict[str, str]:
    """What a run finds, by place: the text of files, the target of links."""
    found = {str(path): os.readlink(path) for path in root.rglob("*") if path.is_symlink()}
    return found | {str(path): path.read_bytes().hex() for path in root.rglob("*") if path.is_file()}


def loaded(place: Path) -> bool:
    """Whether `from_pretrained` gives a model."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            BertForSequenceClassification.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError):
            return False
    return True


def main() -> None:
    """Print the table, a row as soon as it is known."""
    print("| obstacle | said | words | left |\n| :-- | :-- | :-- | :-- |")
    for name, (before, middle) in obstacles().items():
        print(f"| {name} | {' | '.join(result(before, middle).values())} |", flush=True)


if __name__ == "__main__":
    main()
