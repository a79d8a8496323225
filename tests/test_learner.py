"""The learner from a host's side: what it takes, what it gives, and strategies of a user's own."""

import json
import weakref
from typing import Any, Dict, List, NamedTuple, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CldaError, CollaborativeLearner, Never, Outputs, Schedule
from clda_core.distillation import FeatureDistillation, KLDistillation, WeightedSum, dist_distillation, kl_distillation
from clda_core.lead import FixedTrust, LinearTrust
from clda_core.relation import BySimilarity, RelatedLayers
from clda_core.saliency import (
    Hessian,
    Magnitude,
    MeanThreshold,
    PseudoLabelCrossEntropy,
    ReferenceThreshold,
    Taylor,
)
from clda_core.selection import AllLayers, BelowRate, DomainShift, DrawnFraction, LowestFraction
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation, UpdateResult, init_student
from tests.helpers import (
    Net,
    Segmenter,
    batch,
    bits,
    every_step,
    images,
    labels,
    loaded,
    make_learner,
    networks,
    no_traces,
    saved,
    seeded,
    sgd,
    train,
    values,
)

LAYERS = ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]


def nothing() -> None:
    """A step that does nothing."""


def one_round(learner: CollaborativeLearner, inputs: Optional[Tensor] = None) -> Any:
    x = batch() if inputs is None else inputs
    learner.distill(learner.student(x), x)
    learner.step(step_fn=nothing)
    return learner.report().rounds[-1]


# ------------------------------------------------------------------------------------------------------- the example


def test_the_five_lines_of_the_quickstart() -> None:
    teacher, student = networks()
    optimizer = sgd(student)
    learner = CollaborativeLearner(teacher, student)
    for step in range(3):
        optimizer.zero_grad()
        logits_t = student(batch(step))
        loss = F.cross_entropy(student(batch(9)), labels()) + learner.distill(logits_t, batch(step))
        loss.backward()
        learner.step(optimizer)
    assert learner.report().steps == 3
    assert not learner.report().rounds, "the warm-up is not over"


def test_never_is_frozen_teacher_distillation() -> None:
    teacher, student = networks()
    before = values(teacher)
    learner = make_learner(teacher, student, schedule=Never())
    train(learner, sgd(student), 3)
    assert values(teacher) == before
    assert not learner.observing


# -------------------------------------------------------------------------------------------------------- distill


def test_distill_is_the_loss_of_the_teacher_in_eval_mode() -> None:
    teacher, student = networks()
    expected = kl_distillation(student.eval()(batch()), teacher(batch()), temperature=2.0)
    teacher.train()
    learner = make_learner(teacher, student, distillation=KLDistillation(temperature=2.0))
    loss = learner.distill(student(batch()), batch())
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.head.weight.grad is not None


class ModelOutput(NamedTuple):
    loss: Optional[Tensor]
    logits: Tensor


