"""Checkpoints of former versions are read, those of newer ones refused; none grows with the length of the run."""

import copy
import importlib
import json
import pickle
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
import torch

from clda_core import CldaError, CollaborativeLearner
from clda_core.distillation import FeatureDistillation, KLDistillation, WeightedSum
from clda_core.saliency import Hessian, ReferenceThreshold
from clda_core.selection import AllLayers
from clda_core.state import STATE_VERSION, migrated
from clda_core.strategy import describe
from clda_core.update import Average
from tests.helpers import (
    SAMPLES,
    batch,
    bits,
    every_step,
    loaded,
    make_learner,
    networks,
    nothing_changed,
    saved,
    sgd,
    train,
    train_step,
)
from tests.states import strategies, training
from tests.strategies import MODULES, cases

STATES = Path(training.__file__).parent
FILES = ["version-1", "version-2", "version-2-defaults", "version-4", "version-5", f"version-{STATE_VERSION}"]
OF_STRATEGIES = json.loads((STATES / "version-2-strategies.json").read_text())


def former(version: Any) -> Dict[str, Any]:
    file = version if isinstance(version, str) else f"version-{version}"
    return loaded((STATES / f"{file}.pt").read_bytes())


def resumed(checkpoint: Dict[str, Any], *, defaults: bool = False) -> Any:
    learner, optimizer = training.build(defaults)
    learner.teacher.load_state_dict(checkpoint["teacher"])
    learner.student.load_state_dict(checkpoint["student"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    learner.load_state_dict(checkpoint["learner"])
    return learner, optimizer


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_of_every_version_goes_on_as_it_did_there(file: str) -> None:
    checkpoint = former(file)
    assert checkpoint["learner"]["version"] == int(file.split("-")[1])
    learner, optimizer = resumed(checkpoint, defaults=file.endswith("defaults"))
    assert learner.report().steps == training.SAVED
    training.train(learner, optimizer, training.SAVED, training.LAST)
    here, there = training.outcome(learner), checkpoint["afterwards"]
    assert [record["step"] for record in here["rounds"]] == [4, 7, 10]
    for mine, its in zip(here["rounds"], there["rounds"]):
        for what in ("step", "selected", "updated", "accepted"):
            assert mine[what] == its[what]
        assert mine["rates"] == pytest.approx(its["rates"], abs=1e-6)
    for name, value in there["teacher"].items():
        # Of float64 parameters; torch's own sums differ a little from version to version.
        assert torch.allclose(here["teacher"][name], value, rtol=0, atol=1e-9), name
        assert not torch.equal(value, checkpoint["teacher"][name]) or name not in ("stem.weight", "blocks.0.0.weight")


@pytest.mark.parametrize("file", FILES)
def test_a_migrated_state_is_one_of_today(file: str) -> None:
    checkpoint = former(file)
    learner, _ = resumed(checkpoint, defaults=file.endswith("defaults"))
    before = bits(checkpoint["learner"])
    state = migrated(checkpoint["learner"])
    assert bits(checkpoint["learner"]) == before, "what is given stays as it is"
    assert bits(state) == bits(migrated(state))
    own = learner.state_dict()
    assert set(state) == set(own)
    assert state["config"] == own["config"]


def built(described: Any) -> Any:
    """Make what a configuration describes, of what the package offers today."""
    if isinstance(described, dict):
        made = {name: built(of) for name, of in described.items() if name != "class"}
        return OFFERED[described["class"]](**made) if "class" in described else made
    if isinstance(described, list):
        return [built(of) for of in described]
    return OFFERED.get(described, described) if isinstance(described, str) else described


OFFERED = {
    name: getattr(importlib.import_module(module), name)
    for module in MODULES
    for name in importlib.import_module(module).__all__
}


OF_SINGLE_PARAMETERS = [case for case in OF_STRATEGIES if "'granularity': 'parameter'" in str(OF_STRATEGIES[case])]


@pytest.mark.parametrize("case", OF_SINGLE_PARAMETERS)
def test_a_state_of_an_update_of_single_parameters_is_refused_and_changes_nothing(case: str) -> None:
    learner = make_learner(*networks())
    match = r"of an update of single parameters.*received granularity='parameter'\. Fix: go on with the clda-core that"
    with nothing_changed(learner), pytest.raises(CldaError, match=match):
        learner.load_state_dict(OF_STRATEGIES[case])


def test_updates_of_single_parameters_were_saved_alone_and_in_a_guard() -> None:
    updates = [OF_STRATEGIES[case]["config"]["update"] for case in OF_SINGLE_PARAMETERS]
    assert {"update" in update for update in updates} == {True, False}


@pytest.mark.parametrize("case", [case for case in OF_STRATEGIES if case not in OF_SINGLE_PARAMETERS])
def test_a_state_with_any_strategy_from_before_files_were_moved_is_restored(case: str) -> None:
    state = OF_STRATEGIES[case]
    state["observer"]["generator"] = torch.Generator().get_state()
    config = {role: of for role, of in migrated(state)["config"].items() if not role.endswith("_layers")}
    learner = CollaborativeLearner(strategies.Net(3), strategies.Net(2), **built(config))
    learner.load_state_dict(state)
    assert learner.state_dict()["config"] == migrated(state)["config"]


def texts(value: Any) -> Iterator[str]:
    """Yield every string in plain data."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from texts(item)
    if isinstance(value, str):
        yield value


def test_no_state_holds_a_module_path_of_the_package() -> None:
    """Files may move; checkpoints stay. A path has the package's name in it, whatever is moved where."""
    states = [resumed(former(file), defaults=file.endswith("defaults"))[0].state_dict() for file in FILES]
    for _, role, make in cases():
        if role in ("saliency", "threshold", "selection", "relation", "update", "distillation", "schedule", "probe"):
            states.append(make_learner(*networks(), **{role: make()}).state_dict())
    states.append([describe(make()) for _, _, make in cases()])
    assert not [text for text in texts(states) if "clda_core" in text]
    assert {"Taylor", "consensus", "MeanThreshold", "kl_distillation"} <= set(texts(states))


def test_paths_of_any_layout_are_migrated_and_those_of_users_stay() -> None:
    state = former(2)["learner"]
    state["config"]["saliency"] = {"class": "clda_core.some.where.deeper.Taylor"}
    state["config"]["update"]["criterion"] = {"partial": "clda_core.moved.consensus", "args": [], "keywords": {}}
    state["config"]["probe"] = {"class": "mine.clda_core.Probe", "inner": ["clda_core.Taylor", "my_clda_core.X"]}
    config = migrated(state)["config"]
    assert config["saliency"] == {"class": "Taylor"}
    assert config["update"]["criterion"]["partial"] == "consensus"
    assert config["probe"] == {"class": "mine.clda_core.Probe", "inner": ["Taylor", "my_clda_core.X"]}


@pytest.mark.parametrize("version", [1, 2])
def test_the_threshold_of_a_former_selection_is_the_learners(version: int) -> None:
    state = former(version)["learner"]
    reference = {"class": "clda_core.selection.ReferenceThreshold", "of": state["config"]["selection"]["threshold"]}
    state["config"]["selection"]["threshold"] = reference
    config = migrated(state)["config"]
    assert "threshold" not in config["selection"]
    assert config["threshold"] == describe(ReferenceThreshold())
    learner, _ = training.build()
    with nothing_changed(learner), pytest.raises(CldaError, match="another configuration: expected threshold: "):
        learner.load_state_dict(state)


def test_a_former_state_whose_selection_kept_no_threshold_goes_with_any() -> None:
    state = former(2)["learner"]
    del state["config"]["selection"]["threshold"]
    assert migrated(state)["config"]["threshold"] is None
    learner, _ = training.build()
    learner.load_state_dict(state)
    assert learner.report().steps == training.SAVED


@pytest.mark.parametrize("file", FILES[:3])
def test_the_last_rates_of_a_former_state_are_those_of_its_last_round(file: str) -> None:
    state = former(file)["learner"]
    averages = migrated(state)["observer"]["averages"]
    assert averages["last"] == {"target": state["history"][-1]["rates"], "source": state["history"][-1]["source_rates"]}
    assert migrated({**state, "history": []})["observer"]["averages"]["last"] is None


def test_the_format_has_not_changed_without_a_new_version() -> None:
    learner, optimizer = training.build()
    training.train(learner, optimizer, 0, training.SAVED)

    def form(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: form(item) for key, item in value.items()}
        return [form(item) for item in value] if isinstance(value, (list, tuple)) else type(value)

    mine, its = form(learner.state_dict()), form(former(STATE_VERSION)["learner"])
    for state in (mine, its):  # torch's own format
        del state["update"]["optimizer"], state["projectors"]["optimizer"]
    assert mine == its


def test_a_state_of_a_newer_version_is_refused_and_changes_nothing() -> None:
    learner, optimizer = resumed(former(STATE_VERSION))
    newer = {**learner.state_dict(), "version": STATE_VERSION + 1, "something": "new"}
    match = (
        f"written by a newer clda-core: expected .* from version 1 to version {STATE_VERSION}, "
        f"received version {STATE_VERSION + 1}. Fix: pip install --upgrade clda-core"
    )
    with nothing_changed(learner, optimizer), pytest.raises(CldaError, match=match):
        learner.load_state_dict(newer)


def test_a_state_of_a_former_version_and_another_configuration_is_refused() -> None:
    checkpoint = former(1)
    models, _ = training.build()
    learner = CollaborativeLearner(
        models.teacher,
        models.student,
        selection=models.selection,
        trust=models.trust,
        update=models.update,
        distillation=models.distillation,
    )
    with nothing_changed(learner), pytest.raises(CldaError, match=r"of another configuration.*'observe_every': 1"):
        learner.load_state_dict(checkpoint["learner"])


def weighted(checkpoint: Dict[str, Any], distillation: Any) -> Dict[str, Any]:
    """Return a former state of another KD loss, whose parameters and whose update's loss stay as they were."""
    state = checkpoint["learner"]
    return {**state, "config": {**state["config"], "distillation": distillation}}


@pytest.mark.parametrize("version", [1, 2])
def test_the_weight_that_a_former_loss_had_itself_is_that_of_a_sum(version: int) -> None:
    checkpoint = former(version)
    loss = {**checkpoint["learner"]["config"]["distillation"], "weight": 0.5}
    state = weighted(checkpoint, loss)
    learner, optimizer = training.build(distillation=WeightedSum([(0.5, FeatureDistillation())]))
    learner.load_state_dict(state)
    assert migrated(state)["config"] == learner.state_dict()["config"]
    theirs = state["projectors"]["module"]
    mine = learner.state_dict()["projectors"]["module"]
    assert bits(mine) == bits({f"owners.0.{name}": value for name, value in theirs.items()})
    training.train(learner, optimizer, training.SAVED, training.LAST)
    with pytest.raises(CldaError, match="of another configuration.*distillation"):
        training.build()[0].load_state_dict(state)


@pytest.mark.parametrize("version", [1, 2])
def test_the_weight_of_a_former_term_is_in_the_sums_own(version: int) -> None:
    checkpoint = former(version)
    features = {**checkpoint["learner"]["config"]["distillation"], "weight": 4.0}
    kl = {"class": "clda_core.distillation.kl.KLDistillation", "temperature": 2.0, "weight": 1.0, "class_map": None}
    terms = {"class": "clda_core.distillation.base.WeightedSum", "terms": [[3.0, kl], [0.5, features]]}
    state = weighted(checkpoint, terms)
    module = {f"owners.0.{name}": value for name, value in state["projectors"]["module"].items()}
    state["projectors"] = {**state["projectors"], "module": module}
    learner, _ = training.build(distillation=WeightedSum([(3.0, KLDistillation()), (2.0, FeatureDistillation())]))
    learner.load_state_dict(state)
    assert bits(learner.state_dict()["projectors"]["module"]) == bits(module)


def test_a_former_loss_within_an_update_keeps_its_weight() -> None:
    checkpoint = former(2)
    guard = copy.deepcopy(checkpoint["learner"]["config"]["update"])
    guard["update"]["distillation"]["weight"] = 2.0
    state = weighted(checkpoint, checkpoint["learner"]["config"]["distillation"])
    state["config"]["update"] = guard
    loss = migrated(state)["config"]["update"]["update"]["distillation"]
    assert loss == describe(WeightedSum([(2.0, KLDistillation(temperature=1.0))]))


def test_a_users_loss_keeps_an_option_named_weight() -> None:
    loss = {"class": "package.KLDistillation", "weight": 0.5}
    assert migrated(weighted(former(2), loss))["config"]["distillation"] == loss


def test_the_granularity_of_an_update_of_another_package_is_its_own() -> None:
    state = former("version-2")["learner"]
    state["config"]["update"] = {"class": "mine.Average", "granularity": "channel"}
    assert migrated(state)["config"]["update"] == state["config"]["update"]


def test_an_interrupt_while_a_state_is_loaded_takes_all_of_it_back() -> None:
    class Interrupted(Average):
        armed = False

        def state_dict(self) -> Dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            if Interrupted.armed:
                Interrupted.armed = False
                raise KeyboardInterrupt

    learner = make_learner(*networks(), update=Interrupted(decay=0.9), selection=AllLayers())
    optimizer = sgd(learner.student)
    state = learner.state_dict()
    train(learner, optimizer, 2)
    Interrupted.armed = True
    with nothing_changed(learner, optimizer), pytest.raises(KeyboardInterrupt):
        learner.load_state_dict(state)


# -------------------------------------------------------------------------------------------- how much history


def after(steps: int, **options: Any) -> CollaborativeLearner:
    torch.manual_seed(4)
    teacher, student = networks()
    learner = make_learner(teacher, student, update=Average(decay=0.9), selection=AllLayers(), **options)
    train(learner, sgd(student), steps)
    return learner


def test_the_state_does_not_grow_with_the_rounds() -> None:
    teacher, student = networks()
    learner = make_learner(
        teacher, student, update=Average(decay=0.99), schedule=every_step(observe_every=100), keep_rounds=5
    )
    sizes = {}
    for step in range(300):
        learner.distill(student(batch()), batch())
        learner.step(step_fn=lambda: None)
        if step + 1 in (20, 300):
            sizes[step + 1] = len(saved(learner.state_dict()))
    assert learner.report().made == 300
    assert sizes[300] <= 1.02 * sizes[20], sizes  # counts have more digits


def test_the_report_says_what_is_no_longer_kept_and_its_table_is_of_all_rounds() -> None:
    everything, last = after(7).report(), after(7, keep_rounds=3).report()
    assert last.rounds == everything.rounds[-3:]
    assert (last.made, last.earlier.rounds) == (7, 4)
    first, *table = str(last).splitlines()
    first_of_all, *table_of_all = str(everything).splitlines()
    assert table == table_of_all
    assert first == first_of_all.replace("7 rounds", "7 rounds (the last 3 kept one by one)")
    assert after(7, keep_rounds=3).metrics()["clda/rounds"] == 7.0


def test_interrupted_and_resumed_with_a_short_history_is_uninterrupted() -> None:
    teacher, student = networks()
    learner, optimizer = make_learner(teacher, student, keep_rounds=2), sgd(student)
    train(learner, optimizer, 4)
    state = loaded(saved([part.state_dict() for part in (teacher, student, optimizer, learner)]))
    torch.manual_seed(3)
    for step in range(4, 7):
        train_step(learner, optimizer, step)
    again, its_student = networks(seed=9)
    other, its_optimizer = make_learner(again, its_student, keep_rounds=2), sgd(its_student)
    for part, its in zip((again, its_student, its_optimizer, other), state):
        part.load_state_dict(its)
    torch.manual_seed(3)
    for step in range(4, 7):
        train_step(other, its_optimizer, step)
    assert other.report().made == 7
    assert bits(other.state_dict()) == bits(learner.state_dict())
    assert bits(again.state_dict()) == bits(teacher.state_dict())


def test_a_longer_history_is_cut_where_less_is_kept() -> None:
    long, short = after(6), make_learner(*networks(), update=Average(decay=0.9), selection=AllLayers(), keep_rounds=2)
    short.load_state_dict(long.state_dict())
    assert short.report() == after(6, keep_rounds=2).report()


@pytest.mark.parametrize("keep", [0, 1.5, None])
def test_how_many_rounds_to_keep_is_checked(keep: Any) -> None:
    with pytest.raises(CldaError, match="keep_rounds"):
        make_learner(*networks(), keep_rounds=keep)


def moved(value: Any) -> Any:
    """Return a state as after a move: a generator's is no longer bytes on the CPU, which alone torch restores."""
    if isinstance(value, dict):
        return {key: moved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item) for item in value]
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 else value


def test_a_generators_state_that_was_moved_is_brought_back() -> None:
    learner = make_learner(*networks(), saliency=Hessian())
    train(learner, sgd(learner.student), 2)
    state = learner.state_dict()
    with pytest.raises((RuntimeError, TypeError)):
        torch.Generator().set_state(moved(state)["observer"]["generator"])
    other = make_learner(*networks(), saliency=Hessian())
    other.load_state_dict(moved(state))
    assert bits(other.state_dict()["observer"]["generator"]) == bits(state["observer"]["generator"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_is_independent_also_in_the_midst_of_a_step(how: Any) -> None:
    """Averagers of weights copy whole modules, with the learner among their attributes."""
    torch.manual_seed(0)
    teacher, student = (torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.Linear(width, 3)) for width in (9, 4))
    learner = make_learner(teacher, student, update=Average(decay=0.5), selection=AllLayers())
    train(learner, sgd(student), 1)
    translated = torch.nn.Linear(5, 5)(batch())  # inputs made by a network of the host, with a graph
    loss = learner.distill(student(translated), translated)
    weights = torch.rand(SAMPLES) * torch.ones((), requires_grad=True)
    loss = loss + learner.distill(student(translated), {"input": translated}, mask=weights)
    other = how(learner)
    assert other.student is not student
    assert bits(other.state_dict()) == bits(learner.state_dict())
    before = bits(teacher.state_dict())
    train(other, sgd(other.student), 2)
    assert bits(teacher.state_dict()) == before
    assert other.report().made == 3
    loss.backward()
    learner.step(sgd(student))
    assert learner.report().made == 2
