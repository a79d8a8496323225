"""The host's random state: kept as it was, without taking back what other threads drew meanwhile."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager, nullcontext
from typing import Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from .compat import noting_draws
from .undo import undoing

_draws: weakref.WeakKeyDictionary[nn.Module, Dict[str, bool]] = weakref.WeakKeyDictionary()
"""By model and by what is done with it, whether that draws random numbers."""


@contextmanager
def keeping_rng(doing: str, *models: nn.Module) -> Iterator[bool]:
    """Give the global random state back, should a model or a strategy draw from it inside the block.

    That state belongs to the whole process: setting it back makes a loader in another thread repeat the numbers that it
    drew meanwhile. So it is set back only if the block itself draws. If no other Python thread is alive, every change
    is the block's. Otherwise the first block of its kind is watched operation by operation, where torch can do that
    (from 1.13 on); elsewhere a block that once left the state alone is taken for one that does not draw. After
    an error it is set back in any case: the block may have drawn where it never did before.

    Nothing here waits for a device: the states of its generators are on the host's side.

    Args:
        doing: What kind of block it is; blocks of one kind on the same model are taken to draw alike.
        models: The models that are run, on whose devices states are kept.

    Yields:
        Whether the block is watched. The compiler gives up for good what it meets inside such a block.
    """
    known = _draws.setdefault(models[0], {})
    others = threading.active_count() > 1
    noted: List[str] = []
    watching = noting_draws(noted) if others and doing not in known else None
    before = _states(models)
    finished = False

    def give_back() -> None:
        now = _states(models)
        changed = [index for index in before if not torch.equal(now[index], before[index])]
        if noted:
            known[doing] = True
        elif finished and (watching is not None or not changed):
            known[doing] = False
        alone = not (others or threading.active_count() > 1)
        if changed and (known.get(doing, True) or alone or not finished):
            for index in changed:
                _set_state(index, before[index])

    with undoing(give_back), nullcontext() if watching is None else watching:
        yield watching is not None
        finished = True


def _states(models: Tuple[nn.Module, ...]) -> Dict[int, Tensor]:
    """Return the states of the generators by device index, -1 for the CPU's."""
    states = {-1: torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices = {parameter.device for model in models for parameter in model.parameters()}
        for device in devices:
            if device.type == "cuda":
                states[device.index or 0] = torch.cuda.get_rng_state(device)
    return states


def _set_state(index: int, state: Tensor) -> None:
    if index < 0:
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, index)
