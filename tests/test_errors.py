import math
from typing import Any

import pytest

from clda_core import CldaError
from clda_core.errors import check_choice, check_number, problem


def test_a_problem_has_its_four_parts() -> None:
    error = problem("it is wrong", expected="this", received="that", fix="do so")
    assert isinstance(error, CldaError)
    assert isinstance(error, RuntimeError)
    assert str(error) == "it is wrong: expected this, received that. Fix: do so"


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0, {"at_least": 0}),
        (1.0, {"at_most": 1}),
        (1e-9, {"above": 0}),
        (0.999, {"below": 1}),
        (3, {"integer": True, "at_least": 1, "at_most": 3}),
        (-5, {}),
    ],
)
def test_numbers_in_range(value: Any, bounds: Any) -> None:
    check_number("x", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"above": 0}, "^x is out of range: expected a finite number and > 0, received 0. Fix: pass x within it$"),
        (1, {"below": 1}, "expected a finite number and < 1, received 1"),
        (-1, {"at_least": 0}, ">= 0, received -1"),
        (2, {"at_least": 0, "at_most": 1}, "expected a finite number and >= 0 and <= 1, received 2"),
        (
            math.nan,
            {},
            "^x is not a finite number: expected a finite number, received nan. Fix: pass x=a finite number$",
        ),
        (math.inf, {}, "received inf"),
        (-math.inf, {}, "received -inf"),
        (True, {}, "received True"),
        ("1", {}, "received '1'"),
        (None, {}, "received None"),
        (1.0, {"integer": True}, "^x is not an integer: expected an integer, received 1.0"),
        ([1], {"integer": True}, r"received \[1\]"),
    ],
)
def test_numbers_out_of_range(value: Any, bounds: Any, message: str) -> None:
    with pytest.raises(CldaError, match=message):
        check_number("x", value, **bounds)


def test_choices() -> None:
    check_choice("x", "b", ("a", "b"))
    with pytest.raises(
        CldaError, match="^x is unknown: expected 'a' or 'b', received 'c'. Fix: pass one of them as x=$"
    ):
        check_choice("x", "c", ("a", "b"))
    with pytest.raises(CldaError, match="received None"):
        check_choice("x", None, ("a", "b"))
