"""The arithmetic of Delta-LoRA against its definition, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from delta_lora import delta

F64 = torch.float64
OUT, IN, RANK = 7, 5, 2


def factors(seed: int) -> delta.Factors:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, IN, dtype=F64, generator=draw)
    return A, torch.randn(OUT, RANK, dtype=F64, generator=draw)


def product(pair: delta.Factors) -> torch.Tensor:
    return pair[1] @ pair[0]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_difference_is_added_to_w_step_after_step(is_transposed: bool) -> None:
    steps = [factors(seed) for seed in range(4)]
    W = torch.zeros((IN, OUT) if is_transposed else (OUT, IN), dtype=F64)
    difference = delta.Difference()
    for old, new in pairwise(steps):
        difference.keep(old, like=W)
        difference.add_to(W, new, factor=0.5, is_transposed=is_transposed)
        assert all(torch.equal(a, b) for a, b in zip(difference.new, new, strict=True))
    expected = 0.5 * (product(steps[-1]) - product(steps[0]))  # the updates telescope
    torch.testing.assert_close(W.T if is_transposed else W, expected, atol=1e-14, rtol=0)


def test_what_is_kept_is_a_copy() -> None:
    A, B = factors(0)
    W, difference = torch.zeros(OUT, IN, dtype=F64), delta.Difference()
    old = product((A, B))
    difference.keep((A, B), like=W)
    A.add_(1.0)
    difference.add_to(W, (A, B), factor=1.0)
    torch.testing.assert_close(W, product((A, B)) - old, atol=1e-14, rtol=0)


def test_the_two_products_are_one() -> None:
    now, first = factors(1), factors(2)
    one = product(delta.difference(now, first))
    torch.testing.assert_close(one, product(now) - product(first), atol=1e-14, rtol=0)
    whole = product(delta.stack(now, first, update_ratio=0.5, scaling=1.5))
    expected = 1.5 * (1.5 * product(now) - 0.5 * product(first))
    torch.testing.assert_close(whole, expected, atol=1e-14, rtol=0)
    plain = product(delta.stack(now, now, update_ratio=0.5, scaling=1.5))
    torch.testing.assert_close(plain, 1.5 * product(now), atol=1e-14, rtol=0)


@pytest.mark.parametrize(("K", "first"), [(-1, 0), (0, 1), (3, 4)])
def test_the_first_update_is_at_the_step_after_k(K: int, first: int) -> None:
    steps = [step for step in range(10) if delta.updates_at(step, 2.0, K)]
    assert steps == list(range(first, 10))
    assert not any(delta.updates_at(step, 0.0, K) for step in range(10))
    assert delta.never_updates(first, 2.0, K)
    assert not delta.never_updates(first + 1, 2.0, K)
    assert not delta.never_updates(first, 0.0, K), "nothing was meant to be updated"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("staged", [(), ("cpu",)])
def test_many_layers_together_are_each_alone_to_the_bit(
    dtype: torch.dtype, staged: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "STAGED", staged)  # as on a GPU
    draw = torch.Generator().manual_seed(7)
    shapes = [(7, 5, 2), (7, 5, 2), (4, 6, 3), (7, 5, 2), (6, 6, 2)]
    transposed = [False, True, False, False, True]

    def layers() -> list[delta.Factors]:
        return [(torch.randn(r, i, generator=draw), torch.randn(o, r, generator=draw))
                for o, i, r in shapes]  # fmt: skip

    alone = [torch.randn(*((i, o) if t else (o, i)), dtype=dtype, generator=draw)
             for (o, i, _), t in zip(shapes, transposed, strict=True)]  # fmt: skip
    together = [W.clone() for W in alone]
    singles, many = [delta.Difference() for _ in shapes], delta.Differences()
    for _ in range(3):
        old, new = layers(), layers()
        many.keep(old, like=together)
        factors = [0.5 + index for index in range(len(shapes))]
        many.add_to(together, new, factors=factors, are_transposed=transposed)
        for index, single in enumerate(singles):
            single.keep(old[index], like=alone[index])
            single.add_to(
                alone[index], new[index], factor=factors[index], is_transposed=transposed[index]
            )
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_factors_that_move_to_another_type_are_kept_anew() -> None:
    W, (A, B), many = torch.zeros(OUT, IN, dtype=F64), factors(3), delta.Differences()
    many.keep([(A.float(), B.float())], like=[W.float()])
    many.keep([(A, B)], like=[W])
    many.add_to([W], [(2 * A, B)], factors=[1.0], are_transposed=[False])
    torch.testing.assert_close(W, product((A, B)), atol=1e-14, rtol=0)
