"""Teaching: a trained student updates the teacher, a round a batch, and nothing else changes."""

import copy
from typing import Any, List

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, Outputs, Schedule, group_layers, teach
from clda_core.distillation import DISTDistillation, FeatureDistillation, KLDistillation, WeightedSum
from clda_core.lead import FixedTrust, LinearTrust
from clda_core.selection import AllLayers
from clda_core.update import Guard, MaskedDistillation
from clda_core.validation import MutualInformation, SoftConsistency

UNGUARDED = MaskedDistillation  # the guard has nothing to go by where random networks agree on little


def network(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 4)
        )


def images(batches: int, seed: int = 0) -> List[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(batches)]


def states(*models: nn.Module) -> List[Any]:
    return [copy.deepcopy(model.state_dict()) for model in models]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_teacher_comes_nearer_to_the_student_and_the_student_stays() -> None:
    teacher, student = network(32, 0).train(), network(8, 1).train()
    (student_before,) = states(student)
    held_out = torch.cat(images(4, seed=1))

    def divergence() -> float:
        teacher.eval(), student.eval()
        with torch.no_grad():
            ours, theirs = teacher(held_out).log_softmax(1), student(held_out).log_softmax(1)
        teacher.train(), student.train()
        return float((theirs.exp() * (theirs - ours)).sum(1).mean())

    before, state = divergence(), torch.get_rng_state()
    report = teach(teacher, student, images(60), selection=AllLayers(), update=UNGUARDED(learning_rate=1e-2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(report.rounds) == 60
    assert divergence() < 0.5 * before
    assert equal(student.state_dict(), student_before)
    assert student.training
    assert teacher.training
    assert all(parameter.grad is None for model in (teacher, student) for parameter in model.parameters())


def test_only_selected_layers_move_and_statistics_stay() -> None:
    teacher, student = network(32, 0), network(8, 1)
    (before,) = states(teacher)
    report = teach(teacher, student, images(3), update=UNGUARDED())
    after = teacher.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    updated = {layer for record in report.rounds for layer in record.updated}
    of_updated = {name for layer in group_layers(teacher) if layer.name in updated for name in layer.parameters}
    assert moved
    assert moved == of_updated
    assert len(of_updated) < len(list(teacher.parameters()))


def test_batches_are_read_once_and_may_be_arguments() -> None:
    teacher, student = network(32, 0), network(8, 1)
    read = []

    def stream() -> Any:
        for batch in images(4):
            read.append(len(batch))
            yield (batch,)

    report = teach(teacher, student, stream(), schedule=Schedule(warmup=0, interval=2))
    assert len(read) == 4
    assert [record.step for record in report.rounds] == [2, 4]


def test_every_batch_has_a_view_of_its_own() -> None:
    noise: List[Tensor] = []

    def view(inputs: Tensor) -> Tensor:
        noise.append(torch.randn_like(inputs))
        return inputs + 0.1 * noise[-1]

    resized: List[Tensor] = []

    def student_inputs(inputs: Tensor) -> Tensor:
        resized.append(torch.rand(1))
        return inputs

    teach(network(32, 0), network(8, 1), images(3), view=view, student_inputs=student_inputs, update=UNGUARDED())
    assert len(torch.unique(torch.stack(noise), dim=0)) == 3
    assert len(torch.unique(torch.cat(resized))) == 6


def test_without_batches_it_says_so_and_changes_nothing() -> None:
    teacher, student = network(32, 0), network(8, 1)
    before = states(teacher, student)
    with pytest.raises(CldaError, match="nothing to teach on"):
        teach(teacher, student, [])
    assert all(equal(was, now) for was, now in zip(before, states(teacher, student)))


def test_an_error_in_the_middle_leaves_whole_rounds() -> None:
    teacher, student = network(32, 0), network(8, 1)
    once = copy.deepcopy(teacher)
    teach(once, student, images(1), update=UNGUARDED())
    with pytest.raises(RuntimeError):
        teach(teacher, student, [*images(1), torch.randn(16, 7)], update=UNGUARDED())
    assert equal(teacher.state_dict(), once.state_dict())


class WithFeatures(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.body = network(width, seed)

    def forward(self, inputs: Tensor) -> Outputs:
        features = self.body[:2](inputs)
        return Outputs(self.body[2:](features), (features,))


def test_a_loss_of_the_users_sees_both_networks_in_their_roles() -> None:
    loss = FeatureDistillation()
    report = teach(WithFeatures(32, 0), WithFeatures(8, 1), images(3), distillation=loss)
    assert len(report.rounds) == 3
    assert [tuple(parameter.shape) for parameter in loss.parameters()] == [(32, 8), (32,)]
    assert all(parameter.grad is None for parameter in loss.parameters())


def with_classes(network: nn.Module, order: List[int]) -> nn.Module:
    """Return a copy whose class ``i`` is the network's class ``order[i]``."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        copied[4].weight.copy_(copied[4].weight[order])
        copied[4].bias.copy_(copied[4].bias[order])
    return copied


def test_rounds_go_by_the_class_map() -> None:
    teacher, student, order = network(32, 0), network(8, 1), [2, 0, 3, 1]
    permuted = with_classes(teacher, [order.index(index) for index in range(4)])
    for each, kd in ((teacher, DISTDistillation()), (permuted, DISTDistillation(class_map=order))):
        update = Guard(MaskedDistillation(learning_rate=1e-2), criterion=with_opinion)
        teach(each, student, images(10), selection=AllLayers(), update=update, distillation=kd)
    assert not equal(teacher.state_dict(), network(32, 0).state_dict())
    for name, value in with_classes(permuted, order).state_dict().items():
        assert torch.allclose(value, teacher.state_dict()[name], atol=1e-5), name


def with_opinion(teacher: Tensor, original: Tensor, student: Tensor) -> Tensor:
    """Score what the default criterion leaves open where random networks agree on little."""
    return -(teacher.softmax(1) - student.softmax(1)).abs().mean()


def test_a_student_of_fewer_classes_teaches_these() -> None:
    teacher, student = network(32, 0).eval(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    kd = WeightedSum([(1.0, KLDistillation(class_map=[3, 1]))])

    def divergence() -> float:
        held_out = torch.cat(images(4, seed=1))
        with torch.no_grad():
            ours, theirs = teacher(held_out)[:, [3, 1]].log_softmax(1), student(held_out).log_softmax(1)
        return float((theirs.exp() * (theirs - ours)).sum(1).mean())

    before = divergence()
    teach(teacher, student, images(60), selection=AllLayers(), distillation=kd, update=UNGUARDED(learning_rate=1e-2))
    assert divergence() < 0.5 * before


def test_a_student_that_draws_in_eval_mode_leaves_the_random_state() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.01 * torch.randn_like(x))

    before = torch.get_rng_state()
    teach(network(32, 0), Noisy(network(8, 1)), images(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_student_that_takes_other_inputs_is_taught_with_its_own() -> None:
    teacher, student = nn.Linear(5, 3), nn.Linear(3, 3)
    batches = [torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    report = teach(teacher, student, batches, student_inputs=lambda batch: batch[:, :3])
    assert len(report.rounds) == 2


# ------------------------------------------------------------------------------- views, the source, and who leads


def test_the_student_is_trusted_unless_a_validator_is_asked() -> None:
    report = teach(network(32, 0), network(8, 1), images(2))
    assert [(record.trust, record.lead) for record in report.rounds] == [(1.0, None)] * 2
    report = teach(network(32, 0), network(8, 1), images(2), validator=MutualInformation())
    assert all(record.lead is not None for record in report.rounds)
    report = teach(network(32, 0), network(8, 1), images(2), trust=lambda lead: 0.25)
    assert [record.trust for record in report.rounds] == [0.25] * 2


def test_a_student_that_is_behind_teaches_nothing_where_somebody_asks() -> None:
    teacher, student = network(32, 0), network(8, 1)
    with torch.no_grad():
        student[4].weight.zero_()
        teacher[4].weight.mul_(20.0)
    before = states(teacher)
    trust = LinearTrust(zero=-0.01, full=0.01)
    report = teach(teacher, student, images(3), validator=MutualInformation(), trust=trust, update=UNGUARDED())
    assert all(record.lead < -0.01 and not record.updated for record in report.rounds)
    assert equal(teacher.state_dict(), before[0])


def test_view_and_source_loss_reach_every_round() -> None:
    teacher, student = network(32, 0), network(8, 1)
    batches, called, seen = images(3), [], []

    def view(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch + 0.25

    def source_loss(net: nn.Module) -> Tensor:
        called.append(net)
        return net(images(1, seed=9)[0]).square().mean()

    class Spy(MaskedDistillation):
        def apply(self, context: Any) -> Any:
            assert torch.equal(context.view, context.inputs + 0.25)
            assert context.source_loss is source_loss
            return super().apply(context)

    all_of_it: Any = {"learns_on": "view", "own_targets": True, "source_weight": 1.0}
    report = teach(
        teacher, student, batches, view=view, source_loss=source_loss, update=Spy(**all_of_it), trust=FixedTrust(0.0)
    )
    assert all(torch.equal(one, other) for one, other in zip(seen, batches))
    assert len(seen) == 3
    assert len(called) >= 3  # and perhaps a rehearsal
    assert all(record.updated for record in report.rounds), "the teacher goes on without the student"


def test_the_students_view_is_made_of_the_teachers() -> None:
    teacher, student = nn.Linear(5, 3), nn.Linear(3, 3)
    batches = [torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    class Spy(MaskedDistillation):
        def apply(self, context: Any) -> Any:
            assert torch.equal(context.student_view, 2 * context.inputs[:, :3])
            return super().apply(context)

    options = {"student_inputs": lambda batch: batch[:, :3], "view": lambda batch: 2 * batch}
    report = teach(teacher, student, batches, **options, validator=SoftConsistency(), update=Spy())
    assert all(record.lead is not None for record in report.rounds)


def test_what_is_given_to_learn_from_is_learnt_from_by_default() -> None:
    called, seen = [], []

    def source_loss(net: nn.Module) -> Tensor:
        called.append(net)
        return net(images(1, seed=9)[0]).square().mean()

    class Recording(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(x)
            return super().forward(x)

    teacher = Recording(*network(32, 0))
    batches = images(3)
    teach(teacher, network(8, 1), batches, view=lambda batch: batch + 0.25, source_loss=source_loss)
    assert called
    assert any(torch.equal(one, batches[2] + 0.25) for one in seen)
