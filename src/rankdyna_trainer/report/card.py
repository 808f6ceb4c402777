"""The model card of a compacted model: what was gained, how it was made, how it is loaded."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import accelerate
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers.modelcard import infer_metric_tags_from_eval_results

from ..config import RankDynaConfig
from ..layers.auto_map import own_auto_class
from ..layers.rank_record import TAGS
from ..version import __version__
from .compression_run import CompressionRun
from .expected import shortfall_in_words
from .generated import CARD, IMAGE, card_place, image_place, marked, replace_file, unmarked
from .others_cards import around_introduction, passed_on
from .pipelines import pipeline_tag_of, pipeline_task
from .staging import staging_folder
from .tables import compression_summary, rank_report

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).with_name("card_template.md")
# Of which one lies beside a model that was saved with its tokenizer or processor.
PROCESSING_FILES = ("tokenizer_config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json")
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


def model_card(
    model: nn.Module,
    name: str,
    *,
    model_id: str | None = None,
    run: CompressionRun | None = None,
    file_bytes: int | None = None,
    has_image: bool = False,
    has_processing_class: bool = False,
    speed: str = "",
    curve: str = "",
    text: str = "",
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
        has_processing_class: whether the tokenizer, or the like, lies beside the model, as a pipeline needs it.
        speed: a section from [`speed_section`].
        curve: a section from [`curve_section`].
        text: a section that [`add_continuations`] wrote.
        pipeline_tag: the task; if left out it follows from the model's class, where `transformers` knows one.
        trainer_card: the text of the card that a `Trainer` wrote. Its metadata and sections are kept, its introduction
            is not.

    Raises:
        ValueError: the model has no compressed layers.
    """
    data, preamble, training = _kept_of(trainer_card)
    _complete(data, model, name, run, pipeline_tag)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        model_id=model_id or name,
        preamble=preamble,
        training=training,
        dataset_names=data.datasets,
        base_model=data.base_model,
        file_bytes=file_bytes,
        has_image=has_image,
        pipeline=pipeline_task(model, data.pipeline_tag) if has_processing_class else None,
        speed=speed,
        curve=curve,
        text=text,
        **_of_model(model),
        **_of_run(model, run),
        versions=_versions(),
        citation=CITATION,
    )
    return _mark(card)


def _kept_of(trainer_card: str | None) -> tuple[ModelCardData, str, str]:
    if trainer_card is None:
        return ModelCardData(), "", ""
    theirs = ModelCard(trainer_card, ignore_metadata_errors=True)
    return cast(ModelCardData, theirs.data), *around_introduction(theirs.text)


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
        from .plots import as_png, rank_heatmap
    except ImportError as error:
        logger.warning("There is no heatmap of the ranks. %s", error)
        return None
    return as_png(rank_heatmap(rank_report(model)))


def curve_image(curve: pd.DataFrame, metric: str | None = None) -> bytes | None:
    """
    The picture of a curve as a PNG file; `None` without matplotlib, which is logged.

    Args:
        curve: from [`read_curve`].
        metric: as for [`chosen_metric`].

    Raises:
        ValueError: as there.
    """
    try:
        from .curve_plot import curve_figure
        from .plots import as_png
    except ImportError as error:
        logger.warning("There is no picture of the sizes. %s", error)
        return None
    return as_png(curve_figure(curve, metric))


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
    for name, value in passed_on(model).items():
        data[name] = data.get(name) or value
    data.pipeline_tag = pipeline_tag or data.pipeline_tag or pipeline_tag_of(model)
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


def _of_model(model: nn.Module) -> dict[str, Any]:
    """What the template tells of a model."""
    report, name = rank_report(model), type(model).__name__
    return {
        "architecture": name,
        "auto_class": own_auto_class(model),
        "loads_by_name": isinstance(model, transformers.PreTrainedModel) and hasattr(transformers, name),
        "summary": compression_summary(model),
        "groups": int(report["rank"].sum()),
        "full_groups": int(report["full_rank"].sum()),
        "layers": list(report.itertuples()),
    }


def _of_run(model: nn.Module, run: CompressionRun | None) -> dict[str, Any]:
    """What the template tells of a run."""
    if run is None:
        return {"run": None}
    before = {name: run.scores_before[name] for name in run.scores_after if name in run.scores_before}
    return {
        "run": run,
        "scores": sorted(run.scores_after),
        "before": before,
        "number": _number,
        "config_json": json.dumps(_public(run.config), indent=2),
        "shortfall": shortfall_in_words(
            type(model).__name__,
            compression_summary(model).target_ratio,
            (before, run.scores_after),
            run.config,
            run.schedule.warmup_steps,
            run.training.get("learning rate", ""),
        ),
    }


def _public(config: RankDynaConfig) -> dict[str, Any]:
    local = ("factorization_cache", "teacher")  # folders, or told in words
    return {name: value for name, value in config.to_dict().items() if name not in local}


def _versions() -> str:
    versions = {"rankdyna-trainer": __version__, "Transformers": transformers.__version__}
    versions |= {"PyTorch": torch.__version__, "Accelerate": accelerate.__version__}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
