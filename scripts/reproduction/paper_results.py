"""The numbers that the paper reports, as data: tables 1 to 4. Table 5 is in `tasks/presets.py`."""

from typing import NamedTuple

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "sst2", "stsb")


class Row(NamedTuple):
    """
    Of table 1, in percent.

    Attributes:
        method: as in `cells.py`.
        ratio: the rank ratio that leaves so many parameters.
        parameters: in millions, without the embedding layer.
        scores: of CoNLL, then of the tasks of [`GLUE`].
        glue_average: over those of GLUE.
        all_average: over all.
    """

    method: str
    ratio: float
    parameters: float
    scores: tuple[float, ...]
    glue_average: float
    all_average: float

    @property
    def by_task(self) -> dict[str, float]:
        """The scores by the names of the tasks."""
        return dict(zip(("conll2003", *GLUE), self.scores, strict=True))


TABLE1_TITLE = "BERT-base, Hua et al. 2023"
TABLE1 = (
    Row("none", 1.0, 86.2, (94.1, 56.2, 84.7, 87.4, 91.3, 87.8, 93.0, 88.5), 84.1, 85.4),
    Row("svd", 0.33, 43.1, (92.4, 40.5, 82.8, 84.1, 89.6, 87.3, 90.9, 85.7), 80.1, 81.6),
    Row("fwsvd", 0.33, 43.1, (93.2, 49.4, 83.0, 88.0, 89.5, 87.6, 91.2, 87.0), 82.2, 83.6),
    Row("tfwsvd", 0.33, 43.1, (94.2, 52.2, 83.4, 89.0, 90.3, 86.9, 91.1, 88.5), 83.1, 84.4),
    Row("rankdyna", 0.33, 43.1, (94.3, 54.5, 83.2, 89.5, 90.6, 88.0, 90.9, 89.0), 83.7, 85.0),
    Row("svd", 0.2, 26.6, (92.8, 19.3, 81.0, 82.0, 86.6, 86.9, 89.2, 80.6), 75.1, 77.3),
    Row("fwsvd", 0.2, 26.6, (92.9, 38.7, 81.4, 80.3, 88.0, 87.2, 88.4, 82.9), 78.1, 80.0),
    Row("tfwsvd", 0.2, 26.6, (93.5, 39.3, 82.2, 88.3, 88.8, 87.0, 89.9, 87.0), 80.4, 82.0),
    Row("rankdyna", 0.2, 26.6, (93.3, 49.1, 82.5, 88.0, 89.2, 87.5, 90.7, 88.3), 82.1, 83.6),
    Row("svd", 0.1, 13.9, (90.4, 13.8, 78.0, 82.0, 79.6, 84.1, 87.5, 58.7), 69.1, 71.7),
    # 3.5 is what is printed, and the average was taken of it.
    Row("fwsvd", 0.1, 13.9, (3.5, 18.7, 78.2, 78.6, 82.3, 84.5, 88.9, 67.9), 71.3, 62.8),
    Row("tfwsvd", 0.1, 13.9, (91.9, 21.4, 79.1, 85.0, 84.3, 85.9, 89.0, 86.0), 75.8, 77.8),
    Row("rankdyna", 0.1, 13.9, (91.6, 36.2, 81.3, 84.7, 87.6, 86.8, 88.2, 86.4), 78.7, 80.4),
    Row("svd", 0.05, 6.4, (87.4, 0.0, 71.6, 74.7, 65.8, 79.8, 84.3, 22.7), 57.0, 60.8),
    Row("fwsvd", 0.05, 6.4, (88.4, 17.2, 73.5, 80.9, 71.2, 81.3, 84.9, 39.2), 64.0, 67.1),
    Row("tfwsvd", 0.05, 6.4, (87.8, 17.8, 76.7, 81.2, 76.5, 83.4, 81.3, 45.3), 66.0, 68.8),
    Row("rankdyna", 0.05, 6.4, (88.4, 21.3, 79.2, 82.1, 85.5, 86.1, 87.5, 83.3), 75.0, 76.7),
)

# ROUGE-1, ROUGE-2 and ROUGE-L of BART-base on SAMSum at rank ratio 0.2, in percent.
TABLE2_TITLE = "BART-base on SAMSum, Hua et al. 2023"
TABLE2 = {
    "none": (52.1, 27.3, 43.5),
    "svd": (45.3, 21.3, 37.5),
    "fwsvd": (47.0, 22.6, 38.8),
    "tfwsvd": (47.8, 23.1, 39.3),
    "rankdyna": (48.4, 23.4, 39.7),
}

# Perplexities of GPT-2 at rank ratio 0.2.
TABLE3_TITLE = "GPT-2, Hua et al. 2023"
TABLE3 = {
    "none": {"wikitext2": 20.9, "ptb": 21.4},
    "svd": {"wikitext2": 124.7, "ptb": 79.6},
    "fwsvd": {"wikitext2": 121.6, "ptb": 72.2},
    "tfwsvd": {"wikitext2": 79.3, "ptb": 62.9},
    "rankdyna": {"wikitext2": 77.7, "ptb": 39.4},
}

# Section 4.5.2 gives the orders of magnitude of table 4.
TABLE4_TITLE = "BERT-base, Hua et al. 2023, orders of magnitude"
TABLE4 = {"first_order": 1e-5, "second_order": 1e-9, "fisher": 1e-8}
