"""The format of a learner's state, and how states that were written in a former format are read."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Callable, Dict, Mapping

from .errors import problem
from .report import Earlier

STATE_VERSION = 3
"""Raise it with every change of what :meth:`CollaborativeLearner.state_dict` holds, and say below how to get there."""


def migrated(state: Any) -> Dict[str, Any]:
    """Return a state in today's format; the one that is given stays as it is.

    Raises:
        CldaError: If it is no state, or was written in a newer format.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if not isinstance(version, int) or not 1 <= version <= STATE_VERSION:
        newer = isinstance(version, int) and version > STATE_VERSION
        raise problem(
            "the state was written by a newer clda-core" if newer else "the state cannot be read",
            expected=f"a state_dict() in a format from version 1 to version {STATE_VERSION}",
            received=f"version {version!r}" if isinstance(state, Mapping) else type(state).__name__,
            fix="pip install --upgrade clda-core" if newer else "load an unchanged state_dict() of a learner",
        )
    today = dict(state)
    try:
        for former in range(version, STATE_VERSION):
            today = {**_MIGRATIONS[former](today), "version": former + 1}
    except (KeyError, TypeError, ValueError) as error:
        raise problem(
            "the state cannot be read",
            expected=f"a state_dict() in the format of version {version}",
            received=f"one that cannot be brought to version {STATE_VERSION}: {type(error).__name__}: {error}",
            fix="load an unchanged state_dict() of a learner",
        ) from error
    return today


def _from_1(state: Dict[str, Any]) -> Dict[str, Any]:
    """Before ``observe_every`` every round was observed, and every round was kept."""
    config = dict(state["config"])
    schedule = config["schedule"]
    if isinstance(schedule, Mapping) and schedule.get("class") == "clda_core.schedule.Schedule":
        config["schedule"] = {"observe_every": 1, **schedule}
    return {**state, "config": config, "earlier": asdict(Earlier())}


def _from_2(state: Dict[str, Any]) -> Dict[str, Any]:
    """Before it was noted whose saliency is known, and which round waits for target data.

    An update's moments had positions, which it still reads itself.
    """
    return {**state, "owed": None, "observer": {**state["observer"], "known": None, "round_is_over": False}}


_MIGRATIONS: Dict[int, Callable[[Dict[str, Any]], Dict[str, Any]]] = {1: _from_1, 2: _from_2}
"""By version, what makes a state of that version one of the next."""
