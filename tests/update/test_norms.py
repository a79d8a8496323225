"""Buffers: the running statistics of norms are averaged, and nothing else that a model keeps there."""

from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from clda_core import init_student
from clda_core.update import AlignedAverage, Average, Guard
from clda_core.update.norms import frozen_norms, running_statistics
from tests.update.rounds import changed, randomise, round_context, values

WIDTH = 6


class FrozenNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: four buffers, constants."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((WIDTH,), value))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * (self.running_var + 1e-5).rsqrt() * self.weight + self.bias


class OwnNorm(nn.Module):
    """A norm that is none of PyTorch's, as InPlaceABN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * (self.running_var + 1e-5).rsqrt() * self.weight + self.bias


class Keeper(nn.Linear):
    """A layer that keeps in buffers what people keep there."""

    def __init__(self, scale: float) -> None:
        super().__init__(WIDTH, WIDTH)
        causal = torch.full((WIDTH, WIDTH), float("-inf")).triu(1)
        for name, value in {
            "mask": torch.ones(WIDTH),
            "causal": causal,
            "min_val": torch.tensor(float("inf")),
            "max_val": torch.tensor(float("-inf")),
            "scale": torch.tensor(scale),
            "calls": torch.tensor(scale),
            "queue": scale * torch.ones(3, WIDTH),
            "positions": torch.arange(float(WIDTH)) * scale,
            "running_mean_of_something": scale * torch.ones(WIDTH),
        }.items():
            self.register_buffer(name, value)


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.keeper, self.norm, self.own, self.frozen = Keeper(scale), nn.BatchNorm1d(WIDTH), OwnNorm(), FrozenNorm()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frozen(self.own(self.norm(self.keeper(x)))).relu()


def net(scale: float, seed: int) -> nn.Module:
    built = nn.Sequential(nn.Linear(5, WIDTH), nn.Sequential(Block(scale), Block(scale)), nn.Linear(WIDTH, 3))
    kept = {name: buffer.clone() for name, buffer in built.named_buffers() if ".keeper." in name}
    randomise(built, seed)
    for name, buffer in built.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])
    return built


def inputs() -> Tensor:
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


STATISTICS = [
    f"1.{block}.{norm}.running_{what}" for block in "01" for norm in ("norm", "own") for what in ("mean", "var")
]


@pytest.mark.parametrize(
    "update",
    [
        Average(decay=0.75, buffers="average"),
        Guard(Average(decay=0.75, buffers="average"), criterion=lambda teacher, original, student: torch.zeros(())),
        AlignedAverage(decay=0.75, buffers="average"),
    ],
    ids=["Average", "guarded", "AlignedAverage"],
)
def test_of_all_buffers_only_running_statistics_are_averaged(update: Any) -> None:
    teacher, student = net(1.0, 1), net(3.0, 2)
    before, names = values(teacher), [name for name, _ in teacher.named_buffers()]
    result = update.apply(round_context(teacher, student, inputs=inputs()))
    assert sorted(set(changed(teacher, before)).intersection(names)) == sorted(STATISTICS)
    assert result.skipped["1.0: keeper.mask"] == "it is no running statistic of a norm"
    assert result.skipped["1.1: frozen.running_mean"] == "it is no running statistic of a norm"
    if isinstance(update, Average):
        for name in STATISTICS:
            expected = 0.75 * before[name] + 0.25 * values(student)[name]
            assert torch.allclose(values(teacher)[name], expected, atol=1e-6)


@pytest.mark.parametrize("update", [Average(decay=0.5), AlignedAverage(decay=0.5)], ids=repr)
def test_kept_buffers_are_not_even_reported(update: Any) -> None:
    teacher, student = net(1.0, 1), net(3.0, 2)
    before, names = values(teacher), [name for name, _ in teacher.named_buffers()]
    result = update.apply(round_context(teacher, student, inputs=inputs()))
    assert not set(changed(teacher, before)).intersection(names)
    assert "it is no running statistic of a norm" not in result.skipped.values()


def test_init_student_copies_what_norms_keep_and_no_other_buffer() -> None:
    teacher, student = net(1.0, 1), net(3.0, 2)
    before, of_teacher = values(student), values(teacher)
    result = init_student(student, teacher)
    buffers: Dict[str, Tensor] = dict(student.named_buffers())
    norms = [name for name in buffers if ".keeper." not in name and "num_batches" not in name]
    assert all(torch.equal(buffers[name], of_teacher[name]) for name in norms)
    assert not set(changed(student, before)).intersection(set(buffers).difference(norms))
    assert result.skipped["1.0: keeper.queue"] == "it is no running statistic of a norm"
    assert not any("norm." in key or "frozen." in key for key in result.skipped)


@pytest.mark.parametrize("kind", [Average, AlignedAverage])
def test_a_pruned_teacher_stays_pruned(kind: Any) -> None:
    def pruned(seed: int, method: Any) -> nn.Module:
        built = randomise(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), seed)
        method(built[0], "weight", 0.5)
        return built

    teacher = pruned(1, prune.l1_unstructured)
    mask = teacher[0].weight_mask.clone()
    before = values(teacher)
    context = round_context(teacher, pruned(2, prune.random_unstructured), inputs=torch.randn(64, 8))
    kind(decay=0.5, buffers="average").apply(context)
    assert torch.equal(teacher[0].weight_mask, mask)
    assert {"0.weight_orig", "1.running_mean"} <= set(changed(teacher, before))
    teacher(torch.randn(2, 8))
    assert torch.equal(teacher[0].weight == 0, mask == 0)


def test_the_names_of_statistics_are_canonical() -> None:
    model = nn.ModuleDict({"module": nn.Sequential(nn.BatchNorm2d(2), nn.InstanceNorm2d(2), FrozenNorm())})
    assert running_statistics(model) == {"0.running_mean", "0.running_var"}
    assert frozen_norms(model) == {"2.running_mean", "2.running_var", "2.weight", "2.bias"}
    assert running_statistics(nn.BatchNorm1d(2)) == {"running_mean", "running_var"}
    assert not running_statistics(nn.BatchNorm1d(2, track_running_stats=False))


@pytest.mark.parametrize(
    "names", [["running_mean"], ["running_var"], ["weight", "bias"], ["running_mean", "weight"]], ids=str
)
def test_what_has_not_both_statistics_is_no_norm(names: List[str]) -> None:
    module = nn.Module()
    for name in names:
        module.register_buffer(name, torch.ones(WIDTH))
    assert not running_statistics(module)
    assert not frozen_norms(module)


def test_a_frozen_norm_may_lack_a_bias() -> None:
    norm = FrozenNorm()
    del norm.bias
    assert frozen_norms(nn.Sequential(norm)) == {"0.running_mean", "0.running_var", "0.weight"}
    assert not running_statistics(norm)
