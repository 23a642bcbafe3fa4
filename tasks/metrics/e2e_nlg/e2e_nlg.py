"""The scores of the E2E NLG challenge as an `evaluate` module, loaded by path, without network.

From the repository root::

    import evaluate

    suite = evaluate.load("tasks/metrics/e2e_nlg")
    suite.compute(predictions=["Blue Spice is cheap."], references=[["Blue Spice is a cheap pub."]])

A second argument names one metric: ``evaluate.load("tasks/metrics/e2e_nlg", "nist_perl")``.
"""

import datasets
import evaluate

from tasks.metrics.e2e import METRICS, OPTIONAL_METRICS, score

_DESCRIPTION = """\
BLEU, NIST, METEOR 1.5, ROUGE-L and CIDEr of a whole set of outputs against multiple references,
equal to tuetschek/e2e-metrics with option -p; nist_perl is the NIST of its Perl script.
"""
_CITATION = """\
@article{dusek2020evaluating,
  title = {Evaluating the State-of-the-Art of End-to-End Natural Language Generation:
           The E2E NLG Challenge},
  author = {Du\\v{s}ek, Ond\\v{r}ej and Novikova, Jekaterina and Rieser, Verena},
  journal = {Computer Speech & Language},
  volume = {59},
  year = {2020}
}
"""
_INPUTS = """
Args:
    predictions: one text per instance.
    references: for every instance a list of one or more texts.
Returns:
    The value by name of each metric, None where it cannot be computed here, and under "missing" the
    reason and the fix by name of metric. BLEU, METEOR and ROUGE-L are in [0, 1].
"""


class E2ENLG(evaluate.Metric):
    """The five scores (configuration ``default``) or one of them (its name)."""

    def _info(self) -> evaluate.MetricInfo:
        names = ("default", *METRICS, *OPTIONAL_METRICS)
        if self.config_name not in names:
            raise ValueError(
                f"unknown metric {self.config_name!r} of e2e_nlg; allowed are {', '.join(names)}"
            )
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://github.com/tuetschek/e2e-metrics"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]]
    ) -> dict[str, float | dict[str, str] | None]:
        metrics = METRICS if self.config_name == "default" else (self.config_name,)
        scores = score(predictions, references, metrics=metrics)
        return {name: scores.values.get(name) for name in metrics} | {"missing": scores.missing}
