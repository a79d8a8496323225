"""Under FSDP2 sharded models are observed and updated as whole ones are in one process."""

from typing import Any, Dict, List, Tuple

import numpy
import pytest
import torch

from tests.distributed import processes
from tests.distributed.host import train

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    pytest.skip("torch.distributed.fsdp.fully_shard came with torch 2.6", allow_module_level=True)

if not hasattr(torch.cpu.Stream, "record_event"):
    pytest.skip("fully_shard of torch 2.6 needs a GPU: streams of its CPU lack record_event", allow_module_level=True)

from tests.distributed import fsdp

TOLERANCE = 1e-9
"""Of float64 parameters after three rounds: sums are in another order."""

ONE_SHARDED = [
    f"{name}, {whole} whole" for name in ("average", "masked distillation") for whole in ("student", "teacher")
]
NAMES = [*fsdp.SCENARIOS, *ONE_SHARDED]

# The comparison is with one process on the first half of the batch.
ON_TWO_RANKS_ONLY = "a rank without data"

Results = Tuple[int, List[Dict[str, Any]]]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("fsdp")
    return request.param, processes.run(fsdp.work, str(folder / "checkpoint"), ranks=request.param, folder=folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_decides_and_writes_alike_in_every_round(results: Results, name: str) -> None:
    first, *others = (rank[name] for rank in results[1])
    assert len(first["rounds"]) == 3
    assert all(record["selected"] for record in first["rounds"])
    for other in others:
        assert other["rounds"] == first["rounds"]
        assert other["teachers"] == first["teachers"]
    assert first["teachers"][0] != first["teachers"][-1]


@pytest.mark.parametrize("name", NAMES)
def test_shards_do_what_one_process_does_on_all_the_data(results: Results, name: str) -> None:
    ranks, (here, *_) = results
    if name == ON_TWO_RANKS_ONLY and ranks != 2:
        return
    compare(here[name], train(0, 1, fsdp.SCENARIOS[name if name in fsdp.SCENARIOS else name.rpartition(",")[0]]))


def test_shards_that_are_replicated_do_so_too(results: Results) -> None:
    ranks, (here, *_) = results
    if ranks == 4:
        compare(here["masked distillation, two by two"], train(0, 1, fsdp.SCENARIOS["masked distillation"]))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fsdp1", "the teacher is wrapped in FullyShardedDataParallel.*Fix: shard with .*fully_shard"),
        ("tensor_parallel", "the teacher is sharded in a way that is not supported"),
        ("second_order", "Hessian needs second derivatives, which a sharded teacher does not have"),
        ("loss", "a loss of a sharded teacher cannot be differentiated.*Fix: pass a function"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank(results: Results, what: str, message: str) -> None:
    errors = [rank["refused"][what] for rank in results[1]]
    assert len(set(errors)) == 1
    with pytest.raises(Exception, match=message):
        raise Exception(errors[0])


def test_interrupted_and_resumed_is_uninterrupted(results: Results) -> None:
    for rank in results[1]:
        assert rank["resume"]["resumed"] == rank["resume"]["uninterrupted"]
        assert rank["resume"]["resumed"] != rank["resume"]["halfway"]


def compare(here: Dict[str, Any], alone: Dict[str, Any]) -> None:
    assert len(here["rounds"]) == len(alone["rounds"]) > 0
    for mine, its in zip(here["rounds"], alone["rounds"]):
        assert mine["selected"] == its["selected"]
        assert mine["updated"] == its["updated"]
        assert mine["accepted"] == its["accepted"]
        assert mine["rates"] == pytest.approx(its["rates"], abs=1e-6)
    for model in ("teacher", "student"):
        for parameter, value in alone[model].items():
            numpy.testing.assert_allclose(here[model][parameter], value, rtol=0, atol=TOLERANCE, err_msg=parameter)
