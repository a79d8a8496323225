"""One contract for every strategy and loss that the package offers; a public name without a case fails."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CollaborativeLearner, Outputs, Schedule, checkpoint, group_layers
from clda_core.layers import ModelView
from clda_core.relation import RelatedLayers
from clda_core.saliency import Histogram, MeanThreshold, ReferenceThreshold
from clda_core.selection import AllLayers, DomainShift, LowestFraction
from clda_core.strategy import describe
from clda_core.update import Guard, MaskedDistillation
from tests.helpers import (
    Net,
    batch,
    bits,
    labels,
    loaded,
    make_learner,
    networks,
    no_traces,
    random_states,
    saved,
    scheduled_noise,
    seeded,
    sgd,
    train,
    train_step,
    values,
)
from tests.strategies import CASES, NOT_STRATEGIES, cases, is_function, public_names

ALL = cases()
IDS = [name for name, _, _ in ALL]
every_case = pytest.mark.parametrize(("name", "role", "make"), ALL, ids=IDS)


class Convolutional(nn.Module):
    """Returns logits on a grid, and features, for the losses that need either."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 4 * width)
        self.blocks = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, width, 1))
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        features = torch.relu(self.blocks(self.stem(x).reshape(len(x), -1, 2, 2)))
        return self.head(features), features


def both(output: Tuple[Tensor, Tensor]) -> Outputs:
    return Outputs(output[0], (output[1],))


def options_for(role: str, strategy: Any) -> Dict[str, Any]:
    """Return the learner's options under which a strategy of a role has something to do."""
    if role == "threshold":
        return {"threshold": strategy, "selection": LowestFraction(fraction=0.5)}
    if role == "criterion":
        return {"update": Guard(MaskedDistillation(learning_rate=1e-2), criterion=strategy)}
    if role == "distillation":
        return {role: strategy, "extract": plain_features}
    if role == "feature function":
        return {"distillation": ReadsFeatures(strategy), "extract": plain_features}
    return {role: strategy}


class ReadsFeatures:
    """How a plain function of features becomes a strategy."""

    reads = "features"

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, student: Any, teacher: Any, mask: Any = None) -> Tensor:
        return self.function(student, teacher, mask)


def plain_features(logits: Tensor) -> Outputs:
    """Make logits on two positions, and features on three, of logits without a grid, so that every loss works."""
    return Outputs(torch.stack([logits, 2 * logits], dim=2), (logits.unsqueeze(1).expand(-1, 2, -1),))


def learner_with(role: str, strategy: Any, **options: Any) -> Tuple[CollaborativeLearner, Any]:
    teacher, student = networks()
    learner = make_learner(teacher, student, **{"selection": AllLayers(), **options_for(role, strategy), **options})
    return learner, sgd(student)


def needs_source(learner: CollaborativeLearner) -> bool:
    return isinstance(learner.selection, DomainShift) or isinstance(learner.threshold, ReferenceThreshold)


def advance(learner: CollaborativeLearner, optimizer: Any, step: int) -> None:
    def observe_source() -> None:
        if needs_source(learner):
            learner.observe(lambda model: F.cross_entropy(model(batch(50 + step)), labels(step)), domain="source")

    train_step(learner, optimizer, step, observe_source)


def test_every_public_name_has_a_case_or_is_no_strategy() -> None:
    names = set(public_names())
    assert names - set(CASES) - set(NOT_STRATEGIES) == set(), "add a case to tests/strategies.py"
    assert set(CASES) | set(NOT_STRATEGIES) <= names, "these are not public any more"
    assert not set(CASES) & set(NOT_STRATEGIES)


class Noisy(Net):
    """Draws random numbers in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(scheduled_noise(x))


@every_case
def test_works_in_a_learner_without_a_trace(name: str, role: str, make: Any) -> None:
    """On a teacher in mixed modes, partly frozen, with a gradient, that draws: only a round's values change."""
    teacher, student = seeded(lambda: Noisy(3), 0).eval(), seeded(Noisy, 1)
    teacher.blocks[0].train()
    teacher.stem.weight.requires_grad_(False)
    teacher.head.weight.grad = torch.ones_like(teacher.head.weight)
    output = student(batch())
    with no_traces(teacher, student, values_too=True):
        learner = make_learner(teacher, student, **{"selection": AllLayers(), **options_for(role, make())})
        loss = learner.distill(output, batch())
    loss.backward()
    with no_traces(teacher, student, values_too=True):
        learner.observe(lambda model: F.cross_entropy(model(batch(1)), labels(1)), domain="source")
        learner.observe()
    of_student, buffers = values(student), bits(dict(teacher.named_buffers()))
    with no_traces(teacher, student):
        learner.after_step()
    assert values(student) == of_student, "only the host changes the student"
    assert learner.report().steps == 1
    assert len(learner.report().rounds) == learner.schedule.due(1)
    if "average" not in repr(learner.update):
        assert bits(dict(teacher.named_buffers())) == buffers
    with no_traces(teacher, student, values_too=True):
        learner.load_state_dict(loaded(saved(learner.state_dict())))
        str(learner.report())
        learner.metrics()


