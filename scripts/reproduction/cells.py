"""One run of a task's script, a cell of a table: it is kept in a folder, and not run again once it is finished."""

import importlib
import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock
from tasks.presets import PAPER
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from .scales import Options, Scale, Task

DENSE = "none"
BASELINES = ("svd", "fwsvd", "tfwsvd")
# RankDyna: the local variant (section 4.5.1), the paper's, and the paper's with the parameters of the baselines.
LOCAL, GLOBAL, EQUAL_PARAMETERS = "rankdyna_local", "rankdyna", "rankdyna_equal_parameters"
METHODS = (*BASELINES, LOCAL, GLOBAL, EQUAL_PARAMETERS)


@dataclass(frozen=True)
class Grid:
    """
    All cells of a scale, of which each is run when it is first asked for.

    Attributes:
        scale: says what a cell is.
        folder: where the cells are kept.
        models: by role, names or folders of models, instead of the scale's.
        data: a folder with a folder for each task, in which are `train.jsonl` and `validation.jsonl`; without it the
            data comes from the Hub.
        float32: whether the tables that are not in the paper are made without the scale's autocast to bf16.
    """

    scale: Scale
    folder: Path
    models: dict[str, str]
    data: Path | None = None
    float32: bool = False

    def cell(self, task: str, method: str, ratio: float = 1.0, seed: int | None = None) -> dict[str, Any]:
        """
        The record of a run (`run.json` of the script), which is run now if it has not been.

        Args:
            task: by name.
            method: one of [`METHODS`], or `none`.
            ratio: the rank ratio; `rankdyna_equal_parameters` keeps the part of the parameters that SVD keeps at it.
            seed: by default the scale's first one.

        Raises:
            ValueError: the folder holds a run with other options, or the task has no model.
        """
        seed = self.scale.seeds[0] if seed is None else seed
        script, options = self._options(task, method, ratio, seed)
        return run_once(script, options, self.cell_folder(task, method, ratio, seed), keep_weights=method == DENSE)

    def cell_folder(self, task: str, method: str, ratio: float, seed: int) -> Path:
        """Where a run is kept."""
        return self.folder / "runs" / task / f"seed{seed}" / (method if method == DENSE else f"{method}-{ratio:g}")

    def score(self, task: str, run: dict[str, Any]) -> float:
        """The paper's score of a run, in percent where the script's is a part of 1."""
        found: Task = self.scale.tasks[task]
        scores = run["scores"]["final"]
        values = [scores[metric] for metric in found.metrics if metric in scores]  # local files of MNLI have one half
        # A constant prediction has no correlation with anything, which the paper writes as 0.
        mean = fmean(0.0 if value is None else value for value in values)
        return mean if found.metrics == ("perplexity",) else 100 * mean

    def model(self, task: str) -> str:
        """
        The model that a task starts from.

        Raises:
            ValueError: it has none.
        """
        role = self.scale.tasks[task].role
        model = self.models.get(role, self.scale.models[role])
        if model is None:
            raise ValueError(
                f"The scale has no model of the Hub for {task}: make one with scripts/make_models.py, and give its "
                f"folder, --models {role}=FOLDER."
            )
        return model

    def options(self, target: str, task: str, seed: int, own: Options) -> Options:
        """
        Of a run of a table that is not in the paper, all but the output folder.

        Args:
            target: the table, whose options the scale has by task.
            task: by name.
            seed: of the run.
            own: of the row: these win, and `None` leaves an option out.
        """
        options = self.scale.common | self.scale.tasks[task].options
        options |= getattr(self.scale, f"{target}_options").get(task, {}) | {"seed": seed, "method": "rankdyna"}
        options |= {"do_train": True, "do_eval": True, "report_to": "none", "disable_tqdm": True}
        options |= {"model_name_or_path": self.models.get("tagger", self.scale.models["tagger"])} | own
        if self.float32:
            options["bf16"] = None
        if self.data is not None:
            options |= {f"{split}_file": self.data / task / f"{split}.jsonl" for split in ("train", "validation")}
        return {key: value for key, value in options.items() if value is not None}

    def _options(self, task: str, method: str, ratio: float, seed: int) -> tuple[str, Options]:
        found, model = self.scale.tasks[task], self.model(task)
        options: Options = self.scale.common | found.options | {"seed": seed, "do_train": True, "do_eval": True}
        options |= {"method": method.split("_")[0], "report_to": "none", "disable_tqdm": True}
        if self.data is not None:
            options |= {f"{split}_file": self.data / task / f"{split}.jsonl" for split in ("train", "validation")}
        if method in BASELINES:
            fine_tuned = self.cell_folder(task, DENSE, 1.0, seed)
            self.cell(task, DENSE, seed=seed)
            options |= {"model_name_or_path": fine_tuned, "num_train_epochs": 0, "rank_ratio": ratio}
            options |= {"second_round_epochs": found.second_round_epochs}
            if method != "svd":
                options |= {"fisher_file": fine_tuned / "fisher.safetensors"}
            return found.script, options
        options |= {"model_name_or_path": model} | found.first_round
        if method == DENSE:
            return found.script, options
        options |= PAPER
        if method == EQUAL_PARAMETERS:
            return found.script, options | {
                "param_ratio": self.cell(task, "svd", ratio, seed)["target_parameter_ratio"]
            }
        scope = {"rank_scope": "local"} if method == LOCAL else {}
        return found.script, options | {"rank_ratio": ratio} | scope


