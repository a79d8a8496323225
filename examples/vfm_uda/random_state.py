"""What we compute draws no number that the host would have drawn."""

from __future__ import annotations

import contextlib
import random
from typing import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def of_our_own(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from generators seeded anew, and give the host's back: Python's, NumPy's, torch's on CPU and ``device``."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    on_cuda = device.type == "cuda"
    try:
        with torch.random.fork_rng([device.index or 0] if on_cuda else []):
            random.seed(seed)
            np.random.seed(seed)
            torch.random.default_generator.manual_seed(seed)
            if on_cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
