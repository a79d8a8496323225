"""Giving back what was borrowed from the host, even if Ctrl-C comes while it is being given back."""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, TypeVar, cast

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])


class _Pending(threading.local):
    """What this thread has yet to give back, in the order in which it was taken."""

    def __init__(self) -> None:
        self.undo: List[_Undo] = []


class _Undo:
    """One function that gives back; it counts as done only when it has run to its end, and does nothing afterwards."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._done = False

    def __call__(self) -> None:
        if not self._done:
            self._give_back()
            self._done = True


_pending = _Pending()


@contextmanager
def undoing(give_back: Callable[[], None]) -> Iterator[None]:
    """Call ``give_back`` when the block ends; take what it gives back inside the block only.

    Args:
        give_back: Must not mind running a second time after an interrupted first one, or without anything taken.
    """
    undo = _Undo(give_back)
    _pending.undo.append(undo)
    try:
        yield
    finally:
        undo()
        if undo in _pending.undo:
            _pending.undo.remove(undo)


def settled(method: _Method) -> _Method:
    """Make a public method give everything back when it raises, whatever was interrupted on the way.

    ``finally`` blocks and the ``__exit__`` of context managers, those of ``torch.no_grad`` among them, can themselves
    be interrupted. What they left undone is made up for here, the latest first. If a ``KeyboardInterrupt`` or the like
    ended the call, the learner's ``_broken_off`` is called as well.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        open_before, with_gradients = len(_pending.undo), torch.is_grad_enabled()
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            while len(_pending.undo) > open_before:
                _pending.undo[-1]()
                _pending.undo.pop()
            if torch.is_grad_enabled() != with_gradients:
                torch.set_grad_enabled(with_gradients)
            if not isinstance(error, Exception):
                self._broken_off()
            raise

    return cast(_Method, call)
