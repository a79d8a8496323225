"""Random streams that are not the host's: what we draw, the host's augmentation and dropout must not notice."""

from __future__ import annotations

import contextlib
import random
from typing import Any, Dict, Iterator, Optional

import numpy as np
import torch
from torch import Tensor


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give Python's, NumPy's and torch's global random states back, for example after a model was built."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


class RandomStream:
    """A random stream of our own for NumPy and torch, so that nested forward passes leave the host's alone.

    Dropout and stochastic depth draw from torch, HRDA's crops from NumPy.

    Args:
        seed: Where the stream starts.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._own: Optional[Dict[str, Any]] = None

    @contextlib.contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Draw from this stream instead of the host's, on the CPU and on ``device``."""
        host = _current(device)
        if self._own is None:
            np.random.seed(self.seed)
            torch.random.default_generator.manual_seed(self.seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(self.seed)
        else:
            _make_current(self._own, device)
        try:
            yield
        finally:
            self._own = _current(device)
            _make_current(host, device)

    def state_dict(self) -> Dict[str, Any]:
        """Return the stream's state as tensors and plain Python types."""
        if self._own is None:
            return {}
        name, keys, position, has_gauss, gauss = self._own["numpy"]
        numpy_state = [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)]
        return {"numpy": numpy_state, **{key: self._own[key] for key in self._own if key != "numpy"}}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if not state:
            self._own = None
            return
        name, keys, *rest = state["numpy"]
        tensors: Dict[str, Tensor] = {key: value.cpu() for key, value in state.items() if key != "numpy"}
        self._own = {"numpy": (name, np.array(keys, dtype=np.uint32), *rest), **tensors}


def _current(device: torch.device) -> Dict[str, Any]:
    state: Dict[str, Any] = {"numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _make_current(state: Dict[str, Any], device: torch.device) -> None:
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