class DataOutput:
    """As a dataclass of transformers."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returning(nn.Module):
    def __init__(self, net: nn.Module, pack: Any) -> None:
        super().__init__()
        self.net, self.pack = net, pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.net(x))


PACKINGS = {
    "tuple": (lambda z: (z, "rest"), lambda output: output[0]),
    "named tuple": (lambda z: ModelOutput(None, z), lambda output: output.logits),
    "dict": (lambda z: {"out": z}, lambda output: output["out"]),
    "object": (DataOutput, lambda output: output.logits),
    "outputs": (lambda z: {"out": z}, lambda output: Outputs(output["out"])),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_distill_reads_any_output_with_extract(packing: str) -> None:
    pack, extract = PACKINGS[packing]
    teacher, student = networks()
    student.eval()
    expected = make_learner(teacher, student).distill(student(batch()), batch())
    wrapped = Returning(teacher, pack), Returning(student, pack)
    learner = make_learner(*wrapped, extract=extract)
    assert torch.equal(learner.distill(wrapped[1](batch()), batch()), expected)
    learner.step(step_fn=nothing)
    assert set(learner.report().rounds[0].rates) == {f"net.{name}" for name in LAYERS}


def test_outputs_need_no_extract() -> None:
    teacher, student = networks()
    expected = make_learner(teacher, student).distill(student.eval()(batch()), batch())
    learner = make_learner(teacher, student)
    assert torch.equal(learner.distill(Outputs(student(batch())), teacher_output=Outputs(teacher(batch()))), expected)


class TwoInputs(Net):
    def forward(self, x: Tensor, *, shift: Optional[Tensor] = None) -> Tensor:
        return super().forward(x if shift is None else x + shift)


def test_inputs_may_be_positional_or_keyword_arguments() -> None:
    teacher, student = seeded(TwoInputs, 0).eval(), seeded(TwoInputs, 1).eval()
    learner = make_learner(teacher, student)
    x = batch()
    plain = learner.distill(student(x), x)
    assert torch.equal(learner.distill(student(x), (x,)), plain)
    assert torch.equal(learner.distill(student(x), {"x": x}), plain)
    shifted = learner.distill(student(x), {"x": x, "shift": torch.ones(5)})
    assert not torch.equal(shifted, plain)
    learner.step(step_fn=nothing)
    assert learner.report().rounds


def test_a_teacher_output_of_the_hosts_is_used_as_it_is() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    output = teacher(batch())
    expected = learner.distill(student.eval()(batch()), batch())

    def never(*_: Any) -> None:
        raise AssertionError("the teacher was run")

    handle = teacher.register_forward_pre_hook(never)
    assert torch.equal(learner.distill(student(batch()), batch(), teacher_output=output), expected)
    handle.remove()
    learner.step(step_fn=nothing)
    assert learner.report().rounds, "the inputs served the round"


def test_a_later_teacher_output_without_inputs_keeps_the_inputs_of_the_step() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    learner.distill(student(batch()), batch())
    learner.distill(student(batch(1)), teacher_output=teacher(batch(1)))
    learner.step(step_fn=nothing)
    assert learner.report().rounds


def test_the_student_may_see_another_view() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    strong = batch() + 0.5
    expected = dist_distillation(student.eval()(strong), teacher(batch()))
    assert torch.equal(learner.distill(student(strong), batch()), expected)


@pytest.mark.parametrize("kind", ["bool", "float", "labels"])
def test_the_mask_reaches_the_loss_the_probe_and_the_update(kind: str) -> None:
    teacher, student = seeded(Segmenter, 0).eval(), seeded(Segmenter, 1).eval()
    half = torch.zeros(2, 8, 8, dtype=torch.bool)
    half[:, :4] = True
    mask = {"bool": half, "float": 0.5 * half.float(), "labels": 255 * (~half)}
    x, seen = images(), []

    def probe(logits: Tensor, its_mask: Optional[Tensor]) -> Tensor:
        seen.append(its_mask)
        return PseudoLabelCrossEntropy()(logits, its_mask)

    class Spy(MaskedDistillation):
        def apply(self, context: Any) -> UpdateResult:
            seen.append(context.mask)
            return super().apply(context)

    chosen = mask[kind].long() if kind == "labels" else mask[kind]
    ignored = 255 if kind == "labels" else None
    learner = make_learner(teacher, student, probe=probe, update=Spy(), ignore_index=ignored)
    loss = learner.distill(student(x), x, mask=chosen)
    small = F.interpolate(half[:, None].float(), size=student(x).shape[2:])[:, 0] > 0
    assert torch.allclose(loss, dist_distillation(student(x), teacher(x), small), rtol=1e-5)
    learner.step(step_fn=nothing)
    assert len(seen) == 2
    assert all(torch.equal(given, half) if kind == "labels" else given is chosen for given in seen)


# -------------------------------------------------------------------------------------------------------- observe


def rates_of(learner: CollaborativeLearner) -> Dict[str, float]:
    return dict(learner.report().rounds[-1].rates)


def test_a_co_trained_teachers_own_gradients_are_read() -> None:
    def run(co_trained: bool, factor: float = 1.0) -> Dict[str, float]:
        teacher, student = networks()
        learner = make_learner(teacher, student, update=Average(decay=1.0))
        learner.distill(student(batch()), batch())
        loss = factor * F.cross_entropy(teacher(batch(3)), labels(3))
        if co_trained:
            loss.backward()
            with no_traces(teacher, student, values_too=True):
                learner.observe()
        else:
            learner.observe(loss)
        learner.after_step()
        return rates_of(learner)

    own = run(co_trained=True)
    assert list(own) == LAYERS
    assert own == run(co_trained=False)
    assert own == run(co_trained=True, factor=4.0), "scaling the loss does not change the LSR"

    teacher, student = networks()
    learner = make_learner(teacher, student, update=Average(decay=1.0))
    assert one_round(learner).rates != own, "the probe's gradients are others"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_from_before_the_learner_do_not_count_and_later_ones_do(set_to_none: bool) -> None:
    teacher, student = networks()
    teacher.unused(teacher.features(batch())[0]).sum().backward()
    learner = make_learner(teacher, student, update=Average(decay=1.0))
    assert list(one_round(learner).rates) == LAYERS, "the probe's: the left-overs have a gradient for 'unused'"
    for step in range(3):
        for parameter in teacher.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
        teacher.unused(teacher.features(batch(step))[0]).pow(2).sum().backward()
        learner.distill(student(batch()), batch())
        learner.step(step_fn=nothing)
        assert list(rates_of(learner)) == ["stem", "unused"], "the host's: a new gradient may lie where the old one lay"


def test_left_overs_are_not_kept_alive() -> None:
    teacher, student = networks()
    teacher(batch()).sum().backward()
    learner = make_learner(teacher, student)
    assert learner._observer._leftover
    teacher.zero_grad()
    for parameter in teacher.parameters():
        parameter.grad = None
    one_round(learner)
    assert not learner._observer._leftover


@pytest.mark.skipif(
    not hasattr(torch, "inference_mode"), reason="before torch 1.9 a gradient is a new object each time"
)
def test_gradients_count_once_so_a_teacher_trained_no_longer_is_observed_by_the_probe() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=Average(decay=1.0))
    teacher.unused(teacher.features(batch())[0]).pow(2).sum().backward()
    assert list(one_round(learner).rates) == ["stem", "unused"], "the host's"
    assert list(one_round(learner).rates) == LAYERS, "the probe's: the host made no new gradient"
    teacher.unused(teacher.features(batch())[0]).pow(2).sum().backward()  # adds to the old one, in place
    assert list(one_round(learner).rates) == ["stem", "unused"], "the host's"
    gradient = weakref.ref(teacher.unused.weight.grad)
    teacher.unused.weight.grad = None
    assert gradient() is None, "what the host drops is not held"


def test_a_function_is_observed_on_a_frozen_teacher() -> None:
    results = []
    for frozen in (False, True):
        teacher, student = networks()
        teacher.requires_grad_(not frozen)
        learner = make_learner(teacher, student, update=Average(decay=1.0))
        modes: List[bool] = []

        def supervised(model: nn.Module, modes: List[bool] = modes) -> Tensor:
            modes.append(model.training)
            return F.cross_entropy(model(batch(3)), labels(3))

        teacher.train()
        with no_traces(teacher, student, values_too=True):
            learner.observe(supervised)
        learner.after_step()
        assert modes == [False]
        results.append(rates_of(learner))
    assert results[0] == results[1]
    assert list(results[0]) == LAYERS


def test_a_function_is_called_only_when_observing() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, schedule=Schedule(warmup=2, interval=1, observe_every=1))

    def never(_: nn.Module) -> Tensor:
        raise AssertionError("called")

    for _ in range(2):
        assert not learner.observing
        learner.observe(never)
        learner.after_step()
    assert learner.observing


def source_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch(40)), labels(40))


def test_source_batches_serve_domain_shift() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, selection=DomainShift(fraction=0.4), update=Average(decay=0.9))
    learner.distill(student(batch()), batch())
    learner.observe(source_loss, domain="source")
    learner.step(step_fn=nothing)
    record = learner.report().rounds[0]
    shift = {name: record.source_rates[name] - record.rates[name] for name in LAYERS}
    assert set(record.selected) == set(sorted(shift, key=shift.__getitem__, reverse=True)[:2])


def test_step_observes_target_data_though_source_data_was_observed() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    learner.distill(student(batch()), batch())
    learner.observe(source_loss, domain="source")
    learner.step(step_fn=nothing)
    assert learner.report().rounds[0].rates
    assert learner.report().rounds[0].source_rates


@pytest.mark.parametrize("source_first", [True, False])
def test_a_reference_threshold_comes_from_source_data(source_first: bool) -> None:
    teacher, student = networks()
    options = {"selection": BelowRate(rate=1.0), "threshold": ReferenceThreshold()}
    learner = make_learner(teacher, student, **options, update=Average(decay=0.9))
    for step in range(2):
        learner.distill(student(batch(step)), batch(step))
        calls = [lambda: learner.observe(source_loss, domain="source"), learner.observe]
        for call in calls if source_first else calls[::-1]:
            call()
        learner.after_step()
    assert len(learner.report().rounds) == 2
    one_round(learner)
    assert len(learner.report().rounds) == 3, "the reference stays without further source data"


def test_observations_of_a_round_are_averaged() -> None:
    def rates(steps: List[int]) -> Dict[str, float]:
        teacher, student = networks()
        schedule = every_step(interval=len(steps), observations=len(steps))
        learner = make_learner(teacher, student, schedule=schedule, update=Average(decay=1.0))
        for step in steps:
            learner.distill(student(batch(step)), batch(step))
            learner.step(step_fn=nothing)
        return rates_of(learner)

    both, first, second = rates([1, 2]), rates([1]), rates([2])
    assert both == pytest.approx({name: (first[name] + second[name]) / 2 for name in LAYERS})


def test_rounds_between_observations_go_by_the_last_rates() -> None:
    learner = make_learner(
        *networks(), schedule=Schedule(warmup=0, interval=1, observe_every=3), update=MaskedDistillation()
    )
    rounds = [one_round(learner, batch(seed)) for seed in range(4)]
    assert rounds[0].rates == rounds[1].rates == rounds[2].rates != rounds[3].rates
    assert all(record.updated for record in rounds)


def test_rounds_go_by_the_observers_rates_and_not_by_the_reports() -> None:
    learner = make_learner(*networks(), schedule=Schedule(warmup=0, interval=1, observe_every=3))
    first = one_round(learner)
    kept = dict(first.rates)
    first.rates.clear()
    assert one_round(learner).rates == kept


def test_rates_are_kept_over_a_checkpoint() -> None:
    schedule = Schedule(warmup=0, interval=1, observe_every=3)
    learner, resumed = make_learner(*networks(), schedule=schedule), make_learner(*networks(), schedule=schedule)
    first = one_round(learner)
    resumed.load_state_dict(learner.state_dict())
    assert one_round(resumed).rates == first.rates


def test_no_round_goes_by_old_rates_where_it_should_have_been_observed() -> None:
    learner = make_learner(*networks(), schedule=Schedule(warmup=0, interval=1, observe_every=2))
    for seed in range(2):
        one_round(learner, batch(seed))
    learner.distill(learner.student(batch()), batch())
    learner.observe(lambda teacher: teacher(batch()).sum() * float("nan"))
    learner.after_step()
    assert [record.step for record in learner.report().rounds] == [1, 2]


def test_a_strength_scales_the_update() -> None:
    def moved(**options: Any) -> float:
        teacher, student = networks()
        was = teacher.head.weight.detach().clone()
        schedule = Schedule(warmup=0, interval=1, **options)
        learner = make_learner(
            teacher, student, schedule=schedule, update=Average(decay=0.5), selection=AllLayers(), saliency=Magnitude()
        )
        one_round(learner)
        return float((teacher.head.weight - was).norm().detach())

    assert moved(decay="linear", total=2) == pytest.approx(0.5 * moved())


# ------------------------------------------------------------------------------------------------- learner's projectors


def with_features(net: Net, x: Tensor) -> Outputs:
    features = net.features(x)
    return Outputs(net.head(features[-1]), (features[0], features[-1]))


class Featured(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Outputs:
        return with_features(self.net, x)


def featured() -> Any:
    teacher = Featured(seeded(lambda: Net(3, 10), 0)).eval()
    student = Featured(seeded(lambda: Net(2, 6), 1)).eval()
    distillation = WeightedSum([(1.0, KLDistillation()), (1.0, FeatureDistillation())])
    return make_learner(teacher, student, distillation=distillation), sgd(student), distillation


def test_projectors_are_trained_by_the_learner_and_unknown_to_the_host() -> None:
    learner, optimizer, distillation = featured()
    in_host = {id(p) for group in optimizer.param_groups for p in group["params"]}
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        learner.distill(learner.student(batch(step)), batch(step)).backward()
        learner.step(optimizer)
        seen.append(bits([parameter.detach().clone() for parameter in distillation.parameters()]))
        assert all(parameter.grad is None for parameter in distillation.parameters())
    assert len(list(distillation.parameters())) == 4
    assert not in_host & {id(parameter) for parameter in distillation.parameters()}
    assert seen[0] != seen[1] != seen[2]


def test_projectors_take_no_step_that_the_host_skips_and_keep_nothing_of_it() -> None:
    learner, optimizer, distillation = featured()

    class Skipping:
        def step(self, _: Any) -> None:
            """As a GradScaler after an overflow."""

    learner.distill(learner.student(batch()), batch())
    before = bits([parameter.detach() for parameter in distillation.parameters()])
    (learner.distill(learner.student(batch()), batch()) * float("inf")).backward()
    learner.step(optimizer, scaler=Skipping())
    assert bits([parameter.detach() for parameter in distillation.parameters()]) == before
    assert all(parameter.grad is None for parameter in distillation.parameters())
    assert learner.report().steps == 0


def test_a_non_finite_gradient_does_not_stay_in_the_projectors() -> None:
    learner, optimizer, distillation = featured()
    (learner.distill(learner.student(batch()), batch()) * float("nan")).backward()
    learner.step(step_fn=nothing)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in distillation.parameters())


# ------------------------------------------------------------------------------------------------- report and metrics


def test_metrics_are_flat_floats() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=Guard(MaskedDistillation()), trust=LinearTrust())
    none = {"clda/steps": 0.0, "clda/rounds": 0.0, "clda/rounds_changed": 0.0, "clda/discarded": 0.0}
    assert learner.metrics() == none
    train(learner, sgd(student), 2)
    figures = learner.metrics()
    assert all(type(name) is str and type(value) is float for name, value in figures.items())
    assert {"clda/kd_loss", "clda/lsr_mean", "clda/lsr_min", "clda/selected_layers"} <= set(figures)
    assert {"clda/accepted", "clda/lead", "clda/trust"} <= set(figures)
    assert figures["clda/steps"] == figures["clda/rounds"] == 2.0
    assert json.loads(json.dumps(figures)) == figures


def test_metrics_without_a_known_rate() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, threshold=lambda *_: torch.tensor(float("nan")))
    learner.distill(student(batch()), batch())
    learner.step(step_fn=nothing)
    assert learner.metrics()["clda/rounds"] == 0, "nothing is known, so there is nothing to do"


def test_the_report_is_plain_data_and_a_table() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=Average(decay=0.9), selection=LowestFraction(fraction=0.4))
    train(learner, sgd(student), 2)
    report = learner.report()
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["steps"] == 2
    assert [len(record["selected"]) for record in data["rounds"]] == [2, 2]
    assert set(data["unrelated"]) <= {"unused", *LAYERS}
    for name in report.layers:
        assert f"\n{name}" in str(report)
    assert report.rounds == learner.report().rounds


def test_the_default_strategies_are_used() -> None:
    teacher, student = networks()
    learner = CollaborativeLearner(teacher, student)
    assert isinstance(learner.saliency, Taylor)
    assert isinstance(learner.threshold, MeanThreshold)
    assert isinstance(learner.selection, DrawnFraction)
    assert isinstance(learner.trust, LinearTrust)
    assert learner.validator is None
    assert isinstance(learner.update, MaskedDistillation)
    assert isinstance(learner.schedule, Schedule)


def test_other_layers_are_reported_where_the_user_regroups() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, layers=[r"blocks", r"head"])
    assert list(one_round(learner).rates) == ["blocks", "head"]


def test_a_student_started_from_the_teacher_is_a_student() -> None:
    teacher, student = networks()
    init_student(student, teacher)
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert one_round(make_learner(teacher, student)).rates


# ----------------------------------------------------------------------------------- the smallest strategies of a user


class MySaliency:
    order = 1

    def score(self, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
        return derivative.abs()


def my_selection(target: Any, source: Any) -> Any:
    return ("head",)


def my_relation(teacher: Any, student: Any, inputs: Any) -> RelatedLayers:
    assert inputs is None
    pairs = {layer.name: layer for layer in student.layers if layer.name == "head"}
    return RelatedLayers(pairs, {layer.name: "no head" for layer in teacher.layers if layer.name != "head"})


class MyUpdate:
    needs_relation = False

    def apply(self, context: Any) -> UpdateResult:
        with torch.no_grad():
            context.teacher.head.bias.add_(1.0)
        return UpdateResult(("head",))

    def state_dict(self) -> Dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Nothing to restore."""


