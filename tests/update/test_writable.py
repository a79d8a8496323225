"""What rounds may write: what the host trains, in float32 at least, in memory of its own."""

from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CldaError, CollaborativeLearner, Schedule, init_student
from clda_core._host.compat import has_complex_adam
from clda_core.lead import FixedTrust
from clda_core.saliency import Fisher, Hessian, Magnitude, Taylor
from clda_core.schedule import Never
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation, agreement
from tests.helpers import bits, loaded, saved, sgd

UPDATES: Dict[str, Any] = {
    "masked": lambda: MaskedDistillation(learning_rate=1e-2),
    "guarded": lambda: Guard(MaskedDistillation(learning_rate=1e-2), criterion=agreement, tolerance=1e9),
    "average": lambda: Average(decay=0.5, buffers="average"),
    "aligned": lambda: AlignedAverage(decay=0.5, buffers="average"),
}


class Block(nn.Module):
    """A low-rank adapter beside a linear layer, and a norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.base, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.base(x) + self.up(self.down(x))).relu()


def network(seed: int, depth: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), *[Block() for _ in range(depth)], nn.Linear(8, 3))
    return model


def adapted(seed: int = 1) -> nn.Module:
    """Return a network of which the adapters and the head alone are trained."""
    model = network(seed).requires_grad_(False)
    for module in model[1:4]:
        module.down.requires_grad_(True)
        module.up.requires_grad_(True)
    model[4].requires_grad_(True)
    return model


def batch(seed: int = 0) -> Tensor:
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(seed))


def make(teacher: nn.Module, student: nn.Module, **options: Any) -> CollaborativeLearner:
    defaults = {"schedule": Schedule(warmup=0, interval=1), "selection": AllLayers(), "trust": FixedTrust()}
    return CollaborativeLearner(teacher, student, **{**defaults, **options})


def step(learner: CollaborativeLearner, optimizer: Any, seed: int = 0, co_trained: bool = False) -> None:
    x = batch(seed)
    optimizer.zero_grad()
    learner.teacher.zero_grad()
    loss = learner.distill(learner.student(x), x)
    if co_trained:
        loss = loss + F.cross_entropy(learner.teacher(x), torch.arange(64) % 3)
    loss.backward()
    learner.step(optimizer)


def changed(model: nn.Module, before: Dict[str, Any]) -> List[str]:
    return [name for name, value in model.state_dict().items() if bits(value) != before[name]]


def now(model: nn.Module) -> Dict[str, Any]:
    return {name: bits(value) for name, value in model.state_dict().items()}


# --------------------------------------------------------------------------------------------- what the host froze


@pytest.mark.parametrize("co_trained", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_of_a_partly_frozen_teacher_what_is_trainable_is_written_alone(update: str, co_trained: bool) -> None:
    teacher, student = adapted(), network(2)
    teacher.eval()  # so that the host's own passes move no statistics
    learner, optimizer, before = make(teacher, student, update=UPDATES[update]()), sgd(student), now(teacher)
    for seed in range(3):
        step(learner, optimizer, seed, co_trained)
    trainable = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    written = changed(teacher, before)
    assert written
    assert set(written) <= set(trainable)
    assert "1.up.weight" in written


def test_rates_are_fractions_of_what_is_trainable() -> None:
    teacher, student = adapted(), network(2)
    learner = make(teacher, student)
    numel = {layer.name: layer.numel for layer in learner._writable.layers}
    assert numel == {"1": 2 * 16, "2": 2 * 16, "3": 2 * 16, "4": 27}
    step(learner, sgd(student))
    assert list(learner.report().rounds[0].rates) == ["1", "2", "3", "4"]
    assert learner.report().layers == ("1", "2", "3", "4")


def test_layers_are_related_as_those_of_the_whole_teacher_are() -> None:
    teacher, student = network(1, depth=4), network(2, depth=2)
    teacher[1].requires_grad_(False)
    teacher[2].requires_grad_(False)
    assert [layer.name for layer in make(teacher, student)._rounds.related.pairs.values()] == [
        layer.name for layer in make(network(1, depth=4), network(2, depth=2))._rounds.related.pairs.values()
    ]


@pytest.mark.parametrize("update", UPDATES)
def test_a_wholly_frozen_teacher_is_written_whole(update: str) -> None:
    teacher, student = network(1).requires_grad_(False), network(2)
    learner, before = make(teacher, student, update=UPDATES[update](), saliency=Magnitude()), now(teacher)
    step(learner, sgd(student))
    assert {"0.weight", "1.base.weight", "1.up.weight", "4.bias"} <= set(changed(teacher, before))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("update", UPDATES)
def test_what_is_frozen_after_the_learner_was_built_is_left_out(update: str) -> None:
    teacher, student = network(1), network(2)
    learner, optimizer = make(teacher, student, update=UPDATES[update]()), sgd(student)
    step(learner, optimizer)
    teacher[0].requires_grad_(False)
    for block in teacher[1:4]:
        block.base.requires_grad_(False)
        block.norm.requires_grad_(False)
    before = now(teacher)
    step(learner, optimizer, 1)
    assert changed(teacher, before)
    assert not [name for name in changed(teacher, before) if "base" in name or "norm" in name or name[0] == "0"]
    assert "0" not in learner.report().rounds[1].selected


@pytest.mark.parametrize("update", UPDATES)
def test_a_partly_frozen_teacher_that_is_frozen_whole_for_a_while_stays_restricted(update: str) -> None:
    teacher, student = adapted(), network(2)
    learner, before = make(teacher, student, update=UPDATES[update]()), now(teacher)
    teacher.requires_grad_(False)  # as adversarial hosts do while they train the other network
    step(learner, sgd(student))
    assert changed(teacher, before)
    assert not [name for name in changed(teacher, before) if "base" in name or "norm" in name or name[0] == "0"]


def test_statistics_of_a_frozen_norm_stay_and_those_of_one_without_weights_are_averaged() -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        found = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False))
        found[1].running_mean.normal_()
        found[3].running_mean.normal_()
        return found

    with torch.random.fork_rng(devices=[]):
        teacher, student = model(1), model(2)
    teacher[1].requires_grad_(False)
    learner = make(teacher, student, layers=[r"[01]", r"[23]"], update=Average(decay=0.5, buffers="average"))
    buffers = {layer.name: layer.buffers for layer in learner._writable.layers}
    assert not any(name.startswith("1.") for names in buffers.values() for name in names)


def test_layers_that_leave_out_all_that_is_trained_are_refused() -> None:
    with pytest.raises(CldaError, match="may write nothing of the teacher.*Fix: freeze the whole teacher"):
        make(adapted(), network(2), layers=[r"0"])
    make(adapted(), network(2), layers=[r"0"], schedule=Never())


class Spare(nn.Module):
    """A block with a branch that the loss reaches in the first step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.branch, self.reached = nn.Linear(8, 8), nn.Linear(8, 8), True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x).tanh() + (self.branch(x).tanh() if self.reached or not self.training else 0)