@every_case
def test_interrupted_and_resumed_is_uninterrupted(name: str, role: str, make: Any, tmp_path: Path) -> None:
    """Two rounds of two steps and two observations each; interrupted between the observations, and after a round."""

    def training() -> Tuple[CollaborativeLearner, Any]:
        schedule = {} if role == "schedule" else {"schedule": Schedule(warmup=0, interval=2, observations=2)}
        return learner_with(role, make(), **schedule)

    def outcome(learner: CollaborativeLearner, optimizer: Any) -> Any:
        models = values(learner.teacher), values(learner.student)
        return models, bits(learner.state_dict()), bits(optimizer.state_dict()), bits(torch.get_rng_state())

    torch.manual_seed(1)
    learner, optimizer = training()
    for step in range(4):
        file = tmp_path / f"{step}.pt"
        checkpoint.save(file, learner, optimizer=optimizer, rng=torch.get_rng_state())
        assert bits(loaded(file.read_bytes())["learner"]) == bits(learner.state_dict())
        advance(learner, optimizer, step)
    uninterrupted = outcome(learner, optimizer)
    for start in (1, 2):
        resumed, its_optimizer = training()
        torch.set_rng_state(checkpoint.load(tmp_path / f"{start}.pt", resumed, optimizer=its_optimizer)["rng"])
        assert bits(resumed.state_dict()) == bits(loaded((tmp_path / f"{start}.pt").read_bytes())["learner"])
        for step in range(start, 4):
            advance(resumed, its_optimizer, step)
        assert outcome(resumed, its_optimizer) == uninterrupted, f"interrupted after {start} steps"


@every_case
def test_describes_itself(name: str, role: str, make: Any) -> None:
    strategy = make()
    described = describe(strategy)
    assert json.loads(json.dumps(described)) == described == describe(make())
    if is_function(strategy):
        return
    text = repr(strategy)
    assert text.startswith(type(strategy).__name__ + "(")
    namespace = {
        key: value
        for module in sys.modules.values()
        for key, value in vars(module).items()
        if getattr(module, "__name__", "").startswith("clda_core")
    }
    if "<function" not in text:
        assert describe(eval(text, namespace)) == described, "repr() is the call that makes it"


@every_case
def test_pickles(name: str, role: str, make: Any) -> None:
    strategy = make()
    again = pickle.loads(pickle.dumps(strategy))
    assert describe(again) == describe(strategy)
    if not is_function(strategy):
        assert repr(again).partition(" at 0x")[0] == repr(strategy).partition(" at 0x")[0]


