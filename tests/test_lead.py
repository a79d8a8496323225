"""The lead: what a look counts and averages, how far the student is trusted by it, and that it leaves no trace."""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core.distillation import KLDistillation
from clda_core.lead import MEMORY, FixedTrust, Lead, LinearTrust
from clda_core.saliency import Magnitude
from clda_core.selection import AllLayers
from clda_core.update import Average, Guard, MaskedDistillation
from clda_core.update.scoring import validator_of
from clda_core.validation import ConsistencyIoU, MixVal, MutualInformation, NegativeEntropy, SoftConsistency, mixed
from tests.distributed import leads, processes
from tests.helpers import (
    CLASSES,
    SAMPLES,
    Net,
    Segmenter,
    batch,
    bits,
    images,
    labels,
    loaded,
    make_learner,
    networks,
    no_traces,
    nothing_changed,
    saved,
    seeded,
    sgd,
    values,
)
from tests.update.rounds import round_context

WIDE = LinearTrust(zero=-50.0, full=50.0)


def changed(x: Tensor) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module, x: Tensor) -> numpy.ndarray:
    """Return a model's logits in eval mode as float64."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        found = model.eval()(x).double().numpy()
    for module, mode in modes.items():
        module.training = mode
    return found


def softmax(of: numpy.ndarray) -> numpy.ndarray:
    powers = numpy.exp(of - of.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def information(model: nn.Module, seen: Sequence[Tensor], weights: Sequence[numpy.ndarray]) -> float:
    """Return the mutual information over several batches, weighed by position."""
    p, w = numpy.concatenate([softmax(logits(model, x)) for x in seen]), numpy.concatenate(weights)[:, None]
    marginal = (w * p).sum(0) / w.sum()
    conditional = -(w * p * numpy.log(p)).sum() / w.sum()
    return float(-(marginal * numpy.log(marginal)).sum() - conditional)


def consistency(model: nn.Module, seen: Sequence[Tensor], weights: Sequence[numpy.ndarray]) -> float:
    """Return the mean of sum_c p_c(clean) log p_c(view) over several batches, weighed by position."""
    likelihoods = [(softmax(logits(model, x)) * numpy.log(softmax(logits(model, changed(x))))).sum(1) for x in seen]
    w = numpy.concatenate(weights)
    return float((w * numpy.concatenate(likelihoods)).sum() / w.sum())


def diverse(model: Any, classes: int = CLASSES) -> Any:
    """Let a network predict the first so many classes about as often, and no other."""
    found = logits(model, batch()).mean(0)
    with torch.no_grad():
        model.head.bias -= torch.from_numpy(found).float()
        model.head.bias[classes:] = -100.0
    return model


# ------------------------------------------------------------------------------------------------ trust by the lead


def test_linear_trust_by_hand() -> None:
    trust = LinearTrust(zero=-0.5, full=1.5)
    assert [trust(lead) for lead in (-9.0, -0.5, 0.0, 0.5, 1.5, 9.0)] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearTrust(zero=0.0, full=0.0), "full is out of range"),
        (lambda: LinearTrust(zero=1.0, full=0.5), "full is out of range"),
        (lambda: LinearTrust(zero=math.nan), "zero is not a finite number"),
        (lambda: LinearTrust(full=math.inf), "full is not a finite number"),
        (lambda: FixedTrust(1.5), "trust is out of range"),
        (lambda: FixedTrust(-0.1), "trust is out of range"),
        (lambda: FixedTrust(True), "trust is not a finite number"),
    ],
)
def test_bad_options(build: Any, message: str) -> None:
    with pytest.raises(CldaError, match=message):
        build()


class Broken(MutualInformation):
    """A validator that must not be asked."""

    def statistics(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("somebody was validated")


def test_nobody_is_validated_where_trust_is_fixed() -> None:
    lead = Lead(Broken(), FixedTrust(0.25))
    context = round_context(*networks(), inputs=batch())
    lead.rehearse(context)
    look = lead.look(context)
    assert (look.trust, look.lead, look.by_class) == (0.25, None, ())
    assert lead.averages.of is None


# ------------------------------------------------------------------------------------------------ what a look finds


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("view", [False, True])
def test_the_lead_is_the_difference_of_both_scores_over_fading_looks(view: bool, mask: Optional[str]) -> None:
    teacher, student = networks()
    kept = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(3))
    weights = {None: None, "bool": kept > 0.4, "float": kept}[mask]
    counted = numpy.ones(SAMPLES) if weights is None else weights.double().numpy()
    lead, seen = Lead(None, WIDE), [batch(seed) for seed in range(3)]
    score = consistency if view else information
    for number in range(1, 4):
        x = seen[number - 1]
        look = lead.look(round_context(teacher, student, inputs=x, mask=weights, view=changed(x) if view else None))
        fading = [counted * MEMORY ** (number - 1 - index) for index in range(number)]
        expected = score(student, seen[:number], fading) - score(teacher, seen[:number], fading)
        assert look.lead == pytest.approx(expected, abs=1e-6)
        assert look.trust == pytest.approx(WIDE(expected), abs=1e-6)
    assert abs(look.lead or 0.0) > 1e-3, "there is a lead to be found"


def test_one_look_fades_by_the_memory() -> None:
    teacher, student = networks()
    lead, validator = Lead(NegativeEntropy(), WIDE), NegativeEntropy()
    expected: Any = 0.0
    for seed in range(3):
        lead.look(round_context(teacher, student, inputs=batch(seed)))
        found = validator.statistics(torch.from_numpy(logits(student, batch(seed))).float())
        expected = found + MEMORY * expected
    assert torch.allclose(lead.averages.student, expected, rtol=1e-9, atol=0)


def test_another_validator_begins_anew() -> None:
    teacher, student = networks()
    lead = Lead(None, WIDE)
    lead.look(round_context(teacher, student, inputs=batch(0)))
    look = lead.look(round_context(teacher, student, inputs=batch(1), view=changed(batch(1))))
    ones = [numpy.ones(SAMPLES)]
    expected = consistency(student, [batch(1)], ones) - consistency(teacher, [batch(1)], ones)
    assert look.lead == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("validator", [None, SoftConsistency()])
def test_a_round_without_observations_needs_no_view_and_keeps_what_is_averaged(validator: Any) -> None:
    teacher, student = networks()
    lead, always = Lead(validator, WIDE), Lead(validator, WIDE)
    for seed in range(3):
        with_view = round_context(teacher, student, inputs=batch(seed), view=changed(batch(seed)))
        found = lead.look(with_view)
        assert found == always.look(with_view)
        assert lead.look(round_context(teacher, student, inputs=batch(10 + seed)), renewed=False) == found


def test_the_lead_by_class_and_a_class_that_never_appears() -> None:
    teacher, student = (diverse(model, classes=2) for model in networks())
    x = batch()
    look = Lead(SoftConsistency(), WIDE).look(round_context(teacher, student, inputs=x, view=changed(x)))
    assert look.by_class[2] is None
    for index in range(2):
        scores = []
        for model in (teacher, student):
            p, q = softmax(logits(model, x)), softmax(logits(model, changed(x)))
            chosen = p.argmax(1) == index
            scores.append((p * numpy.log(q)).sum(1)[chosen].mean())
        assert look.by_class[index] == pytest.approx(scores[1] - scores[0], abs=1e-5)
    information_only = Lead(MutualInformation(), WIDE).look(round_context(teacher, student, inputs=x))
    assert information_only.lead is not None
    assert not math.isnan(information_only.lead)


class Recording(Net):
    """Remembers what it was called with."""

    def forward(self, x: Tensor) -> Tensor:
        vars(self).setdefault("seen", []).append(x.clone())
        return super().forward(x)


def test_a_validator_that_makes_its_view_is_given_that_and_no_other() -> None:
    teacher, student = diverse(seeded(Recording, 0).eval()), diverse(seeded(Recording, 1).eval())
    x = batch()
    look = Lead(MixVal(ratio=0.7), WIDE).look(round_context(teacher, student, inputs=x, view=changed(x)))
    validator, scores = MixVal(ratio=0.7), []
    for model in (teacher, student):
        assert any(torch.equal(seen, mixed(x, 0.7)) for seen in model.seen), "it was called with the mix"
        assert not any(torch.equal(seen, changed(x)) for seen in model.seen)
        clean, view = (torch.from_numpy(logits(model, one)).float() for one in (x, mixed(x, 0.7)))
        scores.append(float(validator.score(validator.statistics(clean, view))))
    assert look.lead == pytest.approx(scores[1] - scores[0], abs=1e-9)


class Overflowing(Net):
    """Its logits are not finite on batches whose first element is above 100."""

    value = math.nan

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.value if float(x.reshape(-1)[0]) > 100 else 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_batch_on_which_one_network_overflows_counts_for_neither(whose: str, value: float) -> None:
    models = {"teacher": seeded(Net, 0), "student": seeded(Net, 1), whose: seeded(Overflowing, 2)}
    models[whose].value = value
    teacher, student = models["teacher"].eval(), models["student"].eval()
    hot = batch(5)
    hot[0, 0] = 101.0
    lead = Lead(MutualInformation(), WIDE)
    first = lead.look(round_context(teacher, student, inputs=hot))
    assert (first.trust, first.lead) == (0.0, None)
    assert "could not score both" in first.reason
    known = lead.look(round_context(teacher, student, inputs=batch()))
    alone = Lead(MutualInformation(), WIDE).look(round_context(teacher, student, inputs=batch()))
    assert known.lead == alone.lead
    again = lead.look(round_context(teacher, student, inputs=hot))
    assert again.lead == pytest.approx(known.lead, abs=1e-9)


@pytest.mark.parametrize("validator", [None, MutualInformation(), NegativeEntropy(), MixVal(), ConsistencyIoU()])
def test_one_image_is_a_batch(validator: Any) -> None:
    x = batch(count=1)
    look = Lead(validator, WIDE).look(round_context(*networks(), inputs=x, view=changed(x)))
    assert 0 <= look.trust <= 1
    assert look.lead is None or math.isfinite(look.lead)


def test_without_inputs_nobody_is_validated_and_the_reason_is_given() -> None:
    look = Lead(None, WIDE).look(round_context(*networks()))
    assert (look.trust, look.lead) == (0.0, None)
    assert "no inputs" in look.reason


class First(nn.Module):
    """A student of the first three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, narrow: Tensor) -> Tensor:
        return self.fc(narrow)


