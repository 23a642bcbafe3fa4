"""LoRA: a trained low-rank change beside the frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

As printed (equation 3): ``h = W_0 x + Delta W x = W_0 x + B A x``, scaled by alpha / r.
In our symbols: ``h = W x + scaling * lora_B @ lora_A @ dropout(x)``, ``scaling = alpha / rank``.

Deviations: none from microsoft/LoRA's layers; GPT-2's query and value have an A and a B each
(`MergedLinear`), where PEFT gives the fused layer one A and adapts the key too.

State kept: none beyond the optimiser's.

Details:
1. A is Kaiming uniform with a = sqrt 5, B zero (`low_rank.LowRankBranch`).
2. Dropout acts on the input of the branch only, one mask for query and value of a fused layer.
3. The controls `lora_no_dropout`, `lora_scaled` (alpha times 1 + lambda) and `lora_high_lr` are
   this class with other values.
"""

from __future__ import annotations

from delta_lora.method_bases import LowRankMethod


class Lora(LowRankMethod):
    """LoRA on W_Q and W_V: `LowRankMethod` as it is, where the settings are described."""

    name = "lora"
