"""The optimizer of updates: right whatever the memory layouts, its state by name."""

import copy
import pickle
from typing import Any, Dict, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core._host.layout import is_dense
from clda_core._host.own_optimizer import OwnOptimizer
from clda_core.distillation import kl_distillation
from clda_core.errors import CldaError
from clda_core.update import MaskedDistillation
from tests._host.test_layout import LAYOUTS
from tests.helpers import bits
from tests.reference_update import Adam, float64
from tests.update.rounds import changed, randomise, round_context, values

RATE = 1e-2


class Product(nn.Module):
    """``x @ w.t()`` with a normalised weight, a prototype classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ F.normalize(self.weight, dim=1).t()


class Einsum(Product):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,kd->nk", x.flatten(1), self.weight)


class Transposed(nn.Module):
    """An embedding of positions that is transposed before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Parameter(torch.zeros(1, 12, 5)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.flatten(1)[:, None] + self.embedding.transpose(1, 2)).tanh().mean(1))


class Reduction(nn.Module):
    """SegFormer's ``sequence_reduction``: a convolution of tokens that were permuted into an image."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        image = tokens.permute(0, 2, 1).reshape(x.shape)
        return self.head(self.reduce(image).flatten(2).transpose(1, 2).tanh().mean(1))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().flatten(1))


def from_hwio() -> nn.Module:
    """Return a network whose convolution was converted from TensorFlow's layout by ``permute``."""
    model = Convolution()
    model.conv.weight = nn.Parameter(LAYOUTS["permuted"](model.conv.weight.detach()))
    return model


def channels_last() -> nn.Module:
    return Convolution().to(memory_format=torch.channels_last)


def sliced() -> nn.Module:
    """Return a network of which one weight is a part of a larger tensor."""
    model = Convolution()
    model.head.weight = nn.Parameter(torch.zeros(5, 11)[:, :8])
    return model


def inputs(seed: int, memory_format: Any = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 2, 2, generator=generator).contiguous(memory_format=memory_format)


def student() -> nn.Module:
    return randomise(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 7)