def test_a_student_with_other_inputs_is_validated_on_its_own_view() -> None:
    teacher, student = networks()[0], seeded(First, 1)
    x = batch()
    both = {"inputs": x, "student_inputs": x[:, :3], "view": changed(x), "mask": None}
    lead = Lead(None, WIDE)
    lone = round_context(teacher, student, related={}, **both)
    assert isinstance(validator_of(None, lone), MutualInformation), "the student's view is not known"
    context = round_context(teacher, student, related={}, **both, student_view=changed(x)[:, :3])
    assert isinstance(validator_of(None, context), SoftConsistency)
    p, q = (softmax(logits(student, one[:, :3])) for one in (x, changed(x)))
    ones = [numpy.ones(SAMPLES)]
    expected = float((p * numpy.log(q)).sum(1).mean()) - consistency(teacher, [x], ones)
    assert lead.look(context).lead == pytest.approx(expected, abs=1e-6)
    with pytest.raises(CldaError, match="SoftConsistency needs a second view.*student_view= beside student_inputs="):
        Lead(SoftConsistency(), WIDE).look(lone)


def test_the_lead_is_in_the_students_classes() -> None:
    order = [2, 0, 1]
    teacher = networks()[0]
    with torch.no_grad():
        permuted = seeded(lambda: Net(3), 0).eval()
        permuted.load_state_dict(teacher.state_dict())
        for name in ("weight", "bias"):
            value = getattr(permuted.head, name)
            value[order] = getattr(teacher.head, name).clone()
    leads_found = []
    for each, loss in ((teacher, KLDistillation()), (permuted, KLDistillation(class_map=order))):
        student = networks()[1].eval()  # whose statistics stay
        learner = make_learner(each, student, distillation=loss, trust=WIDE, update=Average(decay=1.0))
        x = batch()
        learner.distill(student(x), x, view=changed(x)).backward()
        learner.step(step_fn=lambda: None)
        leads_found.append(learner.report().rounds[0])
    assert leads_found[0].lead == pytest.approx(leads_found[1].lead, abs=1e-6)
    assert leads_found[0].lead_by_class == pytest.approx(leads_found[1].lead_by_class, abs=1e-6)


