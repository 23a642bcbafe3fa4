"""Initial weights that let tiny models compare and copy after a hundred steps.

A model of a million parameters and a minute of training hardly leaves the level of word frequencies
if its attention has to be found from random weights. So it starts from what trained models are
known to have (mimetic initialisation: Trockman and Kolter, "Mimetic Initialization of
Self-Attention Layers", ICML 2023, arXiv 2305.09828). Here the first half H1 of the hidden
dimensions holds positions at first, the second half H2 words.

1. Positions are sinusoids in H1; words are random in H2, with the length that they had.
2. A *shifted* head looks s positions away: ``W_K = W_Q R`` on H1, where R turns the sinusoids by s.
3. A *matching* head looks at equal words: ``W_K = W_Q M`` on H2. M decides where: it mirrors the
   direction in which segments differ (equal tokens of the other text), or turns back the words that
   a shifted head has written beside each token (tokens behind an equal token).
4. A *spread* head looks at all tokens alike: ``W_Q = 0``.
5. The output of such a head can be a copy of what it sees: ``W_O = c U W_V^T``; with c < 0 what two
   texts have in common cancels.
6. The bias of the output layer is the logarithm of the frequencies of the tokens.

All other weights stay random, and all of them are trained.

Shapes: D hidden dimensions, H = D/2, E dimensions of a head, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: amplitude of the sinusoids (words: the model's initial range in each dimension).
POSITION_SCALE = 0.12
#: length of the segment embeddings.
SEGMENT_SCALE = 0.3
#: factor on W_Q and W_K, so that one token stands out among a hundred.
SHARPNESS = 3.0
#: size of c in ``W_O = c U W_V^T``.
OUTPUT_SCALE = 2.0
#: the same where the whole text is summed up: a word is one of many there.
SUMMARY_SCALE = 6.0
#: longest wave of the sinusoids, in positions, over 2 pi; the shortest is 1.
LONGEST_WAVE = 30.0
NUM_HEADS = 4


@torch.no_grad()
def initialise_encoder(model: Any, counts_V: Tensor) -> None:
    """Change the random weights of a RoBERTa with a language-modelling head in place.

    In the first layer heads 1 and 2 look one token back and ahead, behind it at the whole text. In
    every layer heads 3 and 4 look at equal tokens of the other text, which are subtracted.

    Args:
        model: `RobertaForMaskedLM` with two segments and at least four heads.
        counts_V: (V,) how often each token is a target.

    Raises:
        ValueError: the model has another architecture.
    """
    config = model.config
    _check(config, "roberta", heads=getattr(config, "num_attention_heads", 0))
    if config.type_vocab_size != 2:
        raise ValueError(
            f"model.architecture.type_vocab_size={config.type_vocab_size}: pairs have 2 segments; "
            "write 2"
        )
    size, half = config.hidden_size, config.hidden_size // 2
    embeddings = model.roberta.embeddings
    _set_words(embeddings.word_embeddings.weight)
    _set_positions(embeddings.position_embeddings.weight)
    apart_D = torch.zeros(size)
    apart_D[half:] = nn.functional.normalize(torch.randn(half), dim=0)
    embeddings.token_type_embeddings.weight[:] = SEGMENT_SCALE * torch.stack([apart_D, -apart_D])
    mirror_DD = torch.eye(size) - 2 * torch.outer(apart_D, apart_D)
    beside_DD = torch.eye(size)
    beside_DD[half:, half:] = torch.linalg.qr(torch.randn(half, half)).Q
    for number, layer in enumerate(model.roberta.encoder.layer):
        attention = layer.attention.self
        heads = _Heads(
            config.num_attention_heads, attention.query, attention.key, attention.value,
            layer.attention.output.dense,
        )  # fmt: skip
        if number == 0:
            heads.shift([0], -1)
            heads.shift([1], 1)
            heads.copy([0], beside_DD, OUTPUT_SCALE)
            heads.copy([1], beside_DD.T, OUTPUT_SCALE)
        else:
            heads.spread([0, 1])
            heads.copy([0, 1], torch.eye(size), SUMMARY_SCALE)
        heads.match([2, 3], mirror_DD)
        heads.copy([2, 3], torch.eye(size), -OUTPUT_SCALE)
    model.lm_head.bias.copy_(_log_shares(counts_V))


@torch.no_grad()
def initialise_encoder_decoder(model: Any, counts_V: Tensor) -> None:
    """Change the random weights of a BART in place.

    In the first encoder layer heads 1 and 3 write the token before beside each token. In every
    decoder layer heads 1 and 2 of the attention to the encoder look behind tokens that equal the
    last one written, and copy what stands there.

    Args:
        model: `BartForConditionalGeneration` with at least four heads on both sides.
        counts_V: (V,) how often each token is a target.

    Raises:
        ValueError: the model has another architecture.
    """
    config = model.config
    heads_of_both = (
        getattr(config, "encoder_attention_heads", 0),
        getattr(config, "decoder_attention_heads", 0),
    )
    _check(config, "bart", heads=min(heads_of_both))
    size, half = config.d_model, config.d_model // 2
    beside_DD = torch.eye(size)
    beside_DD[half:, half:] = torch.linalg.qr(torch.randn(half, half)).Q
    _set_words(model.model.shared.weight)
    for part in (model.model.encoder, model.model.decoder):
        _set_positions(part.embed_positions.weight)
    for number, layer in enumerate(model.model.encoder.layers):
        heads = _Heads.of_bart(layer.self_attn)
        heads.shift([0], -1)
        heads.shift([1], 1)
        if number == 0:
            heads.shift([2], -1)
            heads.copy([0, 2], beside_DD, OUTPUT_SCALE)
    for layer in model.model.decoder.layers:
        _Heads.of_bart(layer.self_attn).shift([0], -1)
        heads = _Heads.of_bart(layer.encoder_attn)
        heads.match([0, 1], beside_DD.T)
        heads.copy([0, 1], torch.eye(size), OUTPUT_SCALE)
    model.final_logits_bias[0] = _log_shares(counts_V)


def _check(config: Any, model_type: str, *, heads: int) -> None:
    size = getattr(config, "hidden_size", 0)
    if config.model_type != model_type or heads < NUM_HEADS or size % (2 * heads) or size % 4:
        own = {
            k: v for k, v in config.to_dict().items() if k.endswith(("attention_heads", "d_model"))
        }
        raise ValueError(
            f"model.architecture: a {config.model_type} of {heads} heads and {size} hidden "
            f"dimensions ({', '.join(f'{k}={v}' for k, v in own.items())}) cannot be initialised; "
            f"needed: a {model_type} with at least {NUM_HEADS} heads, and dimensions "
            "that are a multiple of 4 and of twice the heads; set them so"
        )


class _Heads:
    """The heads of one attention layer; numbers start at 0."""

    def __init__(self, num_heads: int, query: Any, key: Any, value: Any, output: Any) -> None:
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (
            linear.weight for linear in (query, key, value, output)
        )
        self.size = self.query.shape[1]

    @classmethod
    def of_bart(cls, attention: Any) -> _Heads:
        """Return those of a `BartAttention`."""
        return cls(
            attention.num_heads,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.out_proj,
        )

    def _rows(self, heads: Sequence[int]) -> Tensor:
        width = self.size // self.num_heads
        return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])

    def shift(self, heads: Sequence[int], distance: int) -> None:
        """Look `distance` positions ahead."""
        rows = self._rows(heads)
        query_ED = SHARPNESS * self.query[rows]
        query_ED[:, self.size // 2 :] = 0
        self.query[rows] = query_ED
        self.key[rows] = query_ED @ _rotation(self.size, -distance)

    def spread(self, heads: Sequence[int]) -> None:
        """Look at all tokens alike."""
        self.query[self._rows(heads)] = 0

    def match(self, heads: Sequence[int], turn_DD: Tensor) -> None:
        """Look at tokens whose words, turned by `turn_DD`, are one's own."""
        rows = self._rows(heads)
        query_ED = SHARPNESS * self.query[rows]
        query_ED[:, : self.size // 2] = 0
        self.query[rows] = query_ED
        self.key[rows] = query_ED @ turn_DD

    def copy(self, heads: Sequence[int], turn_DD: Tensor, scale: float) -> None:
        """Write the words that are seen, turned by `turn_DD`, times `scale`."""
        rows = self._rows(heads)
        value_ED = self.value[rows].clone()
        value_ED[:, : self.size // 2] = 0
        self.value[rows] = value_ED
        self.output[:, rows] = scale * turn_DD @ value_ED.T


def _frequencies(size: int) -> Tensor:
    half = size // 2
    return torch.exp(-torch.arange(0, half, 2) / half * torch.tensor(LONGEST_WAVE).log())


def _set_words(weight_VD: Tensor) -> None:
    half = weight_VD.shape[1] // 2
    weight_VD[:, :half] = 0
    weight_VD[:, half:] *= 2**0.5


def _set_positions(weight_PD: Tensor) -> None:
    """Make sinusoids of the position embeddings; an offset of all positions changes nothing."""
    num_positions, size = weight_PD.shape
    angles = torch.arange(num_positions)[:, None] * _frequencies(size)
    weight_PD.zero_()
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    weight_PD[:, : size // 2] = POSITION_SCALE * waves


def _rotation(size: int, distance: int) -> Tensor:
    """Return (D, D): turns the sinusoids of position p into those of p + distance."""
    turn = torch.eye(size)
    even = torch.arange(0, size // 2, 2)
    angles = _frequencies(size) * distance
    turn[even, even] = turn[even + 1, even + 1] = angles.cos()
    turn[even, even + 1], turn[even + 1, even] = angles.sin(), -angles.sin()
    return turn


def _log_shares(counts_V: Tensor) -> Tensor:
    log_V = ((counts_V + 1) / (counts_V + 1).sum()).log()
    return log_V - log_V.mean()
