"""Gradients that were averaged over ranks meet parameters and moments of another memory layout."""

from typing import Any, List

import numpy as np
import pytest

from tests.distributed import layouts, processes

RANKS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> List[Any]:
    return processes.run(layouts.work, ranks=RANKS, folder=tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_teacher_in_channels_last_is_updated_as_one_process_updates_a_plain_one(
    results: List[Any], channels_last: bool
) -> None:
    alone = layouts.updated(range(RANKS), False)
    for rank in results:
        for name, value in alone.items():
            np.testing.assert_allclose(rank[int(channels_last)][name], value, rtol=0, atol=1e-9, err_msg=name)


def test_a_projector_in_channels_last_is_stepped_as_by_one_process(results: List[Any]) -> None:
    for rank in results:
        np.testing.assert_allclose(rank[2], layouts.projected(range(RANKS)), rtol=0, atol=1e-9)


def test_sums_of_several_dtypes(results: List[Any]) -> None:
    for rank in results:
        assert rank[3] == [3, 3j, 1]
