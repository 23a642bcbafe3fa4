"""Beam search by means of `transformers`: two recipes, one for each family of models.

`BeamSearch` is for causal models, after microsoft/LoRA. The search is `transformers`' own. What it
shares with the recipe and where it differs (recipe: examples/NLG/src/gpt2_beam.py):

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

`Seq2SeqBeamSearch` is for encoder-decoders, after AdaLoRA's summarisation script, which calls
`transformers`' search with a width and a maximum length and leaves all else to the checkpoint. So
nothing is changed in it here: n-grams are blocked in the decoder's text, and probabilities are not
renormalised behind the block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from delta_lora.checks import OneOf, Range, check_values
from delta_lora.positions import num_positions

NumBeams = Annotated[int, Range(at_least=1, at_most=256, why="each is a whole text in memory")]
#: of a text's length: beyond 10 a score overflows.
LengthPenalty = Annotated[float, Range(at_least=-10, at_most=10)]
NGramSize = Annotated[int, Range(at_least=0, at_most=1024)]
EarlyStopping = Annotated[bool | str, OneOf((True, False, "never"))]
NumSequences = Annotated[int, Range(at_least=1, at_most=4096, why="all are in memory at once")]


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

    #: key in the names of runs.
    name: ClassVar[str] = "beam_search"

    num_beams: NumBeams = 10
    length_penalty: LengthPenalty = 0.9
    no_repeat_ngram_size: NGramSize = 4
    max_new_tokens: Annotated[int, Range(at_least=1, at_most=2**20)] = 64
    early_stopping: EarlyStopping = "never"
    batch_size: NumSequences = 32

    def __post_init__(self) -> None:
        check_values(BeamSearch, vars(self), prefix="task.decoding.")

    def check_room(self, positions: int) -> None:
        """Check that a model of so many positions has room for a prompt and an output.

        Raises:
            ValueError: it has none.
        """
        if self.max_new_tokens >= positions:
            raise ValueError(
                f"task.decoding.max_new_tokens={self.max_new_tokens} leaves no room for a prompt "
                f"within {positions} tokens; use at most {positions - 1}, less by the longest "
                "prompt"
            )

    def check_prompt(self, longest: int, positions: int) -> None:
        """Check that the longest prompt and an output find room.

        Raises:
            ValueError: they do not.
        """
        needed = longest + self.max_new_tokens
        if needed > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and task.decoding.max_new_tokens="
                f"{self.max_new_tokens} need {needed} positions but the model has {positions}; "
                "lower max_new_tokens or max_length"
            )

    def chunks(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the indices that are decoded together: neighbours in length, longest first."""
        return _chunks(lengths, self.batch_size)

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
        positions = num_positions(model.config)
        if positions is not None:
            self.check_prompt(longest, positions)
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


