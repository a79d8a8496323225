"""Giving back what was borrowed from the host, even if Ctrl-C comes while it is being given back."""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, List, TypeVar, cast

import torch
from torch import Tensor

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
def undoing(give_back: Callable[[], None], *, on_error_only: bool = False) -> Iterator[None]:
    """Call ``give_back`` when the block ends; take what it gives back inside the block only.

    If the block raises, what blocks inside it have yet to give back is given back first.

    Args:
        give_back: Must not mind running a second time after an interrupted first one, or without anything taken.
        on_error_only: Keep what was done in a block that does not raise.
    """
    undo = _Undo(give_back)
    _pending.undo.append(undo)
    try:
        yield
        if not on_error_only:
            undo()
    except BaseException:
        if undo in _pending.undo:
            _settle(_pending.undo.index(undo))
        raise
    del _pending.undo[_pending.undo.index(undo) :]


def _settle(down_to: int) -> None:
    """Give back what is pending, the latest first, until ``down_to`` of it are left."""
    while len(_pending.undo) > down_to:
        _pending.undo[-1]()
        _pending.undo.pop()


def settled(method: _Method) -> _Method:
    """Make a public method give everything back when it raises, whatever was interrupted on the way.

    ``finally`` blocks and the ``__exit__`` of context managers, those of ``torch.no_grad`` among them, can themselves
    be interrupted. What they left undone is made up for here, the latest first. If a ``KeyboardInterrupt`` or the like
    ended the call, the learner's step in the making is dropped as well.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        open_before, with_gradients = len(_pending.undo), torch.is_grad_enabled()
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            _settle(open_before)
            if torch.is_grad_enabled() != with_gradients:
                torch.set_grad_enabled(with_gradients)
            if not isinstance(error, Exception):
                self._drop_step()
            raise

    return cast(_Method, call)


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let every parameter's ``.grad`` be the block's own, ``None`` at first; put the host's back."""
    before = [(parameter, parameter.grad) for parameter in parameters]

    def give_back() -> None:
        for parameter, gradient in before:
            parameter.grad = gradient

    with undoing(give_back):
        for parameter, _ in before:
            parameter.grad = None
        yield
