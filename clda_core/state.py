"""The format of a learner's state, and how states that were written in a former format are read."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Tuple

from .errors import CldaError, problem
from .history import Earlier
from .layers import ModelView
from .lead import Averages
from .strategy import PACKAGE, describe

State = Dict[str, Any]
Description = Dict[str, Any]

STATE_VERSION = 6
"""Raise it with every change of what :meth:`CollaborativeLearner.state_dict` holds, and say below how to get there."""


def configuration(strategies: Mapping[str, Any], teacher: ModelView, student: ModelView) -> Dict[str, Any]:
    """Return what must be equal for a state to be loaded: the strategies by role, and the layers of both models."""
    return {
        **{role: describe(strategy) for role, strategy in strategies.items()},
        "teacher_layers": [[layer.name, layer.numel] for layer in teacher.layers],
        "student_layers": [[layer.name, layer.numel] for layer in student.layers],
    }


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
            for migrate in _MIGRATIONS[former]:
                today = migrate(today)
            today["version"] = former + 1
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise problem(
            "the state cannot be read",
            expected=f"a state_dict() in the format of version {version}",
            received=f"one that cannot be brought to version {STATE_VERSION}: {type(error).__name__}: {error}",
            fix="load an unchanged state_dict() of a learner",
        ) from error
    return today


# ------------------------------------------------------------------------------------- what changed, from 1 to 2


def _every_step_was_observed(state: State) -> State:
    """Before ``observe_every`` every step of a round was observed."""
    return _with_strategies(state, _observe_every)


def _observe_every(strategy: Description) -> Description:
    if strategy["class"] == "clda_core.schedule.Schedule":
        return {"observe_every": 1, **strategy}
    return strategy


def _every_round_was_kept(state: State) -> State:
    return {**state, "earlier": Earlier().to_dict()}


# ------------------------------------------------------------------------------------- what changed, from 2 to 3


def _strategies_had_module_paths(state: State) -> State:
    """Before strategies and functions of this package went by their bare names; whatever its files were called."""
    roles = {role: _without_paths(of) for role, of in state["config"].items() if not role.endswith("_layers")}
    return {**state, "config": {**state["config"], **roles}}


def _without_paths(described: Any) -> Any:
    if isinstance(described, str):
        return described.rpartition(".")[2] if described.startswith(f"{PACKAGE}.") else described
    if isinstance(described, dict):
        return {name: _without_paths(of) for name, of in described.items()}
    return [_without_paths(of) for of in described] if isinstance(described, list) else described


def _losses_weighed_themselves(state: State) -> State:
    """Before only a ``WeightedSum`` weighed: each loss of ours had a weight, which that of a term of a sum multiplied.

    A loss whose weight was not 1 becomes a sum of one term, which owns the loss's parameters.
    """
    new = _with_strategies(_with_strategies(state, _weigh_terms), _weigh_by_sum)
    former, loss = state["config"]["distillation"], new["config"]["distillation"]
    if not _had_weight(former) or loss["class"] == former["class"]:
        return new
    module = {f"owners.0.{name}": value for name, value in state["projectors"]["module"].items()}
    return {**new, "projectors": {**state["projectors"], "module": module}}


def _weigh_terms(strategy: Description) -> Description:
    if strategy["class"] != "WeightedSum":
        return strategy
    weighed = [
        [weight * loss["weight"], {**loss, "weight": 1.0}] if _had_weight(loss) else [weight, loss]
        for weight, loss in strategy["terms"]
    ]
    return {**strategy, "terms": weighed}


def _weigh_by_sum(strategy: Description) -> Description:
    if not _had_weight(strategy):
        return strategy
    loss = {name: value for name, value in strategy.items() if name != "weight"}
    weight = strategy["weight"]
    return loss if weight == 1 else {"class": "WeightedSum", "terms": [[weight, loss]]}


def _had_weight(described: Any) -> bool:
    return isinstance(described, dict) and described.get("class") in (
        "AttentionTransfer",
        "ChannelWiseDistillation",
        "DISTDistillation",
        "DecoupledDistillation",
        "FeatureDistillation",
        "KLDistillation",
    )


def _updates_moved_single_parameters(state: State) -> State:
    return _with_strategies(state, _whole_layers)


def _whole_layers(strategy: Description) -> Description:
    if strategy["class"] not in ("Average", "AlignedAverage", "MaskedDistillation"):
        return strategy
    if strategy.get("granularity", "layer") != "layer":
        raise problem(
            "the state is of an update of single parameters, which this version no longer has",
            expected="granularity='layer'",
            received=f"granularity={strategy['granularity']!r}",
            fix="go on with the clda-core that wrote it, or begin with a new learner, whose update moves whole layers",
        )
    return {name: value for name, value in strategy.items() if name != "granularity"}


def _data_was_not_followed(state: State) -> State:
    """Before it was noted whose saliency is known, and which round waits for target data.

    An update's moments had positions, which it still reads itself.
    """
    return {**state, "owed": None, "observer": {**state["observer"], "known": None}}


def _last_rates_were_the_reports(state: State) -> State:
    """Before the observer kept the rates of the last round, and all that is averaged in one place."""
    observer = dict(state["observer"])
    last = [{"target": record["rates"], "source": record["source_rates"]} for record in state["history"][-1:]]
    averages = {**observer.pop("observations"), "known": observer.pop("known"), "last": last[0] if last else None}
    return {**state, "observer": {**observer, "averages": averages}}


def _selections_had_thresholds(state: State) -> State:
    """Before the threshold was the learner's; of a selection that did not keep it as an argument it is not known."""
    config = dict(state["config"])
    selection = config["selection"]
    if isinstance(selection, dict):
        config["selection"] = {name: of for name, of in selection.items() if name != "threshold"}
    config["threshold"] = selection.get("threshold") if isinstance(selection, dict) else None
    return {**state, "config": config}


