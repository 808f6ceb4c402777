"""The model card of a compacted model: what was gained, how it was made, how it is loaded."""

import copy
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers.modelcard import TASK_MAPPING, infer_metric_tags_from_eval_results

from ..config import RankDynaConfig
from ..layers.auto_map import own_auto_class
from ..layers.rank_record import TAGS
from ..method.schedule import RankBudgetSchedule
from ..version import __version__
from .generated import CARD, IMAGE, SOFTWARE, card_place, image_place, marked, replace_file, unmarked
from .staging import staging_folder
from .tables import compression_summary, rank_report

TEMPLATE = Path(__file__).with_name("card_template.md")
CITATION = """\
@inproceedings{hua-etal-2023-dynamic,
    title = "Dynamic Low-rank Estimation for Transformer-based Language Models",
    author = "Hua, Ting and Li, Xiao and Gao, Shangqian and Hsu, Yen-Chang and Shen, Yilin and Jin, Hongxia",
    editor = "Bouamor, Houda and Pino, Juan and Bali, Kalika",
    booktitle = "Findings of the Association for Computational Linguistics: EMNLP 2023",
    year = "2023",
    address = "Singapore",
    publisher = "Association for Computational Linguistics",
    url = "https://aclanthology.org/2023.findings-emnlp.621",
    doi = "10.18653/v1/2023.findings-emnlp.621",
    pages = "9275--9287",
}"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionRun:
    """
    What a card tells of the training that compressed a model.

    Attributes:
        config: the choices.
        schedule: the steps of each phase.
        initial_budget: `R(0)`, in groups, or in parameters with `param_ratio`.
        final_budget: `R(T)`, in the same unit.
        finished_steps: at which optimizer step the run ended.
        scores_before: of the model that training began with, by name; empty if it was not evaluated.
        scores_after: of the model that was saved, likewise.
        scored_step: after how many steps `scores_after` was found.
        datasets: ids on the Hub of the data that it was trained on.
        teacher: who taught it, in words; `None` if nobody did.
    """

    config: RankDynaConfig
    schedule: RankBudgetSchedule
    initial_budget: int
    final_budget: int
    finished_steps: int
    scores_before: Mapping[str, float] = field(default_factory=dict)
    scores_after: Mapping[str, float] = field(default_factory=dict)
    scored_step: int | None = None
    datasets: Sequence[str] = ()
    teacher: str | None = None

    @property
    def unit(self) -> str:
        """What the budgets count."""
        return "groups" if self.config.param_ratio is None else "parameters"


def model_card(
    model: nn.Module,
    name: str,
    *,
    model_id: str | None = None,
    run: CompressionRun | None = None,
    file_bytes: int | None = None,
    has_image: bool = False,
    pipeline_tag: str | None = None,
    trainer_card: str | None = None,
) -> ModelCard:
    """
    Write the card of a compacted model.

    Args:
        model: compacted.
        name: the title.
        model_id: what `from_pretrained` is given in the card's example; the name if left out.
        run: of the training that compressed it; left out if it was compressed without.
        file_bytes: size of the saved weights; left out if it is not known.
        has_image: whether [`write_card`] gets the heatmap.
        pipeline_tag: the task; if left out it follows from the model's class, where `transformers` knows one.
        trainer_card: the text of the card that a `Trainer` wrote. Its metadata and sections are kept, its introduction
            is not.

    Raises:
        ValueError: the model has no compressed layers.
    """
    report, data, preamble, training = rank_report(model), ModelCardData(), "", ""
    if trainer_card is not None:
        theirs = ModelCard(trainer_card, ignore_metadata_errors=True)
        data = cast(ModelCardData, theirs.data)
        preamble, training = _around_introduction(theirs.text)
    _complete(data, model, name, run, pipeline_tag)
    by_name = isinstance(model, transformers.PreTrainedModel) and hasattr(transformers, type(model).__name__)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        model_id=model_id or name,
        preamble=preamble,
        training=training,
        architecture=type(model).__name__,
        loads_by_name=by_name,
        auto_class=own_auto_class(model),
        dataset_names=data.datasets,
        base_model=data.base_model,
        summary=compression_summary(model),
        groups=int(report["rank"].sum()),
        full_groups=int(report["full_rank"].sum()),
        layers=list(report.itertuples()),
        file_bytes=file_bytes,
        has_image=has_image,
        run=run,
        scores=sorted({*run.scores_before, *run.scores_after}) if run and run.scores_after else [],
        number=_number,
        config_json=run and json.dumps(_public(run.config), indent=2),
        versions=_versions(),
        citation=CITATION,
    )
    return _mark(card)


def write_card(card: ModelCard, directory: str | Path, image: bytes | None = None) -> Path:
    """
    Write `README.md`, and `ranks.png` beside it, each of them whole or not at all.

    A file of that name that a person wrote, or changed, is kept: the new one is then `README.rankdyna.md` or
    `ranks.rankdyna.png`, which is logged.

    Args:
        card: from [`model_card`].
        directory: of the saved model.
        image: from [`ranks_image`].

    Returns:
        The file of the card.
    """
    folder, card = Path(directory), copy.copy(card)
    place = card_place(folder)
    with staging_folder(folder) as staging:
        if image is not None:
            image_file = image_place(folder)
            (staging / IMAGE).write_bytes(image)
            replace_file(staging / IMAGE, image_file, IMAGE)
            card.text = card.text.replace(f"]({IMAGE})", f"]({image_file.name})")
        _mark(card).save(staging / CARD)
        replace_file(staging / CARD, place, CARD)
    return place


def ranks_image(model: nn.Module) -> bytes | None:
    """
    The heatmap of [`rank_report`] as a PNG file; `None` without matplotlib, which is logged.

    Raises:
        ValueError: the model has no compressed layers.
    """
    try:
        from .plots import rank_heatmap
    except ImportError as error:
        logger.warning("There is no heatmap of the ranks. %s", error)
        return None
    png = BytesIO()
    rank_heatmap(rank_report(model)).savefig(png, format="png", metadata={"Software": SOFTWARE})
    return png.getvalue()


def _mark(card: ModelCard) -> ModelCard:
    card.text = unmarked(card.text)
    whole = str(card)
    card.text += marked(whole)[len(whole) :]
    return card


def _complete(
    data: ModelCardData, model: nn.Module, name: str, run: CompressionRun | None, pipeline_tag: str | None
) -> None:
    """Add our metadata to those of the `Trainer`."""
    bases = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
    if not bases or not all(is_hub_id(base) for base in bases):
        data.base_model = _base_model(model)
    if run is not None and data.base_model:
        data["base_model_relation"] = "finetune"  # of the Hub's four (adapter, merge, quantized) the one that is true
    if isinstance(model, transformers.PreTrainedModel):
        data.library_name = data.library_name or "transformers"
    data.license = data.license or None
    data.pipeline_tag = pipeline_tag or data.pipeline_tag or _pipeline_tag(model)
    data.tags = [*dict.fromkeys([*(data.tags or []), *TAGS])]
    data.datasets = [*(run.datasets if run else ())] or None
    scores = {} if run is None else run.scores_after
    metrics = infer_metric_tags_from_eval_results({score.removeprefix("eval_"): score for score in scores})
    data.metrics = [*dict.fromkeys([*(data.metrics or []), *metrics])] or None
    results = [result for result in data.eval_results or [] if result.dataset_type in (data.datasets or [])]
    for result in results:  # the Trainer takes the last evaluation, whichever model it was of
        key = f"eval_{str(result.metric_name).lower().replace(' ', '_')}"
        result.metric_value = scores.get(key, result.metric_value)
    if not results and data.pipeline_tag and data.datasets:
        results = [
            EvalResult(
                task_type=data.pipeline_tag,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=metric,
                metric_name=f"eval_{key}",
                metric_value=scores[f"eval_{key}"],
            )
            for dataset in data.datasets[:1]
            for metric, key in metrics.items()
            if f"eval_{key}" in scores
        ]
    if results or data.model_name:  # of the Trainer's card, where the list of results may be empty
        data.eval_results, data.model_name = results, name


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository on the Hub, as a path from the root of a disk may not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_model(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if name and is_hub_id(name) and not os.path.exists(name) else None


def _pipeline_tag(model: nn.Module) -> str | None:
    name, tag = type(model).__name__, None
    for task, classes in TASK_MAPPING.items():
        if name in classes.values() or any(
            isinstance(many, (tuple, list)) and name in many for many in classes.values()
        ):
            tag = task  # the last one, as the Trainer has it: the tasks that many models can do stand first
    return "text-generation" if tag == "text2text-generation" else tag  # the Hub has joined these two


def _around_introduction(text: str) -> tuple[str, str]:
    """What stands before the title, and the sections that follow its introduction."""
    heading = re.search(r"^# .*$", text, re.MULTILINE)
    title = heading.start() if heading else 0
    section = re.search(r"^## ", text[title:], re.MULTILINE)
    return text[:title].strip(), text[title + section.start() :].strip() if section else ""


def _public(config: RankDynaConfig) -> dict[str, Any]:
    local = ("factorization_cache", "teacher")  # folders, or told in words
    return {name: value for name, value in config.to_dict().items() if name not in local}


def _versions() -> str:
    versions = {"rankdyna-trainer": __version__, "Transformers": transformers.__version__}
    versions |= {"PyTorch": torch.__version__, "Accelerate": accelerate.__version__}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
