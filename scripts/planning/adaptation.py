"""What the formulas of memory and time must know of a method, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scripts.planning.architecture import UnknownCostError

#: name of a method -> kind of what trains.
KINDS = {
    "full": "full",
    "full_frozen_embeddings": "full_frozen_embeddings",
    "full_query_value": "full_query_value",
    "lora": "low_rank",
    "dylora": "low_rank",
    "adalora": "low_rank",
    "delta_lora": "low_rank",
}


@dataclass(frozen=True)
class Adaptation:
    """A method and its optimiser.

    Attributes:
        kind: a value of `KINDS`.
        method: a key of `KINDS`.
        rank: r, of the low-rank methods.
        forward_rank: rank of a branch in the forward pass: 2 r in the closed form, else r.
        extra_per_branch: further trained numbers of a branch (AdaLoRA's singular values: r).
        kept_factors: copies of A and B that the method keeps: 2 for Delta-LoRA in place (its
            rank-2r buffers) and AdaLoRA (two running means), 1 for the closed form.
        makes_a: whether the forward pass computes A anew, so that it is kept once more.
        makes_b: the same for B.
        dropout: probability on the input of the branch.
        writes_weight: whether W is changed outside the optimiser (Delta-LoRA in place).
        states: optimiser tensors per trained one: AdamW 2, SGD without momentum 0.
    """

    kind: str
    method: str
    rank: int = 0
    forward_rank: int = 0
    extra_per_branch: int = 0
    kept_factors: int = 0
    makes_a: bool = False
    makes_b: bool = False
    dropout: float = 0.0
    writes_weight: bool = False
    states: int = 2

    def trains(self, role: str) -> bool:
        """Return whether a weight of the base model trains.

        Args:
            role: ``token_table``, ``query``, ``value``, ``head``, or anything else.
        """
        if role == "head" or self.kind == "full":
            return True
        if self.kind == "full_frozen_embeddings":
            return role != "token_table"
        return self.kind == "full_query_value" and role in ("query", "value")

    @property
    def trains_biases(self) -> bool:
        """Whether biases, normalisations and positions train."""
        return self.kind in ("full", "full_frozen_embeddings")


def read_adaptation(cfg: Any) -> Adaptation:
    """Return what is planned with of ``cfg.method`` and ``cfg.trainer.optimizer``.

    Raises:
        UnknownCostError: a method that is not planned (those of the package peft).
    """
    method = cfg.method
    name = _name_of(method["_target_"])
    if name not in KINDS:
        raise UnknownCostError(f"the method {name} is not planned; planned are {', '.join(KINDS)}")
    states = _optimizer_states(cfg)
    if KINDS[name] != "low_rank":
        return Adaptation(KINDS[name], name, states=states)
    rank = method["init_rank"] if name == "adalora" else method["rank"]
    dropout = method.get("dropout", 0.0)
    common: dict[str, Any] = {"rank": rank, "forward_rank": rank, "dropout": dropout}
    if name == "dylora":
        common |= {"makes_a": True, "makes_b": True}
    if name == "adalora":
        common |= {"makes_a": True, "extra_per_branch": rank, "kept_factors": 2}
    if name == "delta_lora" and method["update_ratio"] > 0:
        is_closed = method["form"] == "closed_form"
        common["kept_factors"] = 1 if is_closed else 2
        common["writes_weight"] = not is_closed
        if is_closed:
            common |= {"forward_rank": 2 * rank, "makes_a": True, "makes_b": True}
    return Adaptation("low_rank", name, states=states, **common)


def _name_of(target: str) -> str:
    """Return the name of a method: that of its file, so that nothing is imported to know it."""
    folder, _, file = target.rpartition(".")[0].rpartition(".")
    return file if folder == "delta_lora.methods" else target


def _optimizer_states(cfg: Any) -> int:
    has_momentum = int(cfg.trainer.get("momentum", 0.0) > 0)
    # Adafactor keeps a row and a column of a matrix, which is next to nothing.
    return {"adamw": 2, "sgd": has_momentum, "rmsprop": 1 + has_momentum, "adafactor": 0}[
        cfg.trainer.get("optimizer", "adamw")
    ]
