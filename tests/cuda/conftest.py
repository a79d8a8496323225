"""These tests need a CUDA GPU. ``CLDA_TEST_DEVICE=cpu`` runs those that can on the CPU, to test the tests."""

import os
from pathlib import Path
from typing import Any, Iterator, List

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms need

NAMED = os.environ.get("CLDA_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "")

KNOWN = (
    "Synchronization debug mode is a prototype feature",
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
    ".*defaults to a non-deterministic algorithm",
    "Grad strides do not match bucket view strides",
    "Plan failed with a cudnnException",
)
"""Warnings of torch that say nothing of the library."""


def pytest_collection_modifyitems(items: List[Any]) -> None:
    for item in items:
        if Path(str(item.fspath)).parent == Path(__file__).parent:
            for text in KNOWN:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{text}"))


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not NAMED:
        pytest.skip("needs a CUDA GPU")
    return torch.device(NAMED, 0) if NAMED == "cuda" else torch.device(NAMED)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """Return the GPU, for what makes no sense on a CPU."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    return device


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
