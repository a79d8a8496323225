import functools
import json
from typing import Any, List, Optional

import pytest
import torch

from clda_core._config import Strategy, describe
from clda_core.update import Guard, MaskedDistillation, mutual_information


class Sample(Strategy):
    def __init__(self, number: float, *, names: Optional[List[str]] = None, inner: Any = None) -> None:
        self.number = number
        self.names = names
        self.inner = inner
        self._state = torch.zeros(3)


class Bare(Strategy):
    pass


HERE = f"{Sample.__module__}.Sample"


def test_a_strategy_is_described_by_its_arguments() -> None:
    assert describe(Sample(0.5, names=["a"], inner=Bare())) == {
        "class": HERE,
        "number": 0.5,
        "names": ["a"],
        "inner": {"class": f"{Bare.__module__}.Bare"},
    }


def test_plain_values_stay_and_containers_become_plain() -> None:
    assert describe([None, True, 2, 0.5, "x", (1, 2), {3: (4,)}]) == [None, True, 2, 0.5, "x", [1, 2], {"3": [4]}]


def test_functions_are_described_by_name_and_bound_arguments() -> None:
    name = "clda_core.update.guard.mutual_information"
    assert describe(mutual_information) == name
    assert describe(functools.partial(mutual_information, 1, student_logits=2)) == {
        "partial": name,
        "args": [1],
        "keywords": {"student_logits": 2},
    }
    assert describe(Sample) == HERE


def test_numpy_numbers_become_plain() -> None:
    numpy = pytest.importorskip("numpy")
    described = describe([numpy.float64(0.5), numpy.float32(0.25), numpy.int64(3)])
    assert described == [0.5, 0.25, 3]
    assert [type(value) for value in described] == [float, float, int]


def test_equal_configurations_are_described_alike_and_others_not() -> None:
    def made(**options: Any) -> Any:
        return describe(Guard(MaskedDistillation(**options)))

    assert made() == made()
    assert made(steps=2) != made()
    assert made(optimizer=functools.partial(torch.optim.SGD, lr=0.1)) != made(
        optimizer=functools.partial(torch.optim.SGD, lr=0.2)
    )
    json.dumps(made())


def test_repr_is_the_constructor_call() -> None:
    assert repr(Sample(0.5, inner=Bare())) == "Sample(number=0.5, names=None, inner=Bare())"
