import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clda_core.errors import CldaError
from clda_core.similarity import cka_and_chance, linear_cka
from tests import reference_relation as reference

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**20))
@quick
def test_linear_cka_equals_the_oracle_and_its_invariances(n: int, p: int, q: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (p, q))
    value = linear_cka(x, y).item()
    assert value == pytest.approx(reference.linear_cka(x.numpy(), y.numpy()), rel=1e-9, abs=1e-12)
    assert -1e-12 <= value <= 1 + 1e-12
    assert linear_cka(y, x).item() == pytest.approx(value, rel=1e-9)
    assert linear_cka(3e9 * x + 5, y.flip(1)).item() == pytest.approx(value, rel=1e-6)
    assert linear_cka(x, x).item() == pytest.approx(1)


def test_linear_cka_keeps_the_dtype_and_is_0_for_constants() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert linear_cka(x, x).dtype == torch.float32
    assert linear_cka(x.half(), x).dtype == torch.float16
    assert linear_cka(x, torch.full((6, 2), 0.1)).item() == 0
    assert torch.isnan(linear_cka(x, torch.full((6, 2), float("nan"))))


@pytest.mark.parametrize("shapes", [((4, 2), (5, 2)), ((1, 2), (1, 2)), ((4,), (4,)), ((4, 2, 2), (4, 2, 2))], ids=str)
def test_linear_cka_refuses_other_shapes(shapes: Any) -> None:
    with pytest.raises(CldaError, match=r"expected two floating-point tensors \(n, p\) and \(n, q\) with n >= 2"):
        linear_cka(*[torch.zeros(shape) for shape in shapes])


def test_linear_cka_refuses_integers() -> None:
    with pytest.raises(CldaError, match=r"received torch.int64 of shape \(4, 2\)"):
        linear_cka(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2))


@pytest.mark.parametrize(("p", "q"), [(3, 2), (9, 4)])
def test_chance_is_the_mean_over_all_pairings_of_the_rows(p: int, q: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, width, generator=generator, dtype=torch.float64).exp() for width in (p, q))
    _, chance = cka_and_chance(x, y)
    every = [reference.linear_cka(x.numpy(), y[list(order)].numpy()) for order in itertools.permutations(range(5))]
    assert chance.item() == pytest.approx(sum(every) / len(every), rel=1e-9)
    assert cka_and_chance(3 * x, y - 7)[1].item() == pytest.approx(chance.item(), rel=1e-9)