# -------------------------------------------------------------------------------------- in a learner: the first step


def later(**options: Any) -> CollaborativeLearner:
    return make_learner(*networks(), **{"schedule": Schedule(warmup=20, interval=5), "trust": WIDE, **options})


def fails(learner: CollaborativeLearner, match: str, **options: Any) -> None:
    """Expect the first step to fail before the optimizer is stepped, and everything to be as it was."""
    learner.distill(learner.student(batch()), batch(), **options).backward()
    with nothing_changed(learner), pytest.raises(CldaError, match=match):
        learner.step(step_fn=lambda: pytest.fail("the optimizer was stepped"))


class Returning(MutualInformation):
    """A validator that returns what it is told to."""

    def __init__(self, statistics: Any = None, score: Any = None) -> None:
        self.of, self.its_score = statistics, score

    def statistics(self, *arguments: Any) -> Any:
        return super().statistics(*arguments) if self.of is None else self.of()

    def score(self, statistics: Tensor) -> Any:
        return super().score(statistics) if self.its_score is None else self.its_score()


def growing() -> Any:
    count = iter(range(2, 9))
    return lambda: torch.ones(next(count))


def raising() -> Any:
    raise ZeroDivisionError("theirs")


@pytest.mark.parametrize(
    ("validator", "match"),
    [
        (lambda: Returning(statistics=lambda: [1.0]), "statistics of Returning cannot be added up"),
        (lambda: Returning(statistics=lambda: torch.ones(2, 2)), "statistics of Returning cannot be added up"),
        (lambda: Returning(statistics=growing()), "expected 2 of them, as before"),
        (lambda: Returning(score=lambda: 0.5), "score of Returning is no score"),
        (lambda: Returning(score=lambda: torch.ones(2)), "score of Returning is no score"),
        (lambda: Returning(statistics=raising), "a round would fail.*ZeroDivisionError: theirs"),
        (SoftConsistency, "needs a second view"),
    ],
)
def test_a_validator_that_returns_the_wrong_thing_fails_in_the_first_step(validator: Any, match: str) -> None:
    fails(later(validator=validator()), match)