class Reference:
    """The same rounds by float64 Adam, from gradients of a float64 copy."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self.adam = copy.deepcopy(teacher).double(), Adam()

    def round(self, x: Tensor) -> None:
        parameters = dict(self.teacher.named_parameters())
        target = student().double()(x.double()).detach()
        loss = kl_distillation(self.teacher(x.double()), target, temperature=1.0)
        found = torch.autograd.grad(loss, list(parameters.values()))
        now: Dict[str, np.ndarray] = {name: float64(parameter) for name, parameter in parameters.items()}
        self.adam.step(now, {name: float64(gradient) for name, gradient in zip(now, found)}, RATE)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(now[name]))

    def check(self, teacher: nn.Module) -> None:
        for name, parameter in self.teacher.named_parameters():
            found = float64(dict(teacher.named_parameters())[name])
            np.testing.assert_allclose(found, float64(parameter), rtol=0, atol=2e-5, err_msg=name)


OPTIMIZERS: Dict[str, Any] = {"the default": None}
try:
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)
    OPTIMIZERS["the user's, fused"] = lambda parameters: torch.optim.Adam(parameters, lr=RATE, fused=True)
except (TypeError, RuntimeError):  # an older torch
    OPTIMIZERS["the user's"] = lambda parameters: torch.optim.Adam(parameters, lr=RATE)
NETWORKS = [Product, Einsum, Transposed, Reduction, Convolution, from_hwio, channels_last]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_rounds_are_those_of_float64_adam_whatever_the_layouts(
    network: Any, memory_format: Any, optimizer: str
) -> None:
    teacher = randomise(network(), 1)
    reference = Reference(teacher)
    update = MaskedDistillation(learning_rate=RATE, optimizer=OPTIMIZERS[optimizer])
    for seed in range(3):
        x = inputs(seed, memory_format)
        update.apply(round_context(teacher, student(), inputs=x))
        reference.round(x)
    reference.check(teacher)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_follow_a_teacher_that_changes_its_memory_format_between_rounds(optimizer: str) -> None:
    teacher = randomise(Convolution(), 1)
    reference = Reference(teacher)
    update = MaskedDistillation(learning_rate=RATE, optimizer=OPTIMIZERS[optimizer])
    for seed, memory_format in enumerate([torch.contiguous_format, torch.channels_last, torch.contiguous_format]):
        teacher.to(memory_format=memory_format)
        x = inputs(seed, memory_format)
        update.apply(round_context(teacher, student(), inputs=x))
        reference.round(x)
    reference.check(teacher)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_follow_a_teacher_that_changes_its_dtype_between_rounds(optimizer: str) -> None:
    teacher = randomise(Convolution(), 1)
    reference = Reference(teacher)
    update = MaskedDistillation(learning_rate=RATE, optimizer=OPTIMIZERS[optimizer])
    for seed, dtype in enumerate([torch.float32, torch.float64, torch.float32]):
        x = inputs(seed)
        update.apply(round_context(teacher.to(dtype), student().to(dtype), inputs=x.to(dtype)))
        reference.round(x)
    reference.check(teacher)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_of_a_checkpoint_take_the_layout_of_the_parameters_they_meet(optimizer: str) -> None:
    teacher = randomise(channels_last(), 1)
    reference = Reference(teacher)
    first, then = (MaskedDistillation(learning_rate=RATE, optimizer=OPTIMIZERS[optimizer]) for _ in range(2))
    first.apply(round_context(teacher, student(), inputs=inputs(0)))
    then.load_state_dict(first.state_dict())
    plain = Convolution()
    plain.load_state_dict(teacher.state_dict())
    then.apply(round_context(plain, student(), inputs=inputs(1)))
    reference.round(inputs(0))
    reference.round(inputs(1))
    reference.check(plain)


def test_a_teacher_with_a_sliced_parameter_is_stepped_right_and_its_neighbours_stay() -> None:
    teacher = randomise(sliced(), 1)
    whole = teacher.head.weight.detach().as_strided((5, 11), (11, 1))
    whole[:, 8:] = 3.0
    reference = Reference(teacher)
    update = MaskedDistillation(learning_rate=RATE)
    for seed in range(2):
        update.apply(round_context(teacher, student(), inputs=inputs(seed)))
        reference.round(inputs(seed))
    reference.check(teacher)
    assert whole[:, 8:].eq(3.0).all()


def test_a_fused_optimizer_is_not_given_a_sliced_parameter() -> None:
    class Fused(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.param_groups[0]["fused"] = True

    teacher = randomise(sliced(), 1)
    before = values(teacher)
    with pytest.raises(CldaError, match=r"do not fill their memory.*\['head.weight'\].*fused=False"):
        MaskedDistillation(optimizer=Fused).apply(round_context(teacher, student(), inputs=inputs(0)))
    assert not changed(teacher, before)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    parameter=st.sampled_from(["row-major", "channels last", "permuted", "a slice", "every other element"]),
    gradients=st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10),
)
def test_a_step_is_float64_adams_for_every_pair_of_layouts(
    parameter: str, gradients: Any, dtype: torch.dtype, strength: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(layout: str) -> Tensor:
        return LAYOUTS[layout](torch.randn(4, 3, 2, 5, generator=generator, dtype=dtype))

    model = nn.Module()
    model.w = nn.Parameter(drawn(parameter))
    own, oracle = OwnOptimizer(RATE, None), Adam()
    expected = {"w": float64(model.w)}
    for layout in gradients:
        gradient = drawn(layout)
        parameters = dict(model.named_parameters())
        own.prepare(model, parameters)
        own.step(parameters, {"w": gradient}, strength)
        oracle.step(expected, {"w": float64(gradient)}, RATE * strength)
    np.testing.assert_allclose(float64(model.w), expected["w"], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
    assert is_dense(model.w) == (parameter in ("row-major", "channels last", "permuted"))
    assert model.w.grad is None


# ------------------------------------------------------------------------------------------------- state by name


class Sorted(nn.Module):
    """The same network with its definitions in one order or the other."""

    def __init__(self, other_order: bool = False, width: int = 12, extra: bool = False) -> None:
        super().__init__()
        for name in ("norm", "fc") if other_order else ("fc", "norm"):
            setattr(self, name, nn.Linear(width, width) if name == "fc" else nn.LayerNorm(width))
        self.head = nn.Linear(width, 5)
        if extra:
            self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.norm(x.flatten(1))).tanh())


def after_rounds(teacher: nn.Module, update: MaskedDistillation, *seeds: int) -> None:
    for seed in seeds:
        update.apply(round_context(teacher, student(), inputs=inputs(seed)))


def positional(state: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a state as it was written before it had names."""
    names = [name for group in state["optimizer"]["param_groups"] for name in group["params"]]
    moments = {names.index(name): of_one for name, of_one in state["optimizer"]["state"].items()}
    groups = [
        {**group, "params": [names.index(name) for name in group["params"]]}
        for group in state["optimizer"]["param_groups"]
    ]
    return {"optimizer": {"state": moments, "param_groups": groups}, "base_rates": state["base_rates"]}


