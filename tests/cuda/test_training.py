"""A training on the device: rounds, optimizers, mixed precision, compiled models, memory formats, processes."""

import math
import types
from typing import Any, Callable, Dict, List

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clda_core import CollaborativeLearner, Schedule, group_layers
from clda_core._host import ranks
from clda_core.distillation import KLDistillation
from clda_core.lead import LinearTrust
from clda_core.relation import BySimilarity
from clda_core.saliency import QuantileThreshold, ReferenceThreshold
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation
from clda_core.validation import MutualInformation
from tests.cuda.hosts import PAIRS, both, images, iteration, learner_of, segmenters, supervised
from tests.helpers import bits, make_learner, networks, sgd, values
from tests.strategies import cases
from tests.test_contracts import needs_source, options_for
from tests.validation.validators import CASES as VALIDATORS

UPDATES: Dict[str, Callable[[], Any]] = {
    "the default": MaskedDistillation,
    "average": lambda: Average(decay=0.9, buffers="average"),
    "aligned": lambda: AlignedAverage(decay=0.9, buffers="average"),
    "guarded": lambda: Guard(MaskedDistillation(learning_rate=1e-3, steps=2)),
    "on the view": lambda: MaskedDistillation(learns_on="view", own_targets=True, source_weight=1.0),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("view", [False, True])
def test_the_defaults_train(device: torch.device, name: str, view: bool) -> None:
    """All defaults but the interval and what lets the student be trusted."""
    teacher, student = PAIRS[name](device)
    learner = CollaborativeLearner(
        teacher, student, extract=both, schedule=Schedule(interval=2), trust=LinearTrust(zero=-9.0, full=-8.0)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for step in range(8):
        before = values(teacher)
        x = images(device, step)
        options = {"view": x + 0.1 * torch.randn_like(x)} if view else {}
        optimizer.zero_grad()
        loss = supervised(student, images(device, 100 + step)) + learner.distill(student(x), x, **options)
        loss.backward()
        made = len(learner.report().rounds)
        learner.step(optimizer)
        losses.append(loss.item())
        changed = {name for name, value in values(teacher).items() if value != before[name]}
        rounds = learner.report().rounds
        selected = rounds[-1].selected if len(rounds) > made else ()
        layers = [layer for layer in group_layers(teacher) if layer.name in selected]
        assert changed <= {one for layer in layers for one in layer.parameters}
        assert bool(changed) == (len(rounds) > made)
    assert all(map(math.isfinite, losses))
    report = learner.report()
    assert len(report.rounds) == 4
    assert all(record.updated and record.trust == 1 and math.isfinite(record.lead) for record in report.rounds)
    assert all(0 <= rate <= 1 for record in report.rounds for rate in record.rates.values())
    assert all(map(math.isfinite, learner.metrics().values()))
    assert "round" in str(report)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("update", UPDATES)
def test_updates_train(device: torch.device, name: str, update: str) -> None:
    pair = PAIRS[name](device, alike=update == "average")
    learner = learner_of(pair, update=UPDATES[update](), selection=AllLayers(), relation=BySimilarity(minimum=0.0))
    optimizer = torch.optim.AdamW(pair[1].parameters(), lr=1e-3)
    before = values(pair[0])
    x = images(device, 50)
    for step in range(3):
        view = images(device, step) + 0.1 * torch.randn_like(x)
        iteration(learner, optimizer, step, device, view=view, source_loss=lambda network: supervised(network, x))
    assert values(pair[0]) != before or update == "guarded"
    rounds = learner.report().rounds
    assert len(rounds) == 3
    assert all(record.updated or record.accepted is False for record in rounds)


# ----------------------------------------------------------------------------------- what the CPU does, it does too


def report_of(device: torch.device, options: Callable[[], Dict[str, Any]], view: bool = False) -> Any:
    """Train in float64 without a draw, and return the rounds and the teacher's parameters."""
    teacher, student = networks()
    for network in (teacher, student):
        network.double().to(device)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    learner = make_learner(teacher, student, **{"selection": AllLayers(), **options()})
    optimizer = sgd(student)
    for step in range(2):
        x, y, source = (inputs(device, seed) for seed in (step, 10 + step, 20 + step))
        optimizer.zero_grad()
        more = {"view": x + 0.1 * y} if view else {}
        loss = student(source).log_softmax(1)[:, 0].mean() + learner.distill(student(x), x, **more)
        loss.backward()
        if needs_source(learner):
            learner.observe(lambda network, at=source: network(at).log_softmax(1)[:, 1].mean(), domain="source")
        learner.step(optimizer)
    found = {name: value.detach().cpu() for name, value in teacher.state_dict().items()}
    return learner.report().rounds, found, learner._kd_loss


def inputs(device: torch.device, seed: int) -> Tensor:
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(seed)).double().to(device)


def same_as_on_the_cpu(device: torch.device, options: Callable[[], Dict[str, Any]], view: bool = False) -> None:
    rounds, teacher, loss = report_of(device, options, view)
    expected_rounds, expected, expected_loss = report_of(torch.device("cpu"), options, view)
    assert loss.device.type == device.type
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-7)
    assert len(rounds) == len(expected_rounds)
    for mine, its in zip(rounds, expected_rounds):
        assert (mine.selected, mine.updated, mine.skipped) == (its.selected, its.updated, its.skipped)
        assert mine.rates == pytest.approx(its.rates, abs=0.05)  # an element at the edge of a bin may fall either way
        assert mine.trust == pytest.approx(its.trust, abs=1e-6)
        for one in ("lead", "score_before", "score_after"):
            value, other = getattr(mine, one), getattr(its, one)
            assert (value is None) == (other is None)
            assert value is None or value == pytest.approx(other, rel=1e-6, abs=1e-8)
        assert mine.accepted == its.accepted
    for name, value in expected.items():
        assert torch.allclose(teacher[name].double(), value.double(), rtol=1e-6, atol=1e-7), name


