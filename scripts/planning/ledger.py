"""A ledger of one training step: parameters, what autograd keeps, operations, FLOPs.

A model is written down once, as the sequence of its operations (`scripts.planning.forward`). From
that and from what trains follow, by the rules of autograd: the sizes of the parameters, the tensors
that are kept for the backward pass (each storage once), the order in which the backward pass gives
them free and makes gradients, and the number of operations and of multiplications. So one
description serves memory and time.

The rules, checked against the counts of `delta_lora.analysis.memory_model.measure_step`:

* a product keeps its input if its weight trains, and its weight if that was computed and the input
  needs a gradient; a normalisation its input, mean and deviation; GELU its input; tanh its output;
* dropout keeps a mask where its input needs a gradient: of 1 byte an entry on CUDA, of 4 on a CPU;
* attention in one kernel keeps query, key, value, output and a log-sum a row, and a mask in float32
  if it gets one. On CUDA that is what float32 takes (the memory-efficient kernel), with dropout
  too, so nothing of length x length is kept but the mask. On a CPU dropout in attention takes
  torch's plain formula, which keeps three tensors of heads x length x length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scripts.planning.adaptation import Adaptation

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class Kernels:
    """What differs between devices.

    Attributes:
        mask_bytes: of an entry of a dropout mask.
        fuses_dropout: whether attention with dropout is one kernel.
        mask_multiple: the rows of an attention mask are padded to a multiple of this.
        log_sum_multiple: and the log-sums of attention to a multiple of this.
    """

    mask_bytes: int
    fuses_dropout: bool
    mask_multiple: int = 1
    log_sum_multiple: int = 1


CPU = Kernels(mask_bytes=4, fuses_dropout=False)
CUDA = Kernels(mask_bytes=1, fuses_dropout=True, mask_multiple=16, log_sum_multiple=32)


@dataclass(frozen=True)
class Value:
    """A tensor of the forward pass: its storage, its entries, whether it needs a gradient."""

    storage: int
    size: int
    needs_grad: bool


@dataclass
class Operation:
    """One step of the forward pass, as the backward pass sees it.

    Attributes:
        kept: storages that its backward pass reads, with their bytes.
        gradients: bytes of the gradients of parameters that it makes.
        held: bytes that it makes and that live until the backward pass ends.
        work: bytes that live while its backward pass runs.
    """

    kept: dict[int, int] = field(default_factory=dict)
    gradients: int = 0
    held: int = 0
    work: int = 0


class Ledger:
    """Writes down a forward pass.

    Args:
        adaptation: the method.
        kernels: of the device.

    Attributes:
        parameters: of the base model.
        adapters: parameters that the method adds.
        trained: parameters that the optimiser changes.
        trained_tensors: number of their tensors.
        written: parameters outside the optimiser that the method writes, as whole tensors.
        dense: entries of W_Q and W_V.
        num_branches: low-rank branches.
        operations: in the order of the forward pass.
        flops: multiplications and additions of the forward and of the backward pass.
        launches: kernels of the forward and of the backward pass.
    """

    def __init__(self, adaptation: Adaptation, kernels: Kernels) -> None:
        self.adaptation, self.kernels = adaptation, kernels
        self.parameters = self.adapters = self.trained = self.trained_tensors = 0
        self.written = self.dense = self.num_branches = 0
        self.operations: list[Operation] = []
        self.forward_flops = self.backward_flops = 0
        self.forward_launches = self.backward_launches = 0
        self._num_storages = 0

    @property
    def updatable(self) -> int:
        """Parameters outside the optimiser that the method changes: Delta-LoRA's W_Q and W_V.

        In the closed form too, where their change is kept beside them.
        """
        changes = self.adaptation.writes_weight or self.adaptation.kept_factors == 1
        return self.dense if changes else 0

    # ------------------------------------------------------------------ bookkeeping

    def value(self, size: int, needs_grad: bool) -> Value:
        """Return a new tensor."""
        self._num_storages += 1
        return Value(self._num_storages, size, needs_grad)

    def _parameter(self, size: int, trains: bool, *, is_adapter: bool = False) -> int:
        """Count a parameter; return the bytes of its gradient."""
        if is_adapter:
            self.adapters += size
        else:
            self.parameters += size
        if trains:
            self.trained += size
            self.trained_tensors += 1
        return size * FLOAT if trains else 0

    def _record(self, operation: Operation, forward: int, backward: int) -> None:
        self.forward_launches += forward
        self.backward_launches += backward
        self.operations.append(operation)

    @staticmethod
    def _keep(*values: Value) -> dict[int, int]:
        return {v.storage: v.size * FLOAT for v in values}

    # ------------------------------------------------------------------ layers

    def table(
        self, rows: int, width: int, tokens: int, role: str, *, is_tied: bool = False
    ) -> Value:
        """An embedding; its indices are kept where it trains.

        The gradient of a tied one is summed with that of its other uses, beside both.
        """
        trains = (
            self.adaptation.trains(role) if role == "token_table" else self.adaptation.trains_biases
        )
        gradient = self._parameter(rows * width, trains)
        out = self.value(tokens * width, trains)
        indices = self.value(tokens, False)
        kept = {indices.storage: tokens * INDEX} if trains else {}
        work = gradient * is_tied + out.size * FLOAT
        self._record(Operation(kept, gradient, work=work), 1, 2 * trains)
        return out

    def look_up(self, vocabulary: int, width: int, tokens: int) -> Value:
        """A second use of the token table, whose gradient is summed into that of the others."""
        trains = self.adaptation.trains("token_table")
        out = self.value(tokens * width, trains)
        indices = self.value(tokens, False)
        kept = {indices.storage: tokens * INDEX} if trains else {}
        work = (2 * vocabulary * width * trains + out.size) * FLOAT
        self._record(Operation(kept, work=work), 1, 3 * trains)
        return out

    def tied_head(self, x: Value, vocabulary: int, width: int) -> Value:
        """The head that is the token table; its gradient lives until that of the table is made."""
        trains = self.adaptation.trains("token_table")
        tokens = x.size // width
        flops = 2 * x.size * vocabulary
        self.forward_flops += flops
        self.backward_flops += flops * (int(x.needs_grad) + trains)
        kept = self._keep(x) if trains else {}
        held = vocabulary * width * FLOAT * trains
        work = (tokens * vocabulary + x.size) * FLOAT
        self._record(Operation(kept, held=held, work=work), 1, 1 + trains)
        return self.value(tokens * vocabulary, True)

    def add(self, *values: Value) -> Value:
        """A sum, which keeps nothing."""
        out = self.value(max(v.size for v in values), any(v.needs_grad for v in values))
        self._record(Operation(), len(values) - 1, 0)
        return out

    def dropout(self, x: Value, probability: float) -> Value:
        """Dropout."""
        if probability == 0:
            return x
        mask = self.value(x.size, False)
        kept = {mask.storage: x.size * self.kernels.mask_bytes} if x.needs_grad else {}
        self._record(Operation(kept, work=2 * x.size * FLOAT), 1, int(x.needs_grad))
        return self.value(x.size, x.needs_grad)

    def normalise(self, x: Value, width: int) -> Value:
        """A layer normalisation over the last `width` entries, with weight and bias."""
        trains = self.adaptation.trains_biases
        gradient = sum(self._parameter(width, trains) for _ in range(2))
        needs = x.needs_grad or trains
        statistics = self.value(2 * (x.size // width), False)
        kept = self._keep(x, statistics) if needs else {}
        self._record(Operation(kept, gradient, work=2 * x.size * FLOAT), 1, int(needs) + trains)
        return self.value(x.size, needs)

    def activation(self, x: Value) -> Value:
        """GELU."""
        kept = self._keep(x) if x.needs_grad else {}
        self._record(Operation(kept, work=2 * x.size * FLOAT), 1, int(x.needs_grad))
        return self.value(x.size, x.needs_grad)

    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent."""
        out = self.value(x.size, x.needs_grad)
        self._record(Operation(self._keep(out) if x.needs_grad else {}), 1, int(x.needs_grad))
        return out

    def linear(
        self, x: Value, width: int, outputs: int, role: str = "", *, has_bias: bool = True
    ) -> Value:
        """A product with a weight (outputs, width), and a branch on it where the method has one."""
        tokens = x.size // width
        trains = self.adaptation.trains(role)
        trains_bias = has_bias and (trains if role == "head" else self.adaptation.trains_biases)
        gradient = self._parameter(outputs * width, trains)
        if has_bias:
            gradient += self._parameter(outputs, trains_bias)
        if role in ("query", "value"):
            self.dense += outputs * width
        return self._product(x, tokens, width, outputs, trains, trains_bias, gradient, role)

    def _product(
        self, x: Value, tokens: int, width: int, outputs: int, trains: bool, trains_bias: bool,
        gradient: int, role: str,
    ) -> Value:  # fmt: skip
        flops = 2 * tokens * width * outputs
        self.forward_flops += flops
        self.backward_flops += flops * (int(x.needs_grad) + int(trains))
        needs = x.needs_grad or trains or trains_bias
        work = (tokens * outputs * needs + x.size * x.needs_grad) * FLOAT
        self._record(
            Operation(self._keep(x) if trains else {}, gradient, work=work),
            1,
            int(x.needs_grad) + int(trains) + int(trains_bias),
        )
        out = self.value(tokens * outputs, needs)
        if self.adaptation.kind == "low_rank" and role in ("query", "value"):
            self.written += outputs * width * self.adaptation.writes_weight
            return self._branches(x, out, width, [outputs])
        return out

    def fused_query_key_value(self, x: Value, width: int) -> Value:
        """GPT-2's one layer for query, key and value."""
        adaptation = self.adaptation
        tokens, outputs = x.size // width, 3 * width
        self.dense += 2 * width * width
        if adaptation.kind != "full_query_value":
            trains = adaptation.trains("query")
            gradient = self._parameter(outputs * width, trains)
            gradient += self._parameter(outputs, adaptation.trains_biases)
            out = self._product(
                x, tokens, width, outputs, trains, adaptation.trains_biases, gradient, ""
            )
            if adaptation.kind == "low_rank":
                self.written += outputs * width * adaptation.writes_weight
                return self._branches(x, out, width, [width, width])
            return out
        # W_Q and W_V are tensors of their own; the whole weight is put together anew.
        gradient = sum(self._parameter(width * width, trains) for trains in (True, False, True))
        self._parameter(outputs, False)
        out = self._product(x, tokens, width, outputs, True, False, gradient, "")
        whole = self.value(outputs * width, True)
        self.operations[-1].work += outputs * width * FLOAT
        if x.needs_grad:
            self.operations[-1].kept |= self._keep(whole)
        self.forward_launches += 1  # and the gradient is cut again
        self.backward_launches += 4
        return out

    def _branches(self, x: Value, out: Value, width: int, outputs: list[int]) -> Value:
        """The low-rank branches of a layer: A stacked into one product, B one after the other."""
        adaptation, tokens = self.adaptation, x.size // width
        rank, number = adaptation.forward_rank, len(outputs)
        self.num_branches += number
        gradient = 0
        for size in outputs:
            sides = (adaptation.rank * width, size * adaptation.rank, adaptation.extra_per_branch)
            gradient += sum(self._parameter(s, True, is_adapter=True) for s in sides if s)
        dropped = self.dropout(x, adaptation.dropout)
        kept = self._keep(dropped)
        if x.needs_grad and (number > 1 or adaptation.makes_a):
            kept |= self._keep(self.value(number * rank * width, False))
        if adaptation.makes_b:
            kept |= self._keep(self.value(rank * sum(outputs), False))
        narrow = [self.value(tokens * rank, True) for _ in outputs]
        kept |= self._keep(*narrow)
        flops = 2 * tokens * rank * (number * width + sum(outputs))
        self.forward_flops += flops
        self.backward_flops += 2 * flops
        work = (out.size + x.size * x.needs_grad) * FLOAT
        made = (number > 1) + number * (adaptation.makes_a + adaptation.makes_b)
        self._record(
            Operation(kept, gradient, work=work),
            1 + made + 3 * number,
            2 + 2 * made + 6 * number,
        )
        return self.value(out.size, True)

    def attention(
        self, query: Value, key: Value, value: Value, *, batch: int, num_heads: int, length: int,
        keys: int, width: int, probability: float, has_mask: bool, masks: int = 1,
    ) -> Value:  # fmt: skip
        """Attention of (batch, length) on (batch, keys).

        Args:
            query: query, or the tensor that holds all three.
            key: key.
            value: value.
            batch: sequences (1 in a padding-free row).
            num_heads: heads.
            length: queries of a sequence.
            keys: keys of a sequence.
            width: size of the residual stream.
            probability: of dropout on the weights.
            has_mask: whether it gets a mask.
            masks: sequences that have a mask of their own.
        """
        kernels = self.kernels
        needs = query.needs_grad or key.needs_grad or value.needs_grad
        out = self.value(batch * length * width, needs)
        square = batch * num_heads * length * keys
        flops = 4 * batch * length * keys * width
        self.forward_flops += flops
        self.backward_flops += 2 * flops * needs
        kept: dict[int, int] = {}
        if needs and (probability == 0 or kernels.fuses_dropout):
            log_sums = batch * num_heads * _up(length, kernels.log_sum_multiple)
            kept = self._keep(query, key, value, out, self.value(log_sums, False))
            if has_mask:
                mask = masks * length * _up(keys, kernels.mask_multiple)
                kept |= self._keep(self.value(mask, False))
            work = 4 * out.size * FLOAT
        elif needs:
            # Scaled copies of query and key, each for the gradient of the other; the weights,
            # their mask, the dropped weights.
            row = batch * width
            sizes = (row * length * key.needs_grad, row * keys * query.needs_grad)
            scaled = [self.value(size, True) for size in sizes]
            weights = [self.value(square, True) for _ in range(3)]
            kept = self._keep(*scaled, value, *weights)
            work = (square + 4 * out.size) * FLOAT
        else:
            work = 0
        self._record(Operation(kept, work=work), 2 + 3 * has_mask, 2 * needs)
        return out

    def choose(self, x: Value, width: int, chosen: int) -> Value:
        """Some positions of x, by an index that is kept."""
        index = self.value(chosen, False)
        kept = {index.storage: chosen * INDEX} if x.needs_grad else {}
        self._record(Operation(kept, work=x.size * FLOAT), 1, int(x.needs_grad))
        return self.value(chosen * width, x.needs_grad)

    def loss(self, targets: int, classes: int) -> None:
        """Cross-entropy: its log-probabilities are kept and as much as these made twice more."""
        log_probabilities = self.value(targets * classes, True)
        kept = self._keep(log_probabilities) | {self.value(targets, False).storage: targets * INDEX}
        self._record(Operation(kept, work=2 * targets * classes * FLOAT), 3, 3)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