def test_moments_belong_to_names_and_not_to_positions() -> None:
    teacher, update = randomise(Sorted(), 1), MaskedDistillation(learning_rate=RATE)
    after_rounds(teacher, update, 0, 1)
    other, resumed = Sorted(other_order=True), MaskedDistillation(learning_rate=RATE)
    other.load_state_dict(teacher.state_dict())
    resumed.load_state_dict(pickle.loads(pickle.dumps(update.state_dict())))
    after_rounds(teacher, update, 2)
    after_rounds(other, resumed, 2)
    for name, value in teacher.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_state_by_position_is_continued() -> None:
    teacher, update = randomise(Sorted(), 1), MaskedDistillation(learning_rate=RATE)
    after_rounds(teacher, update, 0, 1)
    other, resumed = Sorted(), MaskedDistillation(learning_rate=RATE)
    other.load_state_dict(teacher.state_dict())
    resumed.load_state_dict(positional(update.state_dict()))
    resumed.check_teacher(other)
    after_rounds(teacher, update, 2)
    after_rounds(other, resumed, 2)
    assert not changed(other, values(teacher))


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"width": 12, "extra": True}, r"spare.weight|expected 8 parameters, received moments of 6"),
        ({"width": 13}, r"fc.weight.*\(13, 13\).*\(12, 12\)"),
    ],
)
def test_moments_of_other_parameters_are_refused_and_nothing_is_written(
    by_position: bool, other: Any, match: str
) -> None:
    teacher, update = randomise(Sorted(), 1), MaskedDistillation(learning_rate=RATE)
    after_rounds(teacher, update, 0)
    state = update.state_dict()
    resumed, unlike = MaskedDistillation(learning_rate=RATE), Sorted(**other)
    resumed.load_state_dict(positional(state) if by_position else state)
    before = values(unlike)
    with pytest.raises(CldaError, match="is of other parameters.*" + f"({match})"):
        resumed.check_teacher(unlike)
    with pytest.raises(CldaError, match="is of other parameters"):
        resumed._own.prepare(unlike, dict(unlike.named_parameters()))
    assert not changed(unlike, before)


def test_positions_of_another_order_are_refused_where_shapes_tell() -> None:
    teacher, update = randomise(Sorted(), 1), MaskedDistillation(learning_rate=RATE)
    after_rounds(teacher, update, 0)
    resumed = MaskedDistillation(learning_rate=RATE)
    resumed.load_state_dict(positional(update.state_dict()))
    with pytest.raises(CldaError, match=r"norm.weight: \(12,\), received exp_avg.* of shape \(12, 12\)"):
        resumed.check_teacher(Sorted(other_order=True))


def test_the_state_follows_parameters_that_were_replaced_by_ones_of_the_same_name() -> None:
    teacher, update = randomise(Sorted(), 1), MaskedDistillation(learning_rate=RATE)
    other, twin = randomise(Sorted(), 1), MaskedDistillation(learning_rate=RATE)
    for model, rounds in ((teacher, update), (other, twin)):
        after_rounds(model, rounds, 0, 1)
    other.fc.weight = nn.Parameter(other.fc.weight.detach().clone())
    after_rounds(teacher, update, 2)
    after_rounds(other, twin, 2)
    assert not changed(other, values(teacher))


class Factored(torch.optim.Optimizer):
    """Keeps one second moment a row, as Adafactor does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": RATE})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                row = self.state[parameter].setdefault("row", torch.zeros(len(parameter), 1))
                row += parameter.grad.pow(2).mean(dim=1, keepdim=True)
                parameter -= group["lr"] * parameter.grad / row.sqrt()


def test_moments_of_another_shape_than_their_parameter_keep_it() -> None:
    weight = nn.Parameter(torch.ones(5, 12))
    model, own = nn.ParameterDict({"w": weight}), OwnOptimizer(1.0, Factored)
    for _ in range(2):
        own.prepare(model, {"w": weight})
        own.step({"w": weight}, {"w": torch.full((5, 12), 2.0)}, 1.0)
    assert own.state_dict()["optimizer"]["state"]["w"]["row"].tolist() == [[8.0]] * 5
    np.testing.assert_allclose(float64(weight), 1 - RATE * (2 / 2 + 2 / 8**0.5), rtol=1e-6)


class Remembering(torch.optim.SGD):
    """Keeps a number of its own, which it saves and restores itself."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        super().step()
        self.steps += 1

    def state_dict(self) -> Any:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.steps = -1


