"""Ranks without data, and ranks that raise."""

import pathlib
from typing import Any, Dict, List

import numpy
import pytest

from tests.distributed import faults, processes
from tests.distributed.host import train

PATIENCE = 5.0
"""Timeout of the process group, in seconds, where a rank raises."""


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory: pytest.TempPathFactory) -> List[Dict[str, Any]]:
    return processes.run(faults.incomplete, ranks=2, folder=tmp_path_factory.mktemp("incomplete"))


@pytest.mark.parametrize("name", faults.INCOMPLETE)
def test_a_rank_without_data_decides_and_writes_what_the_others_do(incomplete: List[Dict[str, Any]], name: str) -> None:
    first, last = (rank[name] for rank in incomplete)
    assert len(first["rounds"]) == faults.INCOMPLETE[name].steps
    assert last["rounds"] == first["rounds"]
    assert last["teachers"] == first["teachers"]


@pytest.mark.parametrize("name", faults.INCOMPLETE)
def test_a_rank_without_data_adds_nothing(incomplete: List[Dict[str, Any]], name: str) -> None:
    here, alone = incomplete[0][name], train(0, 1, faults.INCOMPLETE[name])
    assert [record["selected"] for record in here["rounds"]] == [record["selected"] for record in alone["rounds"]]
    for parameter, value in alone["teacher"].items():
        numpy.testing.assert_allclose(here["teacher"][parameter], value, rtol=0, atol=1e-9, err_msg=parameter)


def test_where_no_rank_has_data_the_round_waits_for_one_that_has(tmp_path: pathlib.Path) -> None:
    first, last = processes.run(faults.all_empty, ranks=2, folder=tmp_path)
    assert [record["step"] for record in last["rounds"]] == [6]
    assert first["rounds"] == last["rounds"]
    assert first["teacher"] == last["teacher"]
    assert len(first["said"]) == len(last["said"]) == 1
    assert "optimizer step 5 has no target data" in first["said"][0]
    assert (first["last loss"], last["last loss"] > 0) == (0.0, True)


@pytest.mark.parametrize(("where", "ranks"), [("probe", 2), ("update", 2), ("update", 4)])
def test_a_rank_that_raises_does_not_hang_the_others_beyond_the_timeout(
    tmp_path: pathlib.Path, where: str, ranks: int
) -> None:
    errors = processes.run(faults.one_raises, where, str(tmp_path), ranks=ranks, folder=tmp_path, patience=PATIENCE)
    *others, (own, round_took, unchanged) = (error.args for error in errors)
    assert "one rank's own" in own
    assert unchanged, "the teacher is as before the round"
    for message, waited, others_unchanged in others:
        assert "one rank's own" not in message
        assert message != "no error"
        assert waited < round_took + 3 * PATIENCE
        assert others_unchanged, "the teacher is as before the round"