# ------------------------------------------------------------------------------------- what changed, from 3 to 4


def _nobody_was_validated(state: State) -> State:
    """Before rounds asked nobody who leads: the student was trusted in all of them."""
    config = {**state["config"], "validator": None, "trust": {"class": "FixedTrust", "trust": 1.0}}
    lead = Averages()._asdict()
    return {**state, "config": config, "peak": 0.0, "lead": lead}


def _rates_were_not_the_hosts(state: State) -> State:
    return _with_strategies(state, _own_rate)


def _own_rate(strategy: Description) -> Description:
    if strategy["class"] == "MaskedDistillation":
        new = {"relative_rate": 0.1, "learns_on": "inputs", "own_targets": False, "source_weight": 0.0}
        return {**new, **strategy}
    return strategy


def _changes_were_not_counted(state: State) -> State:
    """Before only accepted rounds were counted; where a guard judged, those are the ones that changed the teacher."""
    earlier = state["earlier"]
    changed = earlier["accepted"] if earlier["judged"] else earlier["rounds"]
    return {**state, "earlier": {**earlier, "changed": changed}}


# ------------------------------------------------------------------------------------- what changed, from 4 to 5


def _every_start_was_rehearsed(state: State) -> State:
    """Before a resumed learner rehearsed a round again, and did not know whether rounds wait for inputs."""
    return {**state, "rehearsed": False, "take_inputs": False}


# ------------------------------------------------------------------------------------- what changed, from 5 to 6


def _teachers_were_not_known_to_be_trained(state: State) -> State:
    """Before it was kept whether the host trains the teacher too, which the next observed step shows.

    An update that learns the teacher's own targets goes on from the teacher as it is.
    """
    return {**state, "observer": {**state["observer"], "cotrained": False}}


_MIGRATIONS: Dict[int, Tuple[Callable[[State], State], ...]] = {
    1: (_every_step_was_observed, _every_round_was_kept),
    2: (
        _strategies_had_module_paths,
        _losses_weighed_themselves,
        _updates_moved_single_parameters,
        _selections_had_thresholds,
        _data_was_not_followed,
        _last_rates_were_the_reports,
    ),
    3: (_nobody_was_validated, _rates_were_not_the_hosts, _changes_were_not_counted),
    4: (_every_start_was_rehearsed,),
    5: (_teachers_were_not_known_to_be_trained,),
}
"""By version, what makes a state of that version one of the next, one change after the other.

A change of what strategies are made of is a function of one description, ``{"class": name, argument: value, ...}``,
which :func:`_with_strategies` applies to each. No function changes what it is given.
"""


def _with_strategies(state: State, change: Callable[[Description], Any]) -> State:
    """Return the state with every strategy in its configuration changed, the inner ones first."""

    def changed(described: Any) -> Any:
        if isinstance(described, dict):
            inner = {name: changed(of) for name, of in described.items()}
            return change(inner) if "class" in inner else inner
        return [changed(of) for of in described] if isinstance(described, list) else described

    return {**state, "config": {role: changed(of) for role, of in state["config"].items()}}


def restore(
    state: Any, own: Mapping[str, Any], load: Callable[[Mapping[str, Any]], None], *, relation_may_differ: bool
) -> None:
    """Load a learner's state of any version, all of it or nothing.

    Args:
        state: What is loaded.
        own: The learner's own state.
        load: Takes a state of today's format, or raises half-way.
        relation_may_differ: Whether the relation depends on more than the models.

    Raises:
        CldaError: If the state does not fit.
    """
    state = migrated(state)
    _check_fits(state, {**own, "relation": None} if relation_may_differ else own)
    try:
        load(state)
    except BaseException as error:
        load(own)
        if not isinstance(error, Exception):
            raise
        raise CldaError(
            f"the state cannot be loaded: {type(error).__name__}: {error}. The learner is as before. Fix: load an "
            "unchanged state_dict() of a learner with the same models and strategies, into a learner just built"
        ) from error


def _check_fits(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless ``state`` fits a learner whose own state is ``own``."""
    if set(state) != set(own):
        raise problem(
            "the state cannot be read",
            expected=f"a state_dict() with the keys {sorted(own)}",
            received=f"the keys {sorted(map(str, state))}",
            fix="load an unchanged state_dict() of a learner",
        )
    config = state["config"] if isinstance(state["config"], Mapping) else {}
    unknown = {"threshold"} if config.get("threshold", ...) is None else set()  # in a state of a former version
    differing = [key for key in own["config"] if key not in unknown and config.get(key) != own["config"][key]]
    if differing:
        key = differing[0]
        raise problem(
            f"the state is of another {'architecture' if key.endswith('_layers') else 'configuration'}",
            expected=f"{key}: {own['config'][key]!r}",
            received=f"{key}: {config.get(key)!r}",
            fix="build the learner with the models and strategies the state was saved with",
        )
    if state["relation"] is not None and own["relation"] is not None and state["relation"] != own["relation"]:
        raise problem(
            "the state is of another relation",
            expected=str(own["relation"]),
            received=str(state["relation"]),
            fix="build the learner with the models the state was saved with",
        )
