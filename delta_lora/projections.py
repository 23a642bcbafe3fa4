"""Which weights of a model are adapted: W_Q and W_V, the embeddings, the task head.

Everything is found by the structure of the model (names of sibling layers and their shapes), never
by a list of model classes:

* An attention block with separate layers is a module whose children are named as one of
  `SEPARATE_NAMES` and are linear: BERT, RoBERTa, ViT (`query`, `key`, `value`), BART, Llama and ViT
  of transformers 5 (`q_proj`, `k_proj`, `v_proj`), DeBERTa-v2, DistilBERT, T5.
* A GPT-2 block has one `Conv1D` named `c_attn` whose outputs are query, key and value one after
  the other; its cross-attention has `q_attn`, and key and value in `c_attn`. The parts are *slices
  of the outputs*, so the fused product stays one product.

A model whose attention is laid out in another way takes explicit patterns, see `find_projections`.
Layouts: `nn.Linear` stores (out, in), `Conv1D` stores (in, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from delta_lora.checks import near

ROLES = ("query", "key", "value")
SEPARATE_NAMES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
#: how many candidates an error message lists.
NUM_LISTED = 12


@dataclass(frozen=True)
class Projection:
    """A slice of the outputs of one linear layer.

    Attributes:
        layer: name of the layer in the model, for example ``transformer.h.0.attn.c_attn``.
        role: ``query``, ``key`` or ``value``, or ``output`` where the structure gives no role; a
            slice that a pattern cut out has its bounds added (``output_0_64``).
        start: first output of the slice.
        stop: one past the last output of the slice.
        in_features: number of inputs of the layer.
        out_features: number of outputs of the whole layer.
        is_transposed: the weight is stored (in, out), as in `Conv1D`.
    """

    layer: str
    role: str
    start: int
    stop: int
    in_features: int
    out_features: int
    is_transposed: bool

    @property
    def name(self) -> str:
        """Name of the projection: the layer and its role."""
        return f"{self.layer}.{self.role}"

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the slice."""
        return self.stop - self.start

    @property
    def num_entries(self) -> int:
        """Number of weight entries of the slice."""
        return self.num_outputs * self.in_features

    @property
    def max_rank(self) -> int:
        """The largest rank a change of the slice can have."""
        return min(self.num_outputs, self.in_features)


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear layer in either layout, None for any other."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return None


def find_projections(
    model: nn.Module,
    patterns: Sequence[str] | None = None,
    which: Sequence[str] = ("query", "value"),
    exclude: Sequence[str] = (),
) -> list[Projection]:
    r"""Find the projections to adapt, in the order of the model's modules.

    A pattern names layers in one of three ways: the full module name
    (``roberta.encoder.layer.0.attention.self.query``), a dotted end of it (``self.query``,
    ``q_proj``), or a regular expression for the full name (``.*layer\.[0-5]\..*query``). It takes
    the whole layer, fused or not; ``qkv@0:64`` takes outputs 0 to 63 of the layers it names.

    Args:
        model: the model; weights are not read, the meta device will do.
        patterns: explicit layers; None finds attention projections by structure.
        which: roles to find by structure, of ``query``, ``key``, ``value``.
        exclude: names of modules that are not searched (the task head).

    Returns:
        At least one projection; several of one layer do not overlap.

    Raises:
        TypeError: `patterns` is a single string.
        ValueError: a role is unknown, or nothing (or a pattern) matches.
    """
    linears = {
        name: layer
        for name, layer in model.named_modules()
        if linear_shape(layer) is not None and not _is_within(name, exclude)
    }
    if patterns is None:
        for role in which:
            if role not in ROLES:
                raise ValueError(
                    f"which={list(which)!r} holds {role!r}; allowed are {', '.join(ROLES)}"
                )
        found = [p for p in _by_structure(model, linears) if p.role in which]
        if not found:
            raise ValueError(
                f"no attention with separate or GPT-2 style query and value layers was found in "
                f"{type(model).__name__}; name the layers explicitly ({_candidates(linears)})"
            )
    else:
        found = _by_pattern(model, linears, patterns)
    order = {name: index for index, name in enumerate(linears)}
    return sorted(found, key=lambda p: (order[p.layer], p.start))


def _by_structure(model: nn.Module, linears: dict[str, nn.Module]) -> list[Projection]:
    found = []
    for block_name, _ in model.named_modules():
        prefix = f"{block_name}." if block_name else ""
        for names in SEPARATE_NAMES:
            layers = [prefix + name for name in names]
            if all(layer in linears for layer in layers):
                found += [
                    _projection(layer, linears[layer], role)
                    for role, layer in zip(ROLES, layers, strict=True)
                ]
        fused = prefix + "c_attn"
        if isinstance(linears.get(fused), Conv1D):
            found += _gpt2_block(prefix, linears)
    return found


def _gpt2_block(prefix: str, linears: dict[str, nn.Module]) -> list[Projection]:
    """Cut c_attn = [query, key, value], or q_attn = query and c_attn = [key, value]."""
    fused, separate_query = prefix + "c_attn", prefix + "q_attn"
    roles: tuple[str, ...] = ROLES
    found = []
    if separate_query in linears:
        found.append(_projection(separate_query, linears[separate_query], "query"))
        roles = ROLES[1:]
    shape = linear_shape(linears[fused])
    assert shape is not None
    width, rest = divmod(shape[1], len(roles))
    if rest:
        raise ValueError(
            f"{fused} has {shape[1]} outputs, which do not divide into {', '.join(roles)} of one "
            "width; name the slices explicitly, for example 'c_attn@0:64'"
        )
    for index, role in enumerate(roles):
        found.append(_projection(fused, linears[fused], role, index * width, (index + 1) * width))
    return found


