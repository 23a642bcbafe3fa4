"""ROUGE of summaries as an `evaluate` module, loaded by path, without network.

From the repository root::

    import evaluate

    suite = evaluate.load("tasks/metrics/summary_rouge")
    suite.compute(predictions=["A cat sat."], references=["The cat sat."])

A second argument names one metric: ``evaluate.load("tasks/metrics/summary_rouge", "rouge_2")``.
``compute(..., aggregate="bootstrap", seed=1)`` gives the middle value of a bootstrap instead of the
mean.
"""

import datasets
import evaluate

from tasks.metrics.rouge import METRICS, score

_DESCRIPTION = """\
ROUGE-1, -2, -L and -Lsum (F1, Porter stemmer) of rouge-score, one reference a summary.
"""
_CITATION = """\
@inproceedings{lin2004rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004}
}
"""
_INPUTS = """
Args:
    predictions: one summary per document.
    references: one text per document.
    aggregate: mean or bootstrap.
    seed: of the bootstrap.
Returns:
    The value by name of each metric, in [0, 1].
"""


class SummaryRouge(evaluate.Metric):
    """The four scores (configuration ``default``) or one of them (its name)."""

    def _info(self) -> evaluate.MetricInfo:
        names = ("default", *METRICS)
        if self.config_name not in names:
            raise ValueError(
                f"unknown metric {self.config_name!r} of summary_rouge; allowed are "
                f"{', '.join(names)}"
            )
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
            reference_urls=["https://pypi.org/project/rouge-score"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        aggregate: str = "mean",
        seed: int = 0,
    ) -> dict[str, float]:
        names = tuple(METRICS) if self.config_name == "default" else (self.config_name,)
        return score(predictions, references, metrics=names, aggregate=aggregate, seed=seed).values