@pytest.mark.parametrize("trust", [1.5, -0.1, math.nan, math.inf, None, True, torch.tensor(0.5), "1"])
def test_trust_that_is_no_number_between_0_and_1_fails_in_the_first_step(trust: Any) -> None:
    fails(later(trust=lambda lead: trust), r"trust= returned no trust: expected a number in \[0, 1\]")


@pytest.mark.parametrize(
    ("view", "match"),
    [
        (lambda: batch(count=SAMPLES // 2), "another batch size"),
        (lambda: batch()[:, :4], "a round would fail"),
        (lambda: {"y": batch()}, "cannot be called with the inputs"),
    ],
)
@pytest.mark.parametrize("trust", [WIDE, FixedTrust()])
def test_a_view_of_another_shape_fails_in_the_first_step(view: Any, match: str, trust: Any) -> None:
    update = MaskedDistillation(learns_on="view")  # which needs the view, where nobody is validated by it too
    fails(later(trust=trust, update=update), match if trust is WIDE else "Fix: ", view=view())


def test_a_view_of_another_resolution_fails_in_the_first_step() -> None:
    teacher, student = seeded(Segmenter, 0).eval(), seeded(Segmenter, 1)
    learner = make_learner(teacher, student, schedule=Schedule(warmup=20, interval=5), trust=WIDE)
    learner.distill(student(images()), images(), view=images(side=16)).backward()
    with nothing_changed(learner), pytest.raises(CldaError, match="another shape than those distilled"):
        learner.step(step_fn=lambda: pytest.fail("the optimizer was stepped"))


@pytest.mark.parametrize("own_inputs", [False, True])
def test_a_view_may_be_a_function_that_only_rounds_and_the_first_step_call(own_inputs: bool) -> None:
    made: List[int] = []

    def train(lazy: bool) -> CollaborativeLearner:
        torch.manual_seed(0)  # dropout
        learner = make_learner(*networks(), schedule=Schedule(interval=3), trust=WIDE)
        optimizer = sgd(learner.student)
        for number in range(1, 8):
            x = batch(number)

            def view(x: Tensor = x, number: int = number) -> Tensor:
                made.append(number)
                return changed(x).requires_grad_()

            views: Dict[str, Any] = {"view": view if lazy else changed(x)}
            if own_inputs:
                views.update(student_inputs=x, student_view=views["view"])
            optimizer.zero_grad()
            learner.distill(learner.student(x), x, **views).backward()
            learner.step(optimizer)
        return learner

    by_tensor, by_function = train(False), train(True)
    assert sorted(set(made)) == [1, 3, 6]
    assert len(made) == 3 * (1 + own_inputs)
    leads = [[record.lead for record in learner.report().rounds] for learner in (by_tensor, by_function)]
    assert leads[0] == leads[1]
    assert bits(by_tensor.teacher.state_dict()) == bits(by_function.teacher.state_dict())


def test_a_view_that_cannot_be_made_leaves_everything_as_it_was() -> None:
    def view() -> Tensor:
        raise RuntimeError("out of colours")

    learner = later()
    output = learner.student(batch())
    with nothing_changed(learner), pytest.raises(RuntimeError, match="out of colours"):
        learner.distill(output, batch(), view=view)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_output": torch.zeros(SAMPLES, CLASSES), "view": batch()},
        {"inputs": batch(), "student_view": batch()},
        {"inputs": batch(), "view": batch(), "student_view": batch()},
        {"inputs": batch(), "student_inputs": batch(), "student_view": batch()},
    ],
)
def test_a_view_alone_is_refused(options: Dict[str, Any]) -> None:
    learner = later()
    output = learner.student(batch())
    with nothing_changed(learner), pytest.raises(CldaError, match=r"distill\(\) got (student_)?view= alone"):
        learner.distill(output, options.pop("inputs", None), **options)