class MySchedule:
    def due(self, step: int) -> bool:
        return step == 2

    def observes(self, step: int) -> bool:
        return step == 2

    def strength(self, step: int) -> float:
        return 0.5


def test_the_smallest_strategy_of_every_kind_works() -> None:
    teacher, student = networks()
    before = teacher.head.bias.detach().clone()
    learner = CollaborativeLearner(
        teacher,
        student,
        saliency=MySaliency(),
        selection=my_selection,
        relation=my_relation,
        trust=lambda lead: 1.0,
        update=MyUpdate(),
        distillation=lambda s, t, mask=None: (s - t).pow(2).mean(),
        schedule=MySchedule(),
        probe=lambda logits, mask: logits.pow(2).mean(),
        layers=lambda name: name.partition(".")[0],
        extract=lambda output: output,
    )
    train(learner, sgd(student), 3)
    record = learner.report().rounds[0]
    assert (record.step, record.selected, record.updated, record.strength) == (2, ("head",), ("head",), 0.5)
    assert torch.equal(teacher.head.bias, before + 1)
    again = loaded(saved(learner.state_dict()))
    learner.load_state_dict(again)


def test_a_schedule_may_observe_before_the_round_alone() -> None:
    class Before(MySchedule):
        def observes(self, step: int) -> bool:
            return step == 1

    teacher, student = networks()
    learner = CollaborativeLearner(teacher, student, schedule=Before(), trust=FixedTrust())
    train(learner, sgd(student), 2)
    assert learner.report().rounds[0].updated


