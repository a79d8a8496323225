"""Tensors and modules by canonical name, whatever wraps a model."""

import gc
import weakref

import pytest
import torch
from torch import nn

from clda_core._host.names import canonical_modules, looking_once, modules_of, named_tensors, paired_names
from clda_core.errors import CldaError
from clda_core.layers import ModelView, canonical_buffers, canonical_name, canonical_parameters, group_layers
from clda_core.relation import ByName
from tests.models import ResNet, Wrapped, mlp

WRAPPERS = {
    "parallel": nn.DataParallel,
    "compiled": Wrapped,
    "parallel of compiled": lambda model: nn.DataParallel(Wrapped(model)),
    "compiled of parallel": lambda model: Wrapped(nn.DataParallel(model)),
    "parallel twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.module._orig_mod.module.fc.weight", "fc.weight"),
        ("encoder._orig_mod.0.weight", "encoder.0.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.fc.weight", "layers.0.fc.weight"),
        ("module", "module"),
    ],
)
def test_canonical_name(name, canonical) -> None:
    assert canonical_name(name) == canonical


class OfTheUser(nn.Module):
    """A network whose backbone is called ``module``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.module = nn.Sequential()
        self.module.add_module("stem", nn.Linear(3, width))
        self.module.add_module("fc", nn.Linear(width, width))
        self.fc = nn.Linear(width, 2)

    def forward(self, x):
        return self.fc(self.module(x))


class Engine(nn.Module):
    """As DeepSpeed's engine: the wrapped model is not all that it holds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("scale", torch.ones(1))


Engine.__name__ = "DeepSpeedEngine"


OWN = ["module.stem.weight", "module.stem.bias", "module.fc.weight", "module.fc.bias", "fc.weight", "fc.bias"]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_attribute_of_the_users_own_called_module_is_no_wrapper(wrap) -> None:
    assert list(canonical_parameters(OfTheUser())) == OWN
    assert list(canonical_parameters(wrap(OfTheUser()))) == OWN
    assert group_layers(wrap(OfTheUser())) == group_layers(OfTheUser())
    modules = canonical_modules(wrap(OfTheUser()))
    assert isinstance(modules[""], OfTheUser)
    assert isinstance(modules["module.fc"], nn.Linear)


def test_a_part_called_module_inside_is_the_users_own() -> None:
    model = nn.Sequential(nn.Sequential(), nn.Linear(2, 2))
    model[0].add_module("module", nn.Linear(2, 2))
    assert list(canonical_parameters(model)) == ["0.module.weight", "0.module.bias", "1.weight", "1.bias"]


def test_a_part_that_is_wrapped_is_named_as_if_it_were_not() -> None:
    model = OfTheUser()
    model.module.fc = nn.DataParallel(model.module.fc)
    assert list(canonical_parameters(model)) == OWN
    assert type(canonical_modules(model)["module.fc"]) is nn.Linear


def test_wrappers_are_known_by_their_class_whatever_else_they_hold() -> None:
    assert list(canonical_parameters(Engine(OfTheUser()))) == OWN
    assert list(canonical_buffers(Engine(mlp()))) == ["scale"]
    averaged = torch.optim.swa_utils.AveragedModel(OfTheUser())
    assert list(canonical_parameters(averaged)) == OWN


def test_a_teacher_with_an_own_module_pairs_with_a_student_that_has_none() -> None:
    teacher, student = OfTheUser(8), OfTheUser(4)
    pairs = ByName()(ModelView(teacher, group_layers(teacher)), ModelView(student, group_layers(student))).pairs
    assert {name: layer.name for name, layer in pairs.items()} == {
        name: name for name in ("module.stem", "module.fc", "fc")
    }
    bare = nn.Sequential()
    bare.add_module("stem", nn.Linear(3, 4))
    bare.add_module("fc", nn.Linear(4, 2))
    pairs = ByName()(ModelView(teacher, group_layers(teacher)), ModelView(bare, group_layers(bare))).pairs
    assert {name: layer.name for name, layer in pairs.items()} == {"fc": "fc"}


def fit(one: nn.Module, other: nn.Module) -> bool:
    """Whether every tensor of one state is paired with that of the other which is its own in the bare model."""
    ours, theirs = other.state_dict(keep_vars=True), one.state_dict(keep_vars=True)
    names = paired_names(theirs, other)
    return names is not None and len(names) == len(ours) and all(ours[a] is theirs[b] for a, b in names.items())


@pytest.mark.parametrize("loaded", ["bare", *WRAPPERS])
@pytest.mark.parametrize("saved", ["bare", *WRAPPERS])
@pytest.mark.parametrize("build", [mlp, OfTheUser, lambda: nn.Sequential(ResNet((1, 1)), ResNet((1, 1)))])
def test_a_state_is_paired_with_the_names_of_another_wrapper(build, saved, loaded) -> None:
    model = build()
    wrappers = {"bare": lambda model: model, **WRAPPERS}
    assert fit(wrappers[saved](model), wrappers[loaded](model))


