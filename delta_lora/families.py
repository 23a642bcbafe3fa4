"""The families of models, in one table: their names here, in transformers and in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Family:
    """A kind of model, by what its head is for.

    Attributes:
        auto_class: the class of transformers that loads one from a folder.
        endings: how the names of its classes end.
        peft_task: PEFT's name for it; None where PEFT has none.
    """

    auto_class: str
    endings: tuple[str, ...]
    peft_task: str | None = None


#: by the name that a configuration gives it (``model.family``).
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "causal_lm": Family("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), "CAUSAL_LM"),
        "masked_lm": Family("AutoModelForMaskedLM", ("ForMaskedLM",)),
        "seq2seq_lm": Family(
            "AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "MTModel"), "SEQ_2_SEQ_LM"
        ),
        "sequence_classification": Family(
            "AutoModelForSequenceClassification", ("ForSequenceClassification",), "SEQ_CLS"
        ),
    }
)


def family_of(model: object) -> str | None:
    """Return the family of a model by the name of its class, or None where it is of none."""
    name = type(model).__name__
    return next((key for key, family in FAMILIES.items() if name.endswith(family.endings)), None)