# ------------------------------------------------------------------------------------------ in a learner: its rounds


def source(network: nn.Module) -> Tensor:
    return F.cross_entropy(network(batch(200)), labels(200))


def step(learner: CollaborativeLearner, optimizer: Any, number: int, **options: Any) -> None:
    x = batch(number)
    optimizer.zero_grad()
    loss = F.cross_entropy(learner.student(batch(50 + number)), labels(number))
    (loss + learner.distill(learner.student(x), x, view=changed(x), source_loss=source, **options)).backward()
    learner.step(optimizer)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("own_targets", [False, True])
def test_resumed_with_lead_moments_and_peak_is_uninterrupted(own_targets: bool) -> None:
    def training() -> Tuple[CollaborativeLearner, Any, Any]:
        learner = make_learner(*networks(), trust=WIDE, update=MaskedDistillation(own_targets=own_targets))
        optimizer = adam(learner.student)
        return learner, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    def go(learner: CollaborativeLearner, optimizer: Any, rates: Any, numbers: Any) -> Any:
        for number in numbers:
            torch.manual_seed(number)
            step(learner, optimizer, number)
            rates.step()
        return values(learner.teacher), bits(learner.state_dict())

    learner, optimizer, rates = training()
    go(learner, optimizer, rates, range(2))
    state = loaded(saved([one.state_dict() for one in (learner, learner.teacher, learner.student, optimizer)]))
    of_rates = rates.state_dict()
    assert state[0]["peak"] == pytest.approx(1e-2)
    assert state[0]["lead"]["of"] == "SoftConsistency"
    assert state[0]["update"]["optimizer"]["state"]
    assert ("original" in state[0]["update"]) == own_targets
    whole = go(learner, optimizer, rates, range(2, 5))
    resumed, its_optimizer, its_rates = training()
    for one, its in zip((resumed, resumed.teacher, resumed.student, its_optimizer), state):
        one.load_state_dict(its)
    its_rates.load_state_dict(of_rates)
    assert go(resumed, its_optimizer, its_rates, range(2, 5)) == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("where", ["the validator", "the trust function"])
