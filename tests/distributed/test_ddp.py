"""Under DistributedDataParallel all ranks decide and write alike, as one process on all the data does."""

import inspect
from typing import Any, Dict, List, Tuple

import numpy
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import ddp, processes
from tests.distributed.host import train

TOLERANCE = 1e-9
"""Of float64 parameters after three rounds: sums are in another order."""

# The majority that the default criterion asks for, and what both models share, are counted on each rank's samples.
JUDGED_BY_RANK = {"guarded, the default"}

KNOWN = inspect.signature(DistributedDataParallel).parameters
NAMES = [
    name
    for name, scenario in ddp.SCENARIOS.items()
    if set(scenario.student) <= set(KNOWN) and set(scenario.teacher or ()) <= set(KNOWN)
]

Results = Tuple[int, List[Dict[str, Any]]]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    ranks = request.param
    return ranks, processes.run(ddp.work, NAMES, ranks=ranks, folder=tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_decides_and_writes_alike_in_every_round(results: Results, name: str) -> None:
    first, *others = (rank[name] for rank in results[1])
    assert len(first["rounds"]) == ddp.SCENARIOS[name].steps
    assert all(record["selected"] for record in first["rounds"])
    for other in others:
        assert other["rounds"] == first["rounds"]
        assert other["teachers"] == first["teachers"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in JUDGED_BY_RANK])
def test_ranks_do_what_one_process_does_on_all_the_data(results: Results, name: str) -> None:
    here, alone = results[1][0][name], train(0, 1, ddp.SCENARIOS[name])
    assert len(here["rounds"]) == len(alone["rounds"]) > 0
    for mine, its in zip(here["rounds"], alone["rounds"]):
        assert mine["selected"] == its["selected"]
        assert mine["updated"] == its["updated"]
        assert mine["accepted"] == its["accepted"]
        assert mine["rates"] == pytest.approx(its["rates"], abs=1e-6)
    for model in ("teacher", "student"):
        for parameter, value in alone[model].items():
            numpy.testing.assert_allclose(here[model][parameter], value, rtol=0, atol=TOLERANCE, err_msg=parameter)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in JUDGED_BY_RANK])
def test_rounds_change_the_teacher(results: Results, name: str) -> None:
    teachers = results[1][0][name]["teachers"]
    assert teachers[0] != teachers[-1]


def test_a_round_leaves_the_buffers_of_every_rank(results: Results) -> None:
    assert all(rank["buffers"] for rank in results[1])


def test_static_graph_is_tested_where_there_is_one() -> None:
    assert ("static_graph" in NAMES) == (tuple(map(int, torch.__version__.split(".")[:2])) >= (1, 11))
