"""Full fine-tuning: every weight trains.

The first row of the paper's tables (Zi et al., arXiv 2309.02411, Tables 1 to 4).

Update: ``theta <- AdamW(theta, dL/dtheta)`` for every parameter.

State kept: none beyond the optimiser's (two float32 tensors of the size of the model).

Details:
1. A parameter that the model itself holds fixed (sinusoidal positions) stays fixed.
2. `projections` and `head` change nothing: both train anyway. A head that the model lacks is still
   an error, because it means the wrong model.
"""

from __future__ import annotations

from delta_lora.method_bases import WeightsMethod


class Full(WeightsMethod):
    """Full fine-tuning: `WeightsMethod` as it is, where the settings are described."""

    name = "full"
