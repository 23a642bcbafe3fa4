"""Fine-tuning with frozen embeddings, the dagger rows of the paper's tables.

Zi et al., arXiv 2309.02411, Tables 1 to 4: "Fine-tuning" with a dagger, embeddings frozen. The
printed sizes tell which: 354.92M - 305.84M (GPT2-Medium), 387.5M - 338.4M (BART-Large) and
118.87M - 82M (RoBERTa-base) are the word tables alone, in units of 2^20; positions train.

Update: ``theta <- AdamW(theta, dL/dtheta)`` for every parameter that embeds no token.

State kept: none beyond the optimiser's (two float32 tensors of the size of what trains).

Details:
1. What embeds tokens: `projections.token_embedding_parameters`. Positions and token types train.
2. A tied LM head (GPT-2, BART) is the same tensor as the token embedding, so it is frozen as well;
   an untied one (Llama) trains.
3. LayerNorms behind an embedding train; the paper names only the embeddings.
4. Frozen means no gradient, no optimiser state and no weight decay: the values stay to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from delta_lora.method_bases import WeightsMethod
from delta_lora.projections import token_embedding_parameters


class FullFrozenEmbeddings(WeightsMethod):
    """Fine-tuning of everything but the token embeddings (dagger).

    Args:
        learning_rate: peak learning rate, above 0.
    """

    name = "full_frozen_embeddings"

    def choose(
        self, model: nn.Module, projections: Sequence[str] | None, head: Sequence[str]
    ) -> None:
        """Freeze the token embeddings.

        Raises:
            ValueError: the model has no embedding.
        """
        for parameter in token_embedding_parameters(model).values():
            parameter.requires_grad_(False)