def test_an_estimator_of_the_second_order_of_a_user() -> None:
    class Curvature(MySaliency):
        order = 2

    teacher, student = networks()
    learner = make_learner(teacher, student, saliency=Curvature())
    assert one_round(learner).rates


def test_guards_wrap_updates_of_a_user() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=Guard(MyUpdate(), tolerance=10.0), selection=my_selection)
    assert one_round(learner).accepted is True


@pytest.mark.parametrize("saliency", [Taylor(), Hessian(), Magnitude()])
def test_segmenters_of_different_widths_work_as_they_are(saliency: Any) -> None:
    teacher, student = seeded(lambda: Segmenter(8), 0).eval(), seeded(lambda: Segmenter(4, 4), 1)
    learner = make_learner(teacher, student, saliency=saliency)
    assert one_round(learner, images()).rates


def test_states_of_different_learners_do_not_mix() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=MaskedDistillation())
    train(learner, sgd(student), 2)
    other = make_learner(*networks(), update=Average())
    with pytest.raises(CldaError, match="another configuration"):
        other.load_state_dict(learner.state_dict())


@pytest.mark.skipif(not hasattr(torch, "set_default_device"), reason="came with torch 2.0")
@pytest.mark.parametrize("saliency", [Taylor(), Hessian()])
def test_the_default_device_is_the_hosts_alone(saliency: Any) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, saliency=saliency, update=Guard(AlignedAverage(decay=0.5)))
    output, inputs = student(batch()), batch()
    with torch.device("meta"):
        learner.distill(output, inputs).backward()
        learner.step(step_fn=lambda: None)
        learner.load_state_dict(learner.state_dict())
    assert len(learner.report().rounds) == 1


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="the CPU has autocast from torch 1.10 on")
def test_a_step_inside_autocast_judges_the_weights_that_were_written() -> None:
    """Autocast keeps weights that it has cast; a guard that ran the model with these would see no change."""
    teacher, student = nn.Linear(6, 3), nn.Linear(6, 3)
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    far_away = Guard(
        MaskedDistillation(learning_rate=0.5), criterion=lambda now, before, _: -(now - before).abs().mean()
    )
    learner = make_learner(teacher, student, selection=AllLayers(), update=far_away)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner.distill(student(inputs), inputs).backward()
        learner.step(step_fn=lambda: None)
    (record,) = learner.report().rounds
    assert record.accepted is False
    assert record.score_after < -0.01


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="the CPU has autocast from torch 1.10 on")
def test_a_co_trained_teacher_gets_its_gradients_in_the_autocast_of_distill() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learner.distill(student(batch()), batch()) + teacher(batch()).float().pow(2).mean()
    loss.backward()
    assert teacher.stem.weight.grad is not None
    learner.step(sgd(student))
    assert len(learner.report().rounds) == 1