ROLES = ("saliency", "threshold", "selection", "relation", "trust", "update", "distillation", "probe", "criterion")
STRATEGIES = list(cases(*ROLES))


@pytest.mark.parametrize(("name", "role", "make"), STRATEGIES, ids=[name for name, _, _ in STRATEGIES])
def test_every_strategy_does_what_it_does_on_the_cpu(
    device: torch.device, deterministic: None, name: str, role: str, make: Callable[[], Any]
) -> None:
    """In deterministic mode, which refuses what a GPU adds up in any order."""
    same_as_on_the_cpu(device, lambda: options_for(role, make()))


@pytest.mark.parametrize("name", VALIDATORS)
def test_every_validator_does_what_it_does_on_the_cpu(device: torch.device, deterministic: None, name: str) -> None:
    def options() -> Dict[str, Any]:
        return {"validator": VALIDATORS[name].make(), "trust": LinearTrust(zero=-2.0, full=2.0)}

    same_as_on_the_cpu(device, options, view=True)


# ------------------------------------------------------------------------------------- optimizers and half precision

OPTIMIZERS: Dict[str, Callable[[Any], Any]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "capturable": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, capturable=True),
    "tensor rate": lambda parameters: torch.optim.AdamW(
        parameters, lr=torch.tensor(1e-3, device=parameters[0].device), capturable=True
    ),
}