def run_once(script: str, options: Options, folder: Path, keep_weights: bool) -> dict[str, Any]:
    """
    The record of a run of a script, from its folder if it is finished.

    A run that was stopped goes on from its last checkpoint, or, if it has none, begins again. One that another process
    is at is waited for.

    Args:
        script: its module.
        options: without the output folder.
        folder: of this run alone.
        keep_weights: whether the model stays in the folder.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        return _run_once(script, options, folder, keep_weights)


def _run_once(script: str, options: Options, folder: Path, keep_weights: bool) -> dict[str, Any]:
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    request, record = folder / "request.json", folder / "run.json"
    asked: dict[str, Any] = {"script": script, "options": options}
    if request.exists() and (found := json.loads(request.read_text(encoding="utf-8"))) != asked:
        pairs = {key: (found["options"].get(key), options.get(key)) for key in {*found["options"], *options}}
        differences = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in pairs.items() if old != new)
        raise ValueError(
            f"{folder} holds a run with other options ({differences}): give another --output_dir, or delete it."
        )
    if not record.exists():
        resumable = folder.exists() and options["method"] not in BASELINES
        checkpoint = _last_whole_checkpoint(folder) if resumable else None
        if folder.exists() and checkpoint is None:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write(request, asked)
        resumed = {"resume_from_checkpoint": checkpoint} if checkpoint else {}
        arguments = command_line(options | {"output_dir": str(folder)} | resumed)
        print(f"+ python scripts/{script}.py {shlex.join(arguments)}", flush=True)
        importlib.import_module(script).main(arguments)
        for left in folder.glob("checkpoint-*"):
            shutil.rmtree(left)
        if not keep_weights:
            for file in folder.rglob("*.safetensors"):
                file.unlink()
    return json.loads(record.read_text(encoding="utf-8"))


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The path of the newest checkpoint; one that a run was killed in writing is deleted."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / TRAINER_STATE_NAME).exists():  # which is written last
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(folder)


def command_line(options: Options) -> list[str]:
    """The options as a command line has them."""
    several = {key: value for key, value in options.items() if isinstance(value, list)}
    words = [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in options.items()
        if key not in several
    ]
    return [*words, *(word for key, values in several.items() for word in (f"--{key}", *map(str, values)))]


def write(path: Path, content: Any) -> None:
    """JSON, as [`write_text`]."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """All at once: who finds the file finds the whole of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