def test_a_students_output_without_a_graph_would_train_nothing() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    with pytest.raises(CldaError, match="no graph, so the KD loss would train nothing"):
        learner.distill(student(batch()).detach(), batch())
    with torch.no_grad():
        assert learner.distill(student(batch()), batch()) > 0


def test_a_student_that_is_larger_than_the_teacher_is_warned_of() -> None:
    student, teacher = networks()
    with pytest.warns(UserWarning, match="the student is larger than the teacher: .*pass the big model first"):
        CollaborativeLearner(teacher, student)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_teacher_takes_part_in_rounds() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    student, (plain, scripted) = nn.Linear(5, 3), (seeded(network, 0) for _ in range(2))
    scripted = torch.jit.script(scripted)
    for teacher in (plain, scripted):
        record = one_round(make_learner(teacher, student, selection=AllLayers()))
        assert record.updated == ("0", "3")
    assert values(scripted) == values(plain)


def test_integer_parameters_are_none_of_ours_but_count_for_the_size() -> None:
    student, teacher = networks()
    teacher.register_parameter("quantised", nn.Parameter(torch.zeros(1000, dtype=torch.uint8), requires_grad=False))
    teacher.register_parameter("codes", nn.Parameter(torch.arange(4), requires_grad=False))
    learner = make_learner(teacher, student, selection=AllLayers())
    learner.distill(student(batch()), batch()).backward()
    learner.step(step_fn=lambda: None)
    assert not any("codes" in name for name in learner.report().layers)
    assert torch.equal(teacher.codes, torch.arange(4))