def optimizer_of(kind: str, student: nn.Module, device: torch.device) -> Any:
    if device.type == "cpu" and kind in ("capturable", "tensor rate"):
        pytest.skip("needs a CUDA GPU")
    return OPTIMIZERS[kind](list(student.parameters()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_host_optimizers(device: torch.device, kind: str) -> None:
    teacher, student = segmenters(device)
    optimizer = optimizer_of(kind, student, device)
    learner = learner_of((teacher, student), selection=AllLayers())
    before = values(student), values(teacher)
    for step in range(3):
        iteration(learner, optimizer, step, device)
    assert learner.report().made == 3
    assert values(student) != before[0]
    assert values(teacher) != before[1]
    assert learner._rounds.peak == pytest.approx(0.0 if kind == "sgd" else 1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("update", ["adam", "feature loss"])
def test_a_skipped_step_is_no_step(device: torch.device, kind: str, update: str) -> None:
    """float16 with a GradScaler; the second step overflows."""
    from clda_core.distillation import FeatureDistillation

    teacher, student = segmenters(device)
    optimizer = optimizer_of(kind, student, device)
    options = {"distillation": FeatureDistillation()} if update == "feature loss" else {}
    learner = learner_of((teacher, student), selection=AllLayers(), **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    iteration(learner, optimizer, 0, device, scaler=scaler, autocast=half)
    assert (learner._steps, learner.report().made) == (1, 1)
    state, of_teacher, of_student = bits(learner.state_dict()), values(teacher), bits(dict(student.named_parameters()))

    x = images(device)
    optimizer.zero_grad()
    loss = learner.distill(student(x), x)
    scaler.scale(loss).backward()
    next(student.parameters()).grad.fill_(math.inf)
    learner.step(optimizer, scaler=scaler)
    scaler.update()
    assert bits(learner.state_dict()) == state
    assert values(teacher) == of_teacher
    assert bits(dict(student.named_parameters())) == of_student
    assert scaler.get_scale() == 512

    iteration(learner, optimizer, 2, device, scaler=scaler, autocast=half)
    assert (learner._steps, learner.report().made) == (2, 2)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_autocast_to_bfloat16(device: torch.device, name: str, inside: bool) -> None:
    """The host's forward passes, or the rounds too, if it calls step() inside."""
    teacher, student = PAIRS[name](device)
    learner = learner_of((teacher, student), selection=AllLayers())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    if not inside:
        for step in range(3):
            assert math.isfinite(iteration(learner, optimizer, step, device, autocast=torch.bfloat16))
    else:
        for step in range(3):
            with torch.autocast(device.type, torch.bfloat16):
                assert math.isfinite(iteration(learner, optimizer, step, device))
    assert all(record.updated for record in learner.report().rounds)
    assert learner.report().made == 3
    assert {value.dtype for value in teacher.parameters()} == {torch.float32}


# --------------------------------------------------------------------------- compiled, channels last, several processes


class Counting:
    """A backend of the compiler that runs graphs as they are and counts how many it was given."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.compiled += 1

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["counted", "inductor"])
def test_rounds_compile_nothing_anew(device: torch.device, kind: str) -> None:
    if device.type == "cpu" and kind == "inductor":
        pytest.skip("needs a CUDA GPU")
    torch._dynamo.reset()
    teacher, student = segmenters(device, dropout=0.0)
    of_teacher, of_student = Counting(), Counting()
    if kind == "counted":
        big, small = torch.compile(teacher, backend=of_teacher), torch.compile(student, backend=of_student)
    else:
        big, small = torch.compile(teacher), torch.compile(student)
    learner = learner_of((big, small), selection=AllLayers(), schedule=Schedule(interval=3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(2):  # the first step's rehearsal calls the teacher uncompiled, so the second compiles it
        iteration(learner, optimizer, step, device)
    compiled, runs = (of_teacher.compiled, of_student.compiled), of_teacher.runs
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(2, 6):
        iteration(learner, optimizer, step, device)
    assert learner.report().made == 2
    assert all(record.updated for record in learner.report().rounds)
    assert (of_teacher.compiled, of_student.compiled) == compiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert kind == "inductor" or of_teacher.runs > runs
    torch._dynamo.reset()


@pytest.mark.parametrize("update", ["the default", "average", "aligned"])
def test_channels_last_changes_nothing(device: torch.device, update: str) -> None:
    def run(memory: torch.memory_format) -> Any:
        pair = segmenters(device, dropout=0.0, alike=update == "average")
        teacher, student = (network.double().to(memory_format=memory) for network in pair)
        learner = learner_of((teacher, student), selection=AllLayers(), update=UPDATES[update]())
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for step in range(3):
            x = images(device, step).double().to(memory_format=memory)
            optimizer.zero_grad()
            learner.distill(student(x), x).backward()
            learner.step(optimizer)
        assert all(record.updated for record in learner.report().rounds)
        return teacher

    plain, last = (run(memory) for memory in (torch.contiguous_format, torch.channels_last))
    for name, value in last.state_dict().items():
        assert torch.allclose(value.double(), plain.state_dict()[name].double(), rtol=1e-6, atol=1e-7), name
    assert last.blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_moved_to_the_device_after_rounds_goes_on(device: torch.device) -> None:
    """``Module.to`` moves the parameters of an optimizer, and not its moments."""
    from clda_core.distillation import FeatureDistillation

    teacher, student = segmenters(torch.device("cpu"))
    learner = learner_of((teacher, student), selection=AllLayers(), distillation=FeatureDistillation())
    iteration(learner, torch.optim.SGD(student.parameters(), lr=0.1), 0, torch.device("cpu"))
    for network in (teacher, student):
        network.to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before = values(teacher)
    for step in range(1, 3):
        iteration(learner, optimizer, step, device)
    assert learner.report().made == 3
    assert values(teacher) != before


@pytest.mark.parametrize("update", ["the default", "average", "aligned", "guarded"])
def test_distributed(device: torch.device, update: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """One process, told that it is one of two: every reduction is made, and fails on what is not on the device."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        teacher, student = segmenters(device, alike=update == "average")
        host = DistributedDataParallel(student, device_ids=[0] if device.type == "cuda" else None)
        reduced: List[str] = []

        def all_reduce(tensor: Tensor) -> None:
            reduced.append(tensor.device.type)
            dist.all_reduce(tensor)

        fake = types.SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce
        )
        for two in (False, True):
            if two:
                monkeypatch.setattr(ranks, "dist", fake)
            compared = {"threshold": ReferenceThreshold(of=QuantileThreshold())}
            learner = learner_of(
                (teacher, host),
                selection=AllLayers(),
                relation=BySimilarity(minimum=0.0),
                update=UPDATES[update](),
                distillation=KLDistillation(),
                validator=MutualInformation(),
                trust=LinearTrust(zero=-9.0, full=-8.0),
                **compared,
            )
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
            for step in range(3):
                x = images(device, step)
                optimizer.zero_grad()
                learner.distill(host(x), x).backward()
                learner.observe(lambda network, at=x: supervised(network, at), domain="source")
                learner.step(optimizer)
            assert learner.report().made == 3
            assert all(record.updated or record.accepted is False for record in learner.report().rounds)
        assert set(reduced) == {device.type}
    finally:
        dist.destroy_process_group()
