"""The scores of WebNLG 2017 as an `evaluate` module, loaded by path, without network.

From the repository root::

    import evaluate

    suite = evaluate.load("tasks/metrics/webnlg_nlg")
    suite.compute(predictions=["Aarhus is in Denmark."], references=[["Aarhus lies in Denmark."]])

A second argument, ``"challenge_2017"``, names the other protocol.
"""

import datasets
import evaluate

from tasks.metrics.webnlg import METRICS, score

_DESCRIPTION = """\
BLEU, METEOR 1.5 and TER of a whole set of outputs against multiple references: as microsoft/LoRA
has WebNLG/GenerationEval compute them (lora, the default), or BLEU and METEOR as the scripts of the
WebNLG Challenge 2017 do (challenge_2017).
"""
_CITATION = """\
@inproceedings{gardent2017webnlg,
  title = {The {WebNLG} Challenge: Generating Text from {RDF} Data},
  author = {Gardent, Claire and Shimorina, Anastasia and Narayan, Shashi and
            Perez-Beltrachini, Laura},
  booktitle = {Proceedings of INLG},
  year = {2017}
}
"""
_INPUTS = """
Args:
    predictions: one text per instance.
    references: for every instance a list of one or more texts.
Returns:
    The value by name of each metric, None where it cannot be computed here, and under "missing" the
    reason and the fix by name of metric. BLEU and METEOR are in [0, 1], TER is at least 0.
"""


class WebNLGNLG(evaluate.Metric):
    """The scores of one protocol (configuration ``default`` is ``lora``)."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", *METRICS):
            raise ValueError(
                f"unknown protocol {self.config_name!r} of webnlg_nlg; allowed are "
                f"{', '.join(METRICS)}"
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
            reference_urls=["https://github.com/WebNLG/GenerationEval"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]]
    ) -> dict[str, float | dict[str, str] | None]:
        protocol = "lora" if self.config_name == "default" else self.config_name
        scores = score(predictions, references, protocol=protocol)
        values = {name: scores.values.get(name) for name in METRICS[protocol]}
        return values | {"missing": scores.missing}