FACTORIES: Dict[str, Any] = {
    "Adam": None,
    "Adam, amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=RATE, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
    "a schedule": lambda parameters: torch.optim.SGD(parameters, lr=RATE, weight_decay=0.1),
}


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_round_that_is_taken_back_leaves_the_optimizer_as_it_was(factory: str, rounds: int) -> None:
    """The same optimizer goes on, and moments of parameters that had none before are gone."""
    teacher, twin = randomise(Sorted(), 1), randomise(Sorted(), 1)
    update, other = (MaskedDistillation(learning_rate=RATE, optimizer=FACTORIES[factory]) for _ in range(2))
    for model, rounds_of in ((teacher, update), (twin, other)):
        for number in range(rounds):
            rounds_of.apply(round_context(model, student(), ["fc"], inputs=inputs(number)))
    before, state, built = values(teacher), copy.deepcopy(update.state_dict()), update._own._optimizer
    kept = copy.deepcopy(state)
    update.apply(round_context(teacher, student(), inputs=inputs(8), strength=0.5))
    teacher.load_state_dict(before)
    update.load_state_dict(state)
    assert bits(update.state_dict()) == bits(state)
    assert rounds == 0 or update._own._optimizer is built, "nothing is built anew"
    after_rounds(teacher, update, 9)
    after_rounds(twin, other, 9)
    assert bits(update.state_dict()) == bits(other.state_dict())
    assert not changed(teacher, values(twin))
    assert bits(state) == bits(kept), "the state that is given is not written"


@pytest.mark.parametrize("factory", [*FACTORIES, "another's"])
@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("known", [["fc"], None])
def test_what_is_kept_for_a_round_takes_the_optimizer_back(factory: str, rounds: int, known: Any) -> None:
    """As often as it is called; of one that is not torch's own all is kept."""
    teacher, optimizer = randomise(Sorted(), 1), FACTORIES.get(factory)
    if factory == "another's":
        optimizer = lambda parameters: Anothers(parameters, lr=RATE, momentum=0.9)  # noqa: E731
    update = MaskedDistillation(learning_rate=RATE, optimizer=optimizer)
    for number in range(rounds):
        update.apply(round_context(teacher, student(), known, inputs=inputs(number)))
    before, state = values(teacher), copy.deepcopy(update.state_dict())
    context = round_context(teacher, student(), inputs=inputs(8), strength=0.5)
    take_back = update.keep(context)
    for _ in range(2):
        update.apply(context)
        take_back()
        assert bits(update.state_dict()) == bits(state)
        teacher.load_state_dict(before)


class Anothers(torch.optim.SGD):
    pass


def test_moments_that_a_round_laid_out_anew_are_taken_back() -> None:
    teacher, update = channels_last(), MaskedDistillation(learning_rate=RATE)
    after_rounds(teacher, update, 0)
    state = copy.deepcopy(update.state_dict())
    take_back = update.keep(round_context(teacher, student()))
    for parameter in teacher.parameters():
        parameter.data = parameter.data.contiguous()
    after_rounds(teacher, update, 1)
    take_back()
    assert bits(update.state_dict()) == bits(state)


def test_an_optimizer_that_restores_itself_is_asked_to() -> None:
    teacher = randomise(Sorted(), 1)
    update = MaskedDistillation(optimizer=lambda parameters: Remembering(parameters, lr=RATE, momentum=0.9))
    after_rounds(teacher, update, 0)
    update.load_state_dict(copy.deepcopy(update.state_dict()))
    update._own.prepare(teacher, dict(teacher.named_parameters()))
    assert update._own._optimizer.steps == -1


def test_an_update_can_be_copied_and_goes_on() -> None:
    teacher, update = randomise(Sorted(), 1), MaskedDistillation(learning_rate=RATE)
    after_rounds(teacher, update, 0)
    other, twin = copy.deepcopy((teacher, update))
    after_rounds(teacher, update, 1)
    after_rounds(other, twin, 1)
    assert not changed(other, values(teacher))
