"""The scores of GLUE as an `evaluate` module, loaded by path, without network.

From the repository root::

    import evaluate

    suite = evaluate.load("tasks/metrics/glue_scores", "cola")
    suite.compute(predictions=[1, 0, 1], references=[1, 0, 0])
"""

import datasets
import evaluate

from tasks.metrics.glue import score

#: task -> its scores.
TASKS = {
    "cola": ("matthews",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearman"),
}
_DESCRIPTION = """\
Accuracy, F1, Matthews, Pearson and Spearman correlation as scikit-learn and scipy define them.
"""
_CITATION = """\
@inproceedings{wang2019glue,
  title = {{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author = {Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and
            Bowman, Samuel R.},
  booktitle = {ICLR},
  year = {2019}
}
"""
_INPUTS = """
Args:
    predictions: class numbers, or real numbers for stsb.
    references: the right ones, in the same order.
Returns:
    The value by name of each score, None where it is undefined, and under "missing" the reason.
"""


class GlueScores(evaluate.Metric):
    """The scores of one task of GLUE, the configuration's name."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise ValueError(
                f"unknown task {self.config_name!r} of glue_scores; allowed are {', '.join(TASKS)}"
            )
        kind = "float64" if self.config_name == "stsb" else "int64"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value(kind), "references": datasets.Value(kind)}
            ),
            reference_urls=["https://gluebenchmark.com"],
        )

    def _compute(
        self, predictions: list[float], references: list[float]
    ) -> dict[str, float | dict[str, str] | None]:
        names = TASKS[self.config_name]
        scores = score(predictions, references, metrics=names)
        return {name: scores.values.get(name) for name in names} | {"missing": scores.missing}
