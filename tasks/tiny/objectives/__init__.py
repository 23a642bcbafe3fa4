"""What a tiny model learns from the general corpus: the objectives of its pre-training.

* `Causal`: every token from those before it (GPT-2).
* `Masked`: masked tokens of one text or of a pair, and verdicts (RoBERTa).
* `Denoising`: a text from a damaged copy of it (BART).

An objective turns sequences of documents into examples of fixed size, examples into a batch, and a
batch into a summed loss. All that is random in the examples is a function of a seed and of the
position in the corpus, so every process and every session sees the same ones.
"""

from tasks.tiny.objectives.base import Group, Objective
from tasks.tiny.objectives.causal import Causal
from tasks.tiny.objectives.denoising import Denoising
from tasks.tiny.objectives.masked import Masked

__all__ = ["Causal", "Denoising", "Group", "Masked", "Objective"]
