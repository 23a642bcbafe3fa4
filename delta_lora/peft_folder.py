"""The package PEFT, and the folder in which it reads a LoRA.

Shape suffixes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from delta_lora import writing
from delta_lora.checkpoint import write_tensors

#: the file that PEFT reads a LoRA from.
PEFT_WEIGHTS = "adapter_model.safetensors"


def import_peft() -> Any:
    """Return the module `peft`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"this needs the package peft, which is not installed ({error}); "
            'install it with: pip install "delta-lora[peft]"'
        ) from error
    return peft


def write_peft_folder(
    folder: Path,
    *,
    config: Any,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a LoRA of scaling 1 that `peft.PeftModel.from_pretrained` reads.

    Args:
        folder: made if it is missing; files of the same name are replaced.
        config: the `peft.LoraConfig` that says which layers are adapted; rank, alpha, dropout and
            initialisation are replaced, the rest is kept.
        factors: A (rank, in) and B (out, rank) of every layer, by its name in the `PeftModel`
            (``base_model.model.roberta.encoder.layer.0.attention.self.query``).
        others: more tensors of the adapter under the names of `peft.get_peft_model_state_dict`
            (``modules_to_save``, biases).

    Raises:
        WriteError: a file cannot be written; the message has its path.
    """
    ranks = {name: A_RI.shape[0] for name, (A_RI, _) in factors.items()}
    common = max(ranks.values())
    # PEFT's keys are regular expressions for the end of a layer's name, here for the whole name.
    odd = {
        f"^{re.escape(name.removeprefix('base_model.model.'))}": rank
        for name, rank in ranks.items()
        if rank != common
    }
    plain = copy.deepcopy(config)
    plain.r = plain.lora_alpha = common
    plain.rank_pattern, plain.alpha_pattern = dict(odd), dict(odd)
    plain.lora_dropout = 0.0
    plain.use_rslora = False
    plain.init_lora_weights = True
    plain.inference_mode = True
    tensors = dict(others or {})
    for name, (A_RI, B_OR) in factors.items():
        tensors[f"{name}.lora_A.weight"] = A_RI
        tensors[f"{name}.lora_B.weight"] = B_OR
    with writing.filling(folder) as temporary:
        write_tensors(temporary / PEFT_WEIGHTS, tensors)
        plain.save_pretrained(str(temporary))
