"""Beam search for causal language models: the recipe of microsoft/LoRA by means of `transformers`.

The search is `transformers`' own. What it shares with the recipe and where it differs
(recipe: examples/NLG/src/gpt2_beam.py):

1. The same: a hypothesis scores (sum of log-probabilities) / length ** length_penalty, where the
   length counts generated tokens with the end token and never the prompt; a hypothesis can end only
   among the best `num_beams` candidates of a step; after `max_new_tokens` the unfinished ones
   compete with the ended ones.
2. Made the same here: n-grams are blocked among *generated* tokens only (`transformers`' own block
   also counts the prompt, and would forbid to copy slot values from it), and probabilities are
   renormalised after the block, as if the logits had been blocked (`RepeatedNGramBlock`).
   `early_stopping="never"` stops only when no running beam can beat any finished one, which never
   changes the best hypothesis, so it stands for the recipe's "no early stopping".
3. Different: if a candidate ends, `transformers` fills its beam at once with the next best
   candidate; the recipe leaves it empty until the next step fills it from the remaining beams. So
   `transformers` searches a little wider.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class RepeatedNGramBlock(LogitsProcessor):
    """Give probability zero to tokens that would repeat an n-gram of the generated text.

    Args:
        size: n; 1 allows every token once.
        prompt_length: number of leading tokens that do not count.
    """

    def __init__(self, size: int, prompt_length: int):
        self.size = size
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Block and renormalise.

        Args:
            input_ids: (beams, length), prompt and what was generated.
            scores: (beams, vocabulary), logits or log-probabilities, float32.

        Returns:
            Log-probabilities of the tokens still allowed, -inf for the blocked ones.
        """
        generated = input_ids[:, self.prompt_length :]
        if generated.shape[1] >= self.size:
            windows_BWn = generated.unfold(1, self.size, 1)
            tail_B1n = generated[:, None, generated.shape[1] - self.size + 1 :]
            repeats_BW = (windows_BWn[:, :, :-1] == tail_B1n).all(dim=-1)
            # Counted, not written: a token may end several windows, only some of which repeat.
            counts = torch.zeros_like(scores).scatter_add_(
                1, windows_BWn[:, :, -1], repeats_BW.to(scores.dtype)
            )
            scores = scores.masked_fill(counts > 0, -torch.inf)
        return scores.log_softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Settings of a beam search.

    Attributes:
        num_beams: width; 1 is greedy search.
        length_penalty: exponent of the length that divides a hypothesis' log-probability; larger
            values favour longer texts.
        no_repeat_ngram_size: no n-gram of this size occurs twice in an output; 0 is off.
        max_new_tokens: longest output, end token included.
        early_stopping: ``"never"`` stops when nothing can get better, False by an estimate from the
            present length (faster), True at `num_beams` finished hypotheses.
        batch_size: prompts decoded at once; `batch_size * num_beams` sequences are in memory.
    """

    num_beams: int = 10
    length_penalty: float = 0.9
    no_repeat_ngram_size: int = 4
    max_new_tokens: int = 64
    early_stopping: bool | str = "never"
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, least in (
            ("num_beams", 1),
            ("no_repeat_ngram_size", 0),
            ("max_new_tokens", 1),
            ("batch_size", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"decoding.{name}={value!r}; allowed: integers from {least}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"decoding.early_stopping={self.early_stopping!r}; allowed: 'never', false, true"
            )

    def chunks(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the indices that are decoded together: neighbours in length, longest first."""
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        return [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]

    @torch.no_grad()
    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], end_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Decode one batch.

        Args:
            model: a causal language model of `transformers` in eval mode.
            prompts: token ids, none empty.
            end_tokens: ids that end a text.

        Returns:
            For each prompt the generated ids, without the prompt and without the end token.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: a prompt is empty, or the model has too few positions for the longest one.
        """
        if model.training:
            raise RuntimeError("decoding needs model.eval(): dropout would change the output")
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt is empty; give it at least one token")
        longest = max(len(prompt) for prompt in prompts)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and longest + self.max_new_tokens > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={self.max_new_tokens} need "
                f"{longest + self.max_new_tokens} positions but the model has {positions}; lower "
                "max_new_tokens or max_length"
            )
        padding = [longest - len(prompt) for prompt in prompts]
        pad = end_tokens[0]  # masked on the left; on the right it only follows an end token
        input_ids = torch.tensor(
            [[pad] * pads + list(prompt) for pads, prompt in zip(padding, prompts, strict=True)],
            device=model.device,
        )
        attention_mask = torch.tensor(
            [[0] * pads + [1] * (longest - pads) for pads in padding], device=model.device
        )
        processors = LogitsProcessorList()
        if self.no_repeat_ngram_size:
            processors.append(RepeatedNGramBlock(self.no_repeat_ngram_size, longest))
        settings = GenerationConfig(
            do_sample=False,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(end_tokens),
            pad_token_id=pad,
        )
        with _no_defaults(model):
            output = model.generate(
                input_ids,
                attention_mask=attention_mask,
                generation_config=settings,
                logits_processor=processors,
            )
        return [_until(row, end_tokens) for row in output[:, longest:].tolist()]


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """Hide the generation settings of a checkpoint, which `generate` would merge into ours."""
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


def _until(tokens: list[int], end_tokens: Sequence[int]) -> list[int]:
    """Return `tokens` up to the first end token."""
    ends = set(end_tokens)
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