def test_descriptions_are_the_same_in_another_process() -> None:
    code = (
        "import json; from clda_core.strategy import describe; from tests.strategies import cases;"
        "print(json.dumps([describe(make()) for _, _, make in cases()]))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout
    assert json.loads(found.decode()) == [describe(make()) for _, _, make in ALL]


# ------------------------------------------------------------------------------------------ role by role: no RNG, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "role", "make"), cases("saliency"))
def test_estimators_keep_dtype_and_shape_and_do_not_write(name: str, role: str, make: Any, dtype: torch.dtype) -> None:
    parameter = torch.linspace(-2, 2, 12, dtype=dtype).reshape(3, 4)
    derivative = torch.linspace(1, -3, 12, dtype=dtype).reshape(3, 4)
    kept = bits([parameter, derivative])
    state = random_states()
    strategy = make()
    scores = strategy.score(parameter, derivative if strategy.order else None)
    assert scores.dtype == dtype
    assert scores.shape == parameter.shape
    assert bool((scores >= 0).all())
    assert bits([parameter, derivative]) == kept
    assert random_states() == state


@pytest.mark.parametrize(("name", "role", "make"), cases("threshold"))
def test_thresholds_are_scalars_and_do_not_write(name: str, role: str, make: Any) -> None:
    target, source = Histogram.empty(2), Histogram.empty(2)
    target.add(0, torch.rand(50, generator=torch.Generator().manual_seed(0)))
    source.add(1, torch.rand(50, generator=torch.Generator().manual_seed(1)))
    kept = bits([target.counts, source.counts])
    value = make()(target, source)
    assert value.dim() == 0
    assert value.device == target.counts.device
    assert float(value) >= 0
    assert bits([target.counts, source.counts]) == kept


@pytest.mark.parametrize(("name", "role", "make"), cases("selection"))
def test_selections_are_pure_and_in_order(name: str, role: str, make: Any) -> None:
    target = {"a": 0.5, "b": 0.1, "c": 0.3, "d": 0.2}
    source = {"a": 0.4, "b": 0.4, "c": 0.4, "d": 0.6}
    kept = json.dumps([target, source])
    state = random_states()
    selected = make()(target, source)
    assert isinstance(selected, tuple)
    assert list(selected) == [layer for layer in target if layer in selected]
    assert selected == make()(dict(target), dict(source))
    assert make()({}, source) == ()
    assert json.dumps([target, source]) == kept
    assert random_states() == state


@pytest.mark.parametrize(("name", "role", "make"), cases("relation"))
def test_relations_only_read_and_name_every_layer(name: str, role: str, make: Any) -> None:
    teacher, student = seeded(lambda: Noisy(3), 0), seeded(Noisy, 1).eval()
    views = [ModelView(model, group_layers(model)) for model in (teacher, student)]
    torch.manual_seed(0)
    with no_traces(teacher, student, values_too=True):
        related = make()(*views, batch())
        assert make()(*views, batch()) == related
    assert isinstance(related, RelatedLayers)
    assert {*related.pairs, *related.unrelated} == {layer.name for layer in views[0].layers}
    assert not set(related.pairs) & set(related.unrelated)
    assert all(related.unrelated.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "role", "make"), cases("update"))
def test_updates_keep_the_teachers_dtype(name: str, role: str, make: Any, dtype: torch.dtype) -> None:
    teacher, student = networks()
    teacher, student = teacher.to(dtype), student.to(dtype).eval()
    learner = make_learner(teacher, student, update=make(), selection=AllLayers())
    x = batch().to(dtype)
    learner.distill(student(x), x)
    learner.step(step_fn=lambda: None)
    assert {tensor.dtype for tensor in teacher.state_dict().values()} == {dtype, torch.int64}
    assert len(learner.report().rounds) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("name", "role", "make"), cases("criterion"))
def test_criteria_are_scalars_in_full_precision(name: str, role: str, make: Any, dtype: torch.dtype) -> None:
    logits = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    kept = bits(logits)
    score = make()(*logits)
    assert score.numel() == 1
    assert score.dtype in (torch.float32, torch.float64)
    assert bits(logits) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "role", "make"), cases("distillation", "feature function"))
def test_losses_are_scalars_without_a_trace(name: str, role: str, make: Any, dtype: torch.dtype) -> None:
    teacher, student = (seeded(lambda: Convolutional(4), seed).to(dtype).eval() for seed in range(2))
    options = options_for(role, make())
    learner = make_learner(teacher, student, **{**options, "extract": both})
    x = batch().to(dtype)
    output, wanted = student(x), teacher(x)
    kept = bits([output, wanted])
    with no_traces(teacher, student, values_too=True):
        loss = learner.distill(output, teacher_output=wanted)
    assert loss.dim() == 0
    assert loss.dtype == dtype
    assert loss.requires_grad
    assert bits([output, wanted]) == kept
    state = random_states()
    loss.backward()
    assert random_states() == state
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize(("name", "role", "make"), cases("schedule"))
def test_schedules_are_functions_of_the_step(name: str, role: str, make: Any) -> None:
    schedule = make()
    asked = [(schedule.due(step), schedule.observes(step), schedule.strength(step)) for step in range(1, 12)]
    backwards = [(schedule.due(step), schedule.observes(step), schedule.strength(step)) for step in range(11, 0, -1)]
    assert asked == backwards[::-1]
    observed = [observes for due, observes, _ in asked if due]
    assert observed[:1] in ([], [True]), "the first step that is due is observed"
    for due, _, strength in asked:
        assert isinstance(due, bool)
        assert 0 <= strength <= 1


@pytest.mark.parametrize(("name", "role", "make"), cases("probe"))
def test_probes_differentiate(name: str, role: str, make: Any) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([True, False, True, True])
    state, kept = random_states(), bits([logits, mask])
    make()(logits, mask).backward()
    assert bool(logits.grad.abs().sum() > 0)
    assert random_states() == state
    assert bits([logits, mask]) == kept


def test_the_learner_runs_with_everything_at_once() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, threshold=MeanThreshold(multiple=2.0))
    train(learner, sgd(student), 3)
    assert len(learner.report().rounds) == 3
