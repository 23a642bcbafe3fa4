"""Delta-LoRA as a plain LoRA of rank 2r: the factors, and the folder that PEFT reads.

Zi et al., arXiv 2309.02411. The updates of Algorithm 1 telescope, so with A_k and B_k as they stood
before the first update of W the whole change of a layer is

``(1 + update_ratio) * scaling * B_T @ A_T - update_ratio * scaling * B_k @ A_k``,

which is one product of rank 2r on the untouched base.

Shape suffixes: I inputs, O outputs, R rank, S twice the rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
            "this works on adapters of PEFT, but the package peft is not installed; "
            'install it with: pip install "delta-lora[peft]"'
        ) from error
    return peft


@torch.no_grad()
def stack_factors(
    now: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    *,
    update_ratio: float,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return A (2 rank, in) and B (out, 2 rank) whose product is the whole change of a layer.

    ``A = [A_T; A_k]`` and ``B = [(1 + update_ratio) * scaling * B_T, -update_ratio * scaling *
    B_k]``, so the scaling of the new branch is 1.

    Args:
        now: A_T (rank, in) and B_T (out, rank), the trained factors.
        first: A_k and B_k, the factors just before the first update of W; where W was never
            updated, the trained factors, which gives ``scaling * B_T @ A_T``.
        update_ratio: lambda.
        scaling: alpha / rank of the trained branch.

    Returns:
        The factors, in the type of the trained ones.
    """
    (A_RI, B_OR), (A_first_RI, B_first_OR) = now, first
    A_SI = torch.cat([A_RI, A_first_RI.to(A_RI)])
    B_OS = torch.cat(
        [
            (1 + update_ratio) * scaling * B_OR,
            -update_ratio * scaling * B_first_OR.to(B_OR),
        ],
        dim=1,
    )
    return A_SI, B_OS


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
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PEFT_WEIGHTS, tensors)
    plain.save_pretrained(str(folder))