def test_an_interrupt_within_a_look_leaves_everything_as_before(where: str, error: Any) -> None:
    due: List[bool] = []

    class Interrupted(MutualInformation):
        def statistics(self, *arguments: Any) -> Tensor:
            if due and where == "the validator":
                raise error
            return super().statistics(*arguments)

    def trust(lead: float) -> float:
        if due and where == "the trust function":
            raise error
        return 1.0

    learner = make_learner(*networks(), validator=Interrupted(), trust=trust, update=MaskedDistillation())
    optimizer = adam(learner.student)
    step(learner, optimizer, 0)
    before, state = values(learner.teacher), learner.state_dict()
    due.append(True)
    with no_traces(learner.teacher, rng=False), pytest.raises(error):
        step(learner, optimizer, 1)
    assert values(learner.teacher) == before
    for key in ("lead", "peak", "update", "history", "earlier"):
        assert bits(learner.state_dict()[key]) == bits(state[key]), key
    due.clear()
    step(learner, optimizer, 2)
    assert len(learner.report().rounds) == 2


def test_a_look_leaves_dropout_statistics_and_random_states_alone() -> None:
    teacher, student = networks()
    lead = Lead(None, WIDE)
    with no_traces(teacher, student, values_too=True):
        lead.rehearse(round_context(teacher, student, inputs=batch(), view=changed(batch())))
        assert lead.averages.of is None
        lead.look(round_context(teacher, student, inputs=batch(), view=changed(batch())))
    assert student.training


def test_a_step_with_view_and_source_loss_leaves_no_traces() -> None:
    learner = make_learner(*networks(), trust=WIDE, update=MaskedDistillation())
    x = batch()
    loss = learner.distill(learner.student(x), x, view=changed(x), source_loss=source)
    loss.backward()
    with no_traces(learner.teacher, learner.student):
        learner.step(step_fn=lambda: None)
    assert learner.report().rounds[0].updated


def test_off_is_off_with_view_and_source_loss() -> None:
    def never(network: nn.Module) -> Tensor:
        raise AssertionError("the source loss was called")

    outcomes = []
    for enabled in (None, False):
        teacher, student = networks()
        optimizer = sgd(student)
        torch.manual_seed(0)
        for number in range(2):
            x = batch(number)
            optimizer.zero_grad()
            loss = F.cross_entropy(student(batch(50 + number)), labels(number))
            output = student(x)
            if enabled is None:
                (loss + 0 * output.sum()).backward()
                optimizer.step()
                continue
            learner = make_learner(teacher, student, enabled=False, trust=WIDE)
            (loss + learner.distill(output, x, view=changed(x), source_loss=never)).backward()
            learner.step(optimizer)
        outcomes.append((values(teacher), values(student), bits(torch.get_rng_state())))
    assert outcomes[0][0] == outcomes[1][0]
    for name, value in outcomes[0][1].items():
        assert outcomes[1][1][name] == value, name
    assert outcomes[0][2] == outcomes[1][2]


@pytest.mark.parametrize("wrap", [lambda update: update, lambda update: Guard(update, criterion=always)])
@pytest.mark.parametrize("trust", [1.0, 0.5, 0.0])
def test_the_strength_of_an_update_that_does_not_weigh_trust_is_multiplied_by_it(trust: float, wrap: Any) -> None:
    moved = []
    for each in (FixedTrust(trust), FixedTrust(1.0)):
        teacher, student = networks(teacher_depth=2, student_depth=2)
        before = teacher.head.weight.detach().clone()
        update = wrap(Average(decay=0.5))
        learner = make_learner(teacher, student, trust=each, update=update, saliency=Magnitude(), selection=AllLayers())
        learner.distill(student(batch()), batch()).backward()
        learner.step(step_fn=lambda: None)
        moved.append(teacher.head.weight.detach() - before)
        record = learner.report().rounds[0]
        assert bool(record.updated) == bool(each.trust)
    assert torch.allclose(moved[0], trust * moved[1], atol=1e-6)
    assert float(moved[1].abs().max()) > 1e-2


def always(teacher: Tensor, original: Tensor, student: Tensor) -> Tensor:
    return torch.zeros(())