def test_a_state_of_wrapped_and_of_shared_parts_is_paired() -> None:
    plain, wrapped = OfTheUser(), OfTheUser()
    wrapped.module.fc = nn.DataParallel(wrapped.module.fc)
    inside = "module.fc.module.weight"
    assert paired_names(wrapped.state_dict(), plain)["module.fc.weight"] == inside
    assert paired_names(plain.state_dict(), wrapped)[inside] == "module.fc.weight"
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    there = nn.DataParallel(model)
    assert paired_names(there.state_dict(), model) == {name: f"module.{name}" for name in model.state_dict()}
    assert paired_names(model.state_dict(), there) == {f"module.{name}": name for name in model.state_dict()}


@pytest.mark.parametrize(
    "names",
    [[], ["0.weight"], ["0.weight", "1.bias"], ["module.a", "module.b"], ["0.weight", "0.bias", "module.0.bias"]],
)
def test_a_state_of_another_model_is_paired_with_none(names) -> None:
    assert paired_names(names, nn.Sequential(nn.Linear(2, 2))) is None


def test_names_that_collide_are_an_error() -> None:
    model = Wrapped(nn.Linear(2, 2))
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(CldaError, match=r"share a canonical name.*'_orig_mod.weight', which becomes 'weight' again"):
        canonical_parameters(model)


def _tied(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight


def _converted(model: nn.Sequential) -> None:
    parameter = model[0].bias
    del model[0].bias
    model[0].register_buffer("bias", parameter)


def _renamed(model: nn.Sequential) -> None:
    model[3].weight_again = model[3].weight
    del model[3].weight


CHANGES = {
    "a parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(2, 2))),
    "a removed parameter": lambda model: setattr(model[0], "bias", None),
    "a new parameter": lambda model: model[2].register_parameter("scale", nn.Parameter(torch.zeros(1))),
    "a buffer": lambda model: setattr(model[3], "running_mean", torch.ones(2)),
    "a module": lambda model: model.__setitem__(1, nn.Linear(2, 2)),
    "an appended module": lambda model: model.add_module("4", nn.Linear(2, 2)),
    "the order": lambda model: model._modules.update({"0": model[1], "1": model[0]}),
    "a tie": _tied,
    "a parameter that becomes a buffer": _converted,
    "a name": _renamed,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_tensors_are_named_anew_when_the_model_has_changed(change: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2))
    before = named_tensors(model)
    again = named_tensors(model)
    assert again.state is before.state
    assert list(again.all) == list(before.all)
    CHANGES[change](model)
    after = named_tensors(model)
    assert after.state is not before.state
    walked = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = {name: tensor for name, tensor in walked.items() if tensor.is_floating_point()}
    assert {name: id(tensor) for name, tensor in after.all.items()} == {
        name: id(tensor) for name, tensor in floating.items()
    }


def test_values_may_change_without_naming_anew_and_memory_may_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = named_tensors(model)
    with torch.no_grad():
        model[0].weight.zero_()
    model.load_state_dict(model.state_dict())
    assert named_tensors(model).state is before.state
    model.double()
    after = named_tensors(model)
    assert after.state is not before.state
    assert after.parameters["0.weight"] is before.parameters["0.weight"], "Module.to() keeps it"
    assert after.parameters["0.weight"].dtype == torch.float64


def test_a_block_looks_at_a_model_once_and_the_next_one_again() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    with looking_once(model):
        before, modules = named_tensors(model), modules_of(model)
        with looking_once(model, other):
            model.add_module("1", nn.Linear(2, 2))
        assert named_tensors(model) is before
        assert modules_of(model) == modules == [model, model[0]]
        named_tensors(other)
        other.add_module("part", nn.ReLU())
        assert modules_of(other) == [other, other.part], "it is no model of this block"
    assert list(named_tensors(model).parameters) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len(modules_of(model)) == 3


def test_a_module_alone_has_itself_after_its_parameter_was_exchanged() -> None:
    model = nn.Linear(2, 2)
    named_tensors(model)
    model.weight = nn.Parameter(torch.ones(2, 2))
    assert modules_of(model) == [model]
    assert named_tensors(model).parameters["weight"] is model.weight


def test_naming_keeps_nothing_alive() -> None:
    class Cyclic(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.parent = [parent]

    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("1", Cyclic(model))
    parameter = model[0].weight
    named_tensors(model)
    dead = [weakref.ref(model), weakref.ref(model[0])]
    del model
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    assert parameter.shape == (2, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_named_too() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    assert list(canonical_parameters(model)) == list(canonical_parameters(model)) == ["0.weight", "0.bias"]