def with_spare_branches(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), Spare(), Spare(), nn.Linear(8, 3))


@pytest.mark.parametrize("update", ["masked", "average", "guarded", "aligned"])
def test_parameters_without_an_observed_gradient_are_not_written_with_their_layer(update: str) -> None:
    """In training the host's loss does not reach the branch, in rounds (eval mode) the update's does."""
    teacher, student = with_spare_branches(1), with_spare_branches(2)
    teacher[1].reached = False
    learner, before = make(teacher, student, update=UPDATES[update]()), now(teacher)
    step(learner, sgd(student), co_trained=True)
    written = changed(teacher, before)
    assert {"1.body.weight", "2.branch.weight"} <= set(written)
    assert not [name for name in written if name.startswith("1.branch")]


def test_what_is_known_is_of_the_round_and_survives_a_checkpoint() -> None:
    def half_of_a_round() -> Any:
        teacher, student = with_spare_branches(1), with_spare_branches(2)
        schedule = Schedule(warmup=0, interval=2, observations=2, observe_every=1)
        return make(teacher, student, schedule=schedule, update=UPDATES["masked"]()), sgd(student)

    learner, optimizer = half_of_a_round()
    step(learner, optimizer, 0, co_trained=True)  # sees the branch
    state = loaded(saved([part.state_dict() for part in (learner, learner.teacher, learner.student, optimizer)]))
    resumed, other = half_of_a_round()
    for part, its in zip((resumed, resumed.teacher, resumed.student, other), state):
        part.load_state_dict(its)
    for each, its_optimizer in ((learner, optimizer), (resumed, other)):
        each.teacher[1].reached = False
        before = now(each.teacher)
        step(each, its_optimizer, 1, co_trained=True)
        assert "1.branch.weight" in changed(each.teacher, before)
        step(each, its_optimizer, 2, co_trained=True)
        before = now(each.teacher)
        step(each, its_optimizer, 3, co_trained=True)
        written = changed(each.teacher, before)
        assert "1.body.weight" in written
        assert "1.branch.weight" not in written
    assert bits(resumed.teacher.state_dict()) == bits(learner.teacher.state_dict())


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_teacher_is_refused_when_the_learner_is_built(dtype: torch.dtype) -> None:
    name = str(dtype).rpartition(".")[2]
    for teacher in (network(1).to(dtype), network(1).requires_grad_(False).to(dtype)):
        with pytest.raises(CldaError, match=rf"kept in {name}.*received 0.weight: {name}. Fix: call teacher.float\(\)"):
            make(teacher, network(2))
        make(teacher, network(2), schedule=Never())
        make(teacher, network(2), enabled=False)