def _by_pattern(
    model: nn.Module, linears: dict[str, nn.Module], patterns: Sequence[str]
) -> list[Projection]:
    if isinstance(patterns, str):
        raise TypeError(f"projections={patterns!r} is a string; write a list: [{patterns!r}]")
    if not patterns:
        raise ValueError(
            "projections=[] adapts nothing; name layers, or use null to search for them"
        )
    roles = {
        p.layer: p.role for p in _by_structure(model, linears) if p.num_outputs == p.out_features
    }
    found: list[Projection] = []
    for pattern in patterns:
        name_part, start, stop = _split_slice(pattern)
        matches = [name for name in linears if _matches(name, name_part, pattern)]
        if not matches:
            raise ValueError(
                f"projections={list(patterns)!r}: {pattern!r} matched no linear layer of "
                f"{type(model).__name__}; {_suggestion(name_part, linears)}({_candidates(linears)})"
            )
        for name in matches:
            role = roles.get(name, "output")
            if start is not None:
                role = f"{role}_{start}_{stop}"
            new = _projection(name, linears[name], role, start, stop)
            if new not in found:
                _refuse_overlap(new, found, pattern)
                found.append(new)
    return found


def _projection(
    name: str, layer: nn.Module, role: str, start: int | None = None, stop: int | None = None
) -> Projection:
    shape = linear_shape(layer)
    assert shape is not None
    in_features, out_features = shape
    if start is None or stop is None:
        start, stop = 0, out_features
    if not 0 <= start < stop <= out_features:
        raise ValueError(
            f"slice {start}:{stop} of {name} is not within its {out_features} outputs; "
            f"use 0 <= start < stop <= {out_features}"
        )
    return Projection(name, role, start, stop, in_features, out_features, isinstance(layer, Conv1D))


def _split_slice(pattern: str) -> tuple[str, int | None, int | None]:
    if "@" not in pattern:
        return pattern, None, None
    name, _, text = pattern.partition("@")
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(
            f"projections: {pattern!r} has no slice start:stop behind '@'; "
            "write for example 'qkv@0:64'"
        )
    return name, int(match[1]), int(match[2])


def _matches(name: str, pattern: str, whole: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"projections: {whole!r} is neither a layer name nor a regular expression ({error}); "
            "write for example '.*q_proj'"
        ) from error


def _refuse_overlap(new: Projection, found: Iterable[Projection], pattern: str) -> None:
    for old in found:
        if old.layer == new.layer and new.start < old.stop and old.start < new.stop:
            raise ValueError(
                f"projections: {pattern!r} takes outputs {new.start}:{new.stop} of {new.layer}, "
                f"which overlap {old.start}:{old.stop} taken before; give disjoint slices"
            )


def _suggestion(wanted: str, names: Iterable[str]) -> str:
    """Return which of `names`, or of their last parts, are spelt like `wanted`."""
    leaves = [name.rpartition(".")[2] for name in names]
    return near(wanted, dict.fromkeys([*leaves, *names]))


def _candidates(linears: Iterable[str]) -> str:
    names = list(linears)
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    listed = ", ".join(leaves[:NUM_LISTED]) + (", ..." if len(leaves) > NUM_LISTED else "")
    return f"{len(names)} linear layers, named {listed}" if names else "it has no linear layer"


def _is_within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def parameter_names(model: nn.Module, *, each_name: bool = False) -> dict[int, list[str]]:
    """Return the names of every parameter, by its `id`; more than one where it is shared.

    Args:
        model: the model.
        each_name: whether a module that the model holds under several names counts under each.
    """
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=not each_name):
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{key}")
    return names


def head_parameters(model: nn.Module, head: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of the task head, by name.

    Args:
        model: the model.
        head: full names of modules, for example ``("classifier",)``.

    Returns:
        Every parameter of those modules.

    Raises:
        TypeError: `head` is a single string.
        ValueError: a name is no module of the model or has no parameter.
    """
    if isinstance(head, str):
        raise TypeError(f"head={head!r} is a string; write a list: [{head!r}]")
    modules = dict(model.named_modules())
    parameters: dict[str, nn.Parameter] = {}
    for name in head:
        if not name or name not in modules:
            raise ValueError(
                f"head={list(head)!r}: {type(model).__name__} has no module {name!r}; "
                f"{_suggestion(name, modules)}name modules by their full names"
            )
        inside = {f"{name}.{leaf}": p for leaf, p in modules[name].named_parameters()}
        if not inside:
            raise ValueError(
                f"head={list(head)!r}: module {name!r} has no parameter to train; name its owner"
            )
        parameters.update(inside)
    return parameters


def token_embedding_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that embed tokens, by name.

    In a model of `transformers` these are what `get_input_embeddings` names: the word table (with
    it a tied LM head, which is the same tensor), in a ViT the patch projection. Positions and token
    types are not among them. In any other module: every `nn.Embedding`.

    Args:
        model: the model.

    Returns:
        At least one parameter, tied names once.

    Raises:
        ValueError: the model has no embedding.
    """
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    modules: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if isinstance(inputs, nn.Module):
        modules = [inputs]
    tables = {id(parameter) for module in modules for parameter in module.parameters()}
    found = {name: p for name, p in model.named_parameters() if id(p) in tables}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no token embedding to freeze; use method=full"
        )
    return found