@dataclass(frozen=True, kw_only=True)
class Seq2SeqBeamSearch:
    """Settings of a beam search with an encoder-decoder; None leaves one to the checkpoint.

    Attributes:
        num_beams: width; 1 is greedy search.
        max_length: longest decoder text in tokens; as in `transformers` the start token counts.
        length_penalty: exponent of the length that divides a hypothesis' log-probability.
        no_repeat_ngram_size: no n-gram of this size occurs twice in an output; 0 is off.
        early_stopping: True at `num_beams` finished hypotheses, False by an estimate from the
            present length, ``"never"`` when nothing can get better.
        forced_bos: whether every output must begin with the model's begin token.
        forced_eos: whether an output of `max_length` tokens must end with the end token.
        batch_size: sources decoded at once; `batch_size * num_beams` texts are in memory.
    """

    #: key in the names of runs.
    name: ClassVar[str] = "seq2seq_beam_search"

    num_beams: NumBeams = 8
    max_length: Annotated[int, Range(at_least=2, at_most=2**20)] = 64
    length_penalty: LengthPenalty | None = None
    no_repeat_ngram_size: NGramSize | None = None
    early_stopping: EarlyStopping | None = None
    forced_bos: bool | None = None
    forced_eos: bool | None = None
    batch_size: NumSequences = 16

    def __post_init__(self) -> None:
        check_values(Seq2SeqBeamSearch, vars(self), prefix="task.decoding.")

    def check_room(self, positions: int) -> None:
        """Check that a decoder of so many positions has room for an output.

        Raises:
            ValueError: it has none.
        """
        if self.max_length > positions:
            raise ValueError(
                f"task.decoding.max_length={self.max_length}, but the model has {positions} "
                f"positions; use at most {positions}"
            )

    def check_source(self, longest: int, positions: int) -> None:
        """Check that an encoder of so many positions has room for the longest source.

        Raises:
            ValueError: it has none.
        """
        if longest > positions:
            raise ValueError(
                f"a source of {longest} tokens, but the model has {positions} positions; lower "
                "task.max_source_length"
            )

    def chunks(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the indices that are decoded together: neighbours in length, longest first."""
        return _chunks(lengths, self.batch_size)

    def settings(self, model: Any) -> tuple[GenerationConfig, dict[str, dict[str, Any]]]:
        """Return what a search with `model` uses, and the same for a record.

        Args:
            model: an encoder-decoder of `transformers`; its `generation_config` is the checkpoint's
                (made from ``config.json`` where the checkpoint has no file of its own).

        Returns:
            The settings, and for each of them ``{"value", "origin"}``. Origins are ``recipe`` (a
            value of this class), ``checkpoint``, and ``default`` where neither says anything.

        Raises:
            ValueError: the checkpoint names no start or end token, or none to force.
        """
        checkpoint = model.generation_config
        ids = {
            name: getattr(checkpoint, name)
            if getattr(checkpoint, name, None) is not None
            else getattr(model.config, name, None)
            for name in ("decoder_start_token_id", "eos_token_id", "bos_token_id", "pad_token_id")
        }
        chosen: dict[str, Any] = {
            "num_beams": self.num_beams,
            "max_length": self.max_length,
            "do_sample": False,
        }
        for name in ("length_penalty", "no_repeat_ngram_size", "early_stopping"):
            if getattr(self, name) is not None:
                chosen[name] = getattr(self, name)
        for end, is_forced in (("bos", self.forced_bos), ("eos", self.forced_eos)):
            if is_forced is not None:
                chosen[f"forced_{end}_token_id"] = ids[f"{end}_token_id"] if is_forced else None
        needed = ["decoder_start_token_id", "eos_token_id"] + ["bos_token_id"] * bool(
            self.forced_bos
        )
        if missing := [name for name in needed if ids[name] is None]:
            raise ValueError(
                f"{type(model).__name__} has no {', '.join(missing)}, which decoding needs; set it "
                "in model.config_overrides"
            )
        _check_ids(model, ids)
        stored = {
            name: value
            for name, value in checkpoint.to_dict().items()
            if value is not None and name not in _NOT_SETTINGS
        }
        stored |= {name: value for name, value in ids.items() if value is not None}
        values = {**_DEFAULTS, **stored, **chosen}
        record = {
            name: {
                "value": value,
                "origin": "recipe"
                if name in chosen
                else "checkpoint"
                if name in stored
                else "default",
            }
            for name, value in sorted(values.items())
        }
        if values.get("pad_token_id") is None:  # only ever behind an end token
            end_token = values["eos_token_id"]
            values["pad_token_id"] = end_token[0] if isinstance(end_token, list) else end_token
        return GenerationConfig(**copy.deepcopy(values), use_cache=True), record

    @torch.no_grad()
    def generate(self, model: Any, sources: Sequence[Tensor]) -> list[list[int]]:
        """Decode one batch.

        Args:
            model: an encoder-decoder of `transformers` in eval mode.
            sources: (S,) token ids of each source, none empty.

        Returns:
            For each source the generated ids, without the start token and what stands from the
            first end token on.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: a source is empty, the model has too few positions, or see `settings`.
        """
        if model.training:
            raise RuntimeError("decoding needs model.eval(): dropout would change the output")
        if any(len(source) == 0 for source in sources):
            raise ValueError("a source is empty; give it at least one token")
        longest = max(len(source) for source in sources)
        positions = num_positions(model.config)
        if positions is not None:
            self.check_room(positions)
            self.check_source(longest, positions)
        settings, _ = self.settings(model)
        input_ids = torch.zeros(len(sources), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, source in enumerate(sources):
            input_ids[row, : len(source)] = source
            attention_mask[row, : len(source)] = 1
        with _no_defaults(model):
            output = model.generate(
                input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=settings,
            )
        ends = settings.eos_token_id
        end_tokens = ends if isinstance(ends, list) else [ends]
        return [_until(row[1:], end_tokens) for row in output.tolist()]


#: what `transformers` does where neither recipe nor checkpoint says anything.
_DEFAULTS: dict[str, Any] = {
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "early_stopping": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "repetition_penalty": 1.0,
}
#: what a checkpoint's generation settings hold that is no choice of a beam search.
_NOT_SETTINGS = frozenset(
    {
        "_from_model_config",
        "transformers_version",
        "use_cache",
        "max_new_tokens",  # it would take the place of `max_length`
        "num_return_sequences",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        # Of sampling, which the recipe turns off.
        "temperature",
        "top_k",
        "top_p",
    }
)


def _chunks(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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


def _check_ids(model: Any, ids: dict[str, Any]) -> None:
    """Refuse numbers of special tokens that a model has not."""
    size = getattr(model.config, "vocab_size", None)
    if size is None:  # of two parts, each with its own
        return
    for name, value in ids.items():
        for each in value if isinstance(value, list) else [value]:
            is_number = isinstance(each, int) and not isinstance(each, bool)
            if each is not None and not (is_number and 0 <= each < size):
                raise ValueError(
                    f"{name}={value!r} of {model.config.name_or_path or type(model).__name__} "
                    f"(config.json or generation_config.json) is no token of {size}; correct it, "
                    f"or set model.config_overrides.{name}"
                )
        if isinstance(value, list) and not value:
            raise ValueError(
                f"{name}=[] of {model.config.name_or_path or type(model).__name__} names no token; "
                "correct it in generation_config.json"
            )