def test_a_teacher_that_is_cast_afterwards_is_refused_in_the_first_step() -> None:
    teacher, student = network(1), network(2)
    learner = make(teacher, student, schedule=Schedule(warmup=100))
    teacher.to(torch.bfloat16)
    x = batch()
    learner.distill(student(x), teacher_output=teacher.float()(x)).backward()
    teacher.to(torch.bfloat16)
    with pytest.raises(CldaError, match="kept in bfloat16"):
        learner.step(sgd(student))


def test_frozen_parts_in_half_precision_are_welcome() -> None:
    teacher, student = adapted(), network(2)
    for block in teacher[1:4]:
        block.base.to(torch.float64)  # stands for any other dtype: its results are cast
        block.base.register_forward_hook(lambda module, args, output: output.float())
        block.base.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    half = nn.Module()
    half.weight = nn.Parameter(torch.zeros(2, dtype=torch.float16), requires_grad=False)
    teacher.add_module("table", half)
    teacher.forward = lambda x: nn.Sequential(*list(teacher.children())[:5])(x)
    step(make(teacher, student), sgd(student))


# ----------------------------------------------------------------------------------------------------------- memory


class Tied(nn.Module):
    def __init__(self, tie: Any) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        tie(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).tanh()))


def by_data(model: Any) -> None:
    model.b.weight = nn.Parameter(model.a.weight.data)


def by_view(model: Any) -> None:
    model.b.weight = nn.Parameter(model.a.weight.data.t())


def by_slice(model: Any) -> None:
    model.b.bias = nn.Parameter(model.a.weight.data[1])


def by_expansion(model: Any) -> None:
    model.b.weight = nn.Parameter(torch.randn(1, 5).expand(5, 5))


@pytest.mark.parametrize("tie", [by_data, by_view, by_slice, by_expansion])
def test_parameters_of_the_teacher_that_share_memory_are_refused(tie: Any) -> None:
    with pytest.raises(CldaError, match=r"share memory.*overlaps.*Fix: tie weights by assigning the Parameter"):
        make(Tied(tie), nn.Linear(5, 3))
    make(Tied(tie), nn.Linear(5, 3), schedule=Never())


def test_a_tied_parameter_is_written_once() -> None:
    def tie(model: Any) -> None:
        model.b.weight = model.a.weight

    teacher, student = Tied(tie), Tied(tie)
    before, target = teacher.a.weight.detach().double(), student.a.weight.detach().double()
    learner = make(teacher, student, update=Average(decay=0.5), saliency=Magnitude())
    step(learner, sgd(student, lr=0.0))
    assert torch.allclose(teacher.a.weight.detach().double(), (before + target) / 2, atol=1e-6)


def test_columns_of_one_matrix_are_no_shared_memory() -> None:
    def columns(model: Any) -> None:
        whole = torch.randn(5, 10, generator=torch.Generator().manual_seed(4))
        model.a.weight, model.b.weight = nn.Parameter(whole[:, :5]), nn.Parameter(whole[:, 5:])

    teacher, student = Tied(columns), nn.Linear(5, 3)
    before = now(teacher)
    step(make(teacher, student, update=MaskedDistillation()), sgd(student))
    assert {"a.weight", "b.weight"} <= set(changed(teacher, before))