def test_a_guarded_update_weighs_trust_if_the_update_inside_does() -> None:
    outcomes = []
    own = {"learns_on": "view", "own_targets": True}
    for update in (MaskedDistillation(**own), Guard(MaskedDistillation(**own), criterion=always)):
        learner = make_learner(*networks(), trust=FixedTrust(0.0), update=update, selection=AllLayers())
        step(learner, adam(learner.student), 0)
        assert learner.report().rounds[0].updated, "the teacher's own predictions and the source go on teaching"
        outcomes.append(values(learner.teacher))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("update", [lambda: Average(decay=0.5), MaskedDistillation])
def test_a_student_that_is_behind_changes_nothing_and_the_report_says_why(update: Any) -> None:
    """It predicts the same on everything, so it has no information at all."""
    teacher, student = networks()
    with torch.no_grad():
        teacher.head.weight.mul_(20.0)
        student.head.weight.zero_()
    learner = make_learner(teacher, student, trust=LinearTrust(zero=-0.01, full=0.01), update=update())
    before = values(teacher)
    learner.distill(learner.student(batch()), batch()).backward()
    learner.step(step_fn=lambda: None)
    record = learner.report().rounds[0]
    assert record.lead is not None
    assert record.lead < -0.01
    assert (record.trust, record.updated) == (0.0, ())
    assert "not trusted" in str(record.reason)
    assert values(teacher) == before
    assert f"no round changed the teacher: {record.reason}" in str(learner.report())


def test_a_round_without_inputs_does_not_say_that_the_student_is_behind() -> None:
    learner = make_learner(*networks(), trust=WIDE, saliency=Magnitude(), update=Average(decay=0.5))
    with torch.no_grad():
        output = learner.teacher(batch())
    learner.distill(learner.student(batch()), teacher_output=output).backward()
    learner.step(step_fn=lambda: None)
    assert "no inputs" in str(learner.report().rounds[0].reason)


@pytest.mark.parametrize("training", [False, True])
def test_a_co_trained_teacher_is_validated_in_eval_mode(training: bool) -> None:
    """Its own output in training mode, which the host hands over, is not what it would predict in a round."""
    teacher, student = networks()
    teacher.train(training)
    learner = make_learner(teacher, student, trust=WIDE, update=Average(decay=1.0))
    x, ones = batch(), [numpy.ones(SAMPLES)]
    output = teacher(x)
    (output.square().mean() + learner.distill(student(x), x, teacher_output=output)).backward()
    learner.step(step_fn=lambda: None)
    expected = information(student, [x], ones) - information(teacher, [x], ones)
    assert learner.report().rounds[0].lead == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------------------------------- several ranks


def test_a_co_trained_teacher_is_validated_as_it_is_after_the_hosts_step() -> None:
    """Two networks that are trained alike stay level, however long the steps are."""
    teacher, student = (seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), 0) for _ in range(2))
    learner = make_learner(teacher, student, trust=WIDE, update=MaskedDistillation(learning_rate=1e-9))
    optimizer = torch.optim.Adam([*teacher.parameters(), *student.parameters()], lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(teacher(batch(step)), labels(step)) + F.cross_entropy(student(batch(step)), labels(step))
        loss = loss + 0 * learner.distill(student(batch(9)), batch(9), view=changed(batch(9)))
        loss.backward()
        learner.step(optimizer)
    assert [record.lead for record in learner.report().rounds] == pytest.approx([0.0] * 4, abs=1e-6)


def test_ranks_decide_alike_and_as_one_process_does(tmp_path: Any) -> None:
    found = processes.run(leads.work, ranks=2, folder=tmp_path)
    for name in leads.SCENARIOS:
        first, second = (rank[name] for rank in found)
        assert first["rounds"] == second["rounds"], name
        assert first["lead"] == second["lead"], name
        assert first["teacher"] == second["teacher"], name
        alone = leads.train(name, 0, 1)
        assert [record["lead"] for record in first["rounds"]] == pytest.approx(
            [record["lead"] for record in alone["rounds"]], abs=1e-5
        ), name
        assert all(record["lead"] is not None and record["updated"] for record in first["rounds"])