@pytest.mark.parametrize("update", [lambda: MaskedDistillation(), lambda: Guard(MaskedDistillation()), Average])
def test_a_round_of_strength_zero_changes_nothing_and_says_so(update: Any) -> None:
    class Off(Schedule):
        def strength(self, step: int) -> float:
            return float(step < 2)

    teacher, student = networks()
    learner = make_learner(teacher, student, update=update(), schedule=Off(warmup=0, interval=1), selection=AllLayers())
    optimizer = sgd(student)
    train(learner, optimizer, 1)
    before, state = values(teacher), bits(learner.state_dict()["update"])
    train(learner, optimizer, 1, start=1)
    last = learner.report().rounds[-1]
    assert (last.strength, last.updated) == (0.0, ())
    assert set(last.skipped.values()) == {"the schedule's strength is 0"}
    assert values(teacher) == before
    assert bits(learner.state_dict()["update"]) == state


def test_repr_says_in_a_few_lines_what_the_learner_is_made_of() -> None:
    teacher, student = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), nn.Sequential(nn.Linear(4, 3))
    learner = CollaborativeLearner(teacher, student, schedule=Schedule(warmup=0, interval=1), update=Average())
    assert (
        repr(learner)
        == f"""CollaborativeLearner(
  teacher: Sequential of 67 parameters in 2 layers, 2 of them related
  student: Sequential of 15 parameters in 1 layer
  saliency: Taylor()
  threshold: MeanThreshold(multiple=1.0)
  selection: {DrawnFraction()}
  relation: ByRelativeDepth()
  validator: None
  trust: {LinearTrust()}
  update: Average(decay=0.99, buffers='keep')
  distillation: DISTDistillation(temperature=1.0, inter=1.0, intra=1.0, class_map=None)
  schedule: {Schedule(interval=1)}
  probe: PseudoLabelCrossEntropy()
  so far: 0 steps, 0 rounds
)"""
    )
    images = torch.randn(4, 4)
    learner.distill(student(images), images)
    learner.step(step_fn=lambda: None)
    assert "so far: 1 steps, 1 rounds" in repr(learner)
    shown = repr(make_learner(*networks(), relation=BySimilarity(), enabled=False))
    assert "to be related in the first round" in shown
    assert "criterion=consensus" in repr(CollaborativeLearner(teacher, student, update=Guard(Average())))
    assert "0 rounds, not enabled" in shown
