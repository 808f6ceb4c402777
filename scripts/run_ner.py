"""
Fine-tunes a token classifier on CoNLL-2003, WNUT-17, or local files, and compresses it on the way.

    python scripts/run_ner.py --model_name_or_path bert-base-cased --task_name conll2003 --rank_ratio 0.2 --do_train

The scores are those of seqeval: precision, recall and F1 of whole entities, and the accuracy of single tags. A row of
a local file has a list of words, `tokens`, and a list of their tags, `ner_tags`: names, or indices of a known task.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from tasks.arguments import TaskArguments, parse_args
from tasks.data import CONVERTED, HubSet, first_rows, load_splits
from tasks.run import Run
from tasks.tiny_run import complete
from tasks.tiny_tasks import tiny_entities
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    Trainer,
)
from transformers.trainer_utils import set_seed

logger = logging.getLogger("run_ner")

HUB_SETS: dict[str | None, HubSet] = {
    "conll2003": HubSet("eriktks/conll2003", revision=CONVERTED),
    "wnut17": HubSet("leondz/wnut_17", revision=CONVERTED),
}
ENTITIES = {
    "conll2003": ("PER", "ORG", "LOC", "MISC"),
    "wnut17": ("corporation", "creative-work", "group", "location", "person", "product"),
}
METRICS = {"precision": precision_score, "recall": recall_score, "f1": f1_score, "accuracy": accuracy_score}
# These tell a word that begins a text from one after a blank.
WITH_PREFIX_SPACE = ("bloom", "deberta", "gpt2", "roberta")
NO_TAG = -100  # which the loss leaves out


@dataclass
class ScriptArguments(TaskArguments):
    task_name: str | None = field(
        default=None, metadata={"choices": list(HUB_SETS), "help": "A set of the Hub, or what local files look like."}
    )
    tokens_column: str = field(default="tokens", metadata={"help": "The column with the words."})
    tags_column: str = field(default="ner_tags", metadata={"help": "The column with their tags."})
    max_seq_length: int = field(default=256, metadata={"help": "Cut longer texts to so many tokens."})


def find_labels(splits: dict[str, Dataset], script: ScriptArguments) -> list[str]:
    """The names of the tags, in the order of their indices."""
    if script.task_name is not None:
        return ["O", *(f"{part}-{entity}" for entity in ENTITIES[script.task_name] for part in "BI")]
    if "train" not in splits:  # then only the checkpoint knows what its head was trained for
        return list(AutoConfig.from_pretrained(script.model_name_or_path).id2label.values())
    rows = first_rows(splits["train"], "train", {script.tags_column}, script)
    names = getattr(getattr(rows.features[script.tags_column], "feature", None), "names", None)
    if names is not None:
        return list(names)
    found = set(chain.from_iterable(splits["train"][script.tags_column][:]))
    if not all(isinstance(tag, str) for tag in found):
        raise ValueError(
            f"{script.source('train')}: the tags are to be names, as B-PER, or indices of those of a task that "
            f"--task_name gives ({', '.join(ENTITIES)}): found {sorted(map(str, found))[:5]}."
        )
    return sorted(found, key=lambda tag: (tag != "O", tag))


def first_pieces(word_of_piece: Sequence[int | None], words: int) -> list[int]:
    """For each word where its first token is, -1 for a word that has none."""
    places = [-1] * words
    for place, word in enumerate(word_of_piece):
        if word is not None and places[word] == -1:
            places[word] = place
    return places


def prepare(rows: Dataset, split: str, labels: list[str], tokenizer: Any, script: ScriptArguments) -> Dataset:
    """Tokens, the tags at the first token of each word, and where those are."""
    source, words_in, tags_in = script.source(split), script.tokens_column, script.tags_column
    labelled = split != "test" or tags_in in rows.column_names
    rows = first_rows(rows, split, {words_in, *([tags_in] if labelled else [])}, script)
    for i, row in enumerate(rows):
        words, tags = row[words_in], row[tags_in] if labelled else row[words_in]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise ValueError(
                f"{source}: {words_in} and {tags_in} are to be lists of one length, which they are not in row {i}."
            )
    ids = {key: i for i, name in enumerate(labels) for key in (name, i)}
    if labelled and (unknown := set(chain.from_iterable(rows[tags_in][:])) - ids.keys()):
        raise ValueError(f"{source}: expected tags {labels} or their indices, found {sorted(map(str, unknown))}.")
    empty = [i for i, words in enumerate(rows[words_in][:]) if not words]
    if empty and split != "test":
        logger.warning("%s: %d rows without a word are left out.", source, len(empty))
        rows = rows.select(sorted(set(range(len(rows))) - set(empty)))

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        length = min(script.max_seq_length, tokenizer.model_max_length)
        encoded = tokenizer(batch[words_in], is_split_into_words=True, truncation=True, max_length=length)
        places = [first_pieces(encoded.word_ids(i), len(words)) for i, words in enumerate(batch[words_in])]
        if not labelled:
            return {**encoded, "places": places}
        tags = [np.full(len(pieces), NO_TAG) for pieces in encoded["input_ids"]]
        for of_row, places_of_row, names in zip(tags, places, batch[tags_in], strict=True):
            for place, name in zip(places_of_row, names, strict=True):
                if place >= 0:
                    of_row[place] = ids[name]
        return {**encoded, "places": places, "labels": [of_row.tolist() for of_row in tags]}

    prepared = rows.map(encode, batched=True, remove_columns=rows.column_names)
    places = list(chain.from_iterable(prepared["places"][:]))
    if lost := places.count(-1):
        logger.warning(
            "%s: %d of %d words have no token, most of them after the first %d tokens (--max_seq_length): nothing is "
            "learned of them, and they are in no score.",
            *(source, lost, len(places), script.max_seq_length),
        )
    return prepared if split == "test" else prepared.remove_columns("places")


def compute_scores(predictions: np.ndarray, references: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Those of seqeval, for arrays of indices with -100 where there is no tag."""
    tagged = references != NO_TAG
    expected, predicted = (
        [[labels[i] for i in row[of_row]] for row, of_row in zip(tags, tagged, strict=True)]
        for tags in (references, predictions)
    )
    return {name: float(metric(expected, predicted)) for name, metric in METRICS.items()}