@pytest.mark.parametrize("part", [slice(0, 8), slice(2, 6)])
def test_a_student_sliced_out_of_the_teacher_is_refused(part: slice) -> None:
    teacher, student = network(1), network(2)
    student[0].weight = nn.Parameter(teacher[0].weight.data[part])
    with pytest.raises(CldaError, match=r"teacher and student share parameters.*shared: \['0.weight'\]"):
        make(teacher, student)
    with pytest.raises(CldaError, match="teacher and student share parameters"):
        init_student(student, teacher)


class OnBackbone(nn.Module):
    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_a_backbone_that_both_have_frozen_may_be_shared_and_is_not_written() -> None:
    backbone = nn.Linear(5, 8).requires_grad_(False)
    teacher, student, before = OnBackbone(backbone, 8), OnBackbone(backbone, 4), now(backbone)
    learner = make(teacher, student)
    assert [layer.name for layer in learner._writable.layers] == ["head.0", "head.2"]
    step(learner, sgd(student))
    assert not changed(backbone, before)
    frozen = OnBackbone(backbone, 8).requires_grad_(False)
    with pytest.raises(CldaError, match="share parameters.*or layers= that leave it out"):
        make(frozen, student)  # would be written whole
    make(frozen, student, layers=lambda name: None if name.startswith("backbone") else "head")
    make(frozen, student, schedule=Never())
    backbone.requires_grad_(True)
    with pytest.raises(CldaError, match="share parameters"):
        make(teacher, student, schedule=Never())


# ----------------------------------------------------------------------------------------------- complex and sparse


class Fourier(nn.Module):
    """A filter in the frequency domain, as in Fourier neural operators."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.ifft(torch.fft.fft(self.stem(x)) * self.filter).real)


def test_complex_parameters_are_updated_as_two_real_ones_or_refused() -> None:
    teacher, student = Fourier(), nn.Linear(5, 3)
    if not has_complex_adam():
        with pytest.raises(CldaError, match=r"complex parameters.*\['filter'\]"):
            make(teacher, student)
        return
    with pytest.raises(CldaError, match=r"complex parameters.*\['filter'\], Hessian"):
        make(teacher, student, saliency=Hessian())
    for saliency in (Taylor(), Fisher(), Magnitude()):
        before = teacher.filter.detach().clone()
        learner = make(teacher, student, saliency=saliency, update=MaskedDistillation(learning_rate=1e-2))
        step(learner, sgd(student))
        moved = torch.view_as_real(teacher.filter.detach() - before).abs()
        # Adam's first step moves every element by the rate; the zeroth frequency of a real signal is real.
        assert torch.allclose(moved[1:4], torch.full((3, 2), 1e-2), rtol=1e-2)


@pytest.mark.parametrize("estimator", [Taylor, Fisher])
def test_scores_of_complex_parameters_are_of_the_modulus(estimator: Any) -> None:
    found = estimator().score(torch.tensor([3 + 4j, 1j]), torch.tensor([2j, -1 + 0j]))
    expected = torch.tensor([10.0, 1.0])
    assert torch.allclose(found, expected if estimator is Taylor else expected**2 / 2)


class Words(nn.Module):
    def __init__(self, width: int, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, width, sparse=sparse), nn.Linear(width, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).mean(1))


@pytest.mark.parametrize("co_trained", [False, True])
@pytest.mark.parametrize("saliency", [Taylor(), Fisher(), Hessian()], ids=repr)
def test_sparse_gradients_are_observed_and_updated_as_dense_ones(saliency: Any, co_trained: bool) -> None:
    outcomes = []
    for sparse in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher, student = Words(8, sparse), Words(4, False)
        update = MaskedDistillation(learning_rate=1e-2)
        learner = make(teacher, student, saliency=saliency, update=update)
        words = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(3))
        loss = learner.distill(student(words), words)
        if co_trained:
            loss = loss + F.cross_entropy(teacher(words), torch.arange(6) % 3)
        loss.backward()
        learner.step(sgd(student))
        outcomes.append((learner.report().rounds[0].rates, teacher.state_dict()))
    (rates, values), (expected_rates, expected) = outcomes
    assert rates == pytest.approx(expected_rates, abs=1e-6)
    for name, value in expected.items():
        assert torch.allclose(values[name], value, rtol=0, atol=1e-6), name