def make_run(args: list[str] | None = None) -> Run:
    choices = parse_args(args, ScriptArguments)
    script, training = choices.script, choices.training
    with training.main_process_first(desc="data"):
        splits = load_splits(script, training, HUB_SETS)
        labels = find_labels(splits, script)
        kind = AutoConfig.from_pretrained(script.model_name_or_path).model_type
        options = {"add_prefix_space": True} if kind in WITH_PREFIX_SPACE else {}
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path, **options)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        splits = {split: prepare(rows, split, labels, tokenizer, script) for split, rows in splits.items()}

    set_seed(training.seed)
    model = AutoModelForTokenClassification.from_pretrained(
        script.model_name_or_path,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        dtype="float32",  # in the half precision of many checkpoints, small updates would be rounded away
    )
    model.accepts_loss_kwargs = False  # its loss is a mean: a Trainer divides it by the steps that it accumulates

    def compute(output: EvalPrediction) -> dict[str, float]:
        return compute_scores(np.asarray(output.predictions), np.asarray(output.label_ids), labels)

    def predict(trainer: Trainer) -> None:
        output = run.predict(trainer)
        tags = [
            " ".join(labels[row[place]] if place >= 0 else "O" for place in places)
            for row, places in zip(output.predictions, splits["test"]["places"], strict=True)
        ]
        run.write_predictions(trainer, tags)

    run = Run(
        *("run_ner", choices, model, splits, METRICS, predict),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
    )
    return run


def main(args: list[str] | None = None) -> None:
    complete(make_run, args, tiny_entities)


if __name__ == "__main__":
    main()
