"""Bad input: a clear error of one type, and models, optimizer, learner and random states bitwise as before."""

from typing import Any, Callable, Dict

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, CollaborativeLearner, Outputs, Schedule, group_layers, init_student, teach
from clda_core.distillation import FeatureDistillation, KLDistillation, WeightedSum
from clda_core.relation import ByName, BySimilarity, Explicit, RelatedLayers
from clda_core.saliency import (
    Magnitude,
    ReferenceThreshold,
    Taylor,
)
from clda_core.selection import AllLayers, DomainShift
from clda_core.update import Average, Guard, MaskedDistillation, UpdateResult, agreement
from tests.helpers import (
    INPUTS,
    SAMPLES,
    Net,
    Segmenter,
    batch,
    bits,
    host_loss,
    images,
    loaded,
    make_learner,
    make_sam,
    networks,
    no_traces,
    nothing_changed,
    saved,
    seeded,
    sgd,
    train,
    values,
)

NAN, INF = float("nan"), float("inf")

# Some of the models that are meant to fail have hardly a parameter.
pytestmark = pytest.mark.filterwarnings("ignore:the student is larger than the teacher")


def attempt(learner: CollaborativeLearner, optimizer: Any, call: Callable[[], Any], match: str) -> None:
    """Expect an error from ``call``, and models, optimizer, learner and random states as they were."""
    with nothing_changed(learner, optimizer), pytest.raises(CldaError, match=match) as caught:
        call()
    assert "Fix: " in str(caught.value)


def usual(**options: Any) -> Any:
    """Return a learner that has made a step, its optimizer, and a student output with a graph."""
    teacher, student = networks()
    learner, optimizer = make_learner(teacher, student, **options), sgd(student)
    train(learner, optimizer, 1)
    return learner, optimizer, student(batch())


# ------------------------------------------------------------------------------------------------------------ models


def test_teacher_and_student_are_the_same_object() -> None:
    teacher, _ = networks()
    with no_traces(teacher, values_too=True), pytest.raises(CldaError, match="share parameters.*the same object twice"):
        CollaborativeLearner(teacher, teacher)


def test_teacher_and_student_share_a_parameter() -> None:
    teacher, student = networks()
    student.head = teacher.head
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match="share.*head.weight.*Fix:"):
        CollaborativeLearner(teacher, student)


def test_teacher_and_student_share_memory() -> None:
    teacher, student = networks()
    student.head.weight.data = teacher.head.weight.data
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match="share.*head.weight.*Fix:"):
        CollaborativeLearner(teacher, student)


@pytest.mark.parametrize("wrong", [None, "resnet", 3])
def test_models_that_are_none(wrong: Any) -> None:
    teacher, student = networks()
    for models, whose in (((wrong, student), "teacher"), ((teacher, wrong), "student")):
        with pytest.raises(CldaError, match=f"the {whose} is no model.*Fix:"):
            CollaborativeLearner(*models)


def test_a_model_without_parameters() -> None:
    with pytest.raises(CldaError, match="no parameters.*Fix:"):
        CollaborativeLearner(nn.ReLU(), networks()[1])


def test_no_relatable_layer() -> None:
    teacher = seeded(lambda: nn.Sequential(nn.Linear(INPUTS, 3)), 0)
    student = seeded(Net, 1)
    with no_traces(teacher, student, values_too=True), pytest.raises(
        CldaError, match="no teacher layer.*related.*Fix:"
    ):
        make_learner(teacher, student, relation=ByName(), update=Average())
    make_learner(teacher, student, relation=ByName(), update=MaskedDistillation())
    wide = seeded(lambda: nn.Sequential(nn.Linear(INPUTS, 300)), 0)
    with pytest.raises(CldaError, match="can be copied into the student.*Fix:"):
        init_student(student, wide, ByName())


def test_no_relatable_layer_by_similarity_shows_at_the_first_round_and_changes_nothing() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, relation=BySimilarity(minimum=1.0), update=Average())
    learner.distill(student(batch()), batch())
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match="no teacher layer.*Fix:"):
        learner.step(step_fn=lambda: None)


def test_an_explicit_relation_of_layers_that_do_not_exist() -> None:
    with pytest.raises(CldaError, match="perhaps .*blocks.0.*is meant"):
        make_learner(*networks(), relation=Explicit({"block.0": "stem"}), update=Average())


# ------------------------------------------------------------------------------------------------------------ distill


class Fixed(nn.Module):
    """Puts out whatever it was given to put out, at no matter what input."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


WRONG_PAIRS: Dict[str, Any] = {
    "class counts": (torch.zeros(2, 3), torch.zeros(2, 4), "class counts differ.*3 and 4"),
    "class counts of images": (torch.zeros(2, 3, 4, 4), torch.zeros(2, 19, 4, 4), "class counts differ"),
    "ranks": (torch.zeros(2, 3), torch.zeros(2, 3, 4, 4), "ranks"),
    "batch sizes": (torch.zeros(2, 3), torch.zeros(4, 3), "batch sizes"),
    "empty batch without a graph": (torch.zeros(0, 3), torch.zeros(0, 3), "output has no graph"),
    "empty teacher": (torch.zeros(2, 3), torch.zeros(0, 3), "teacher's logits are empty"),
    "NaN of the student": (torch.full((2, 3), NAN), torch.zeros(2, 3), "student's logits are not finite"),
    "infinity of the student": (torch.full((2, 3), INF), torch.zeros(2, 3), "student's logits are not finite"),
    "NaN of the teacher": (torch.zeros(2, 3), torch.full((2, 3), NAN), "teacher's logits are not finite"),
    "integers": (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), "student's logits.*shape or dtype"),
    "no class dimension": (torch.zeros(3), torch.zeros(3), "student's logits.*shape or dtype"),
    "a tuple": ((torch.zeros(2, 3),), torch.zeros(2, 3), "student's logits cannot be read.*tuple.*extract="),
    "a dict of the teacher": (torch.zeros(2, 3), {"out": torch.zeros(2, 3)}, "teacher's logits cannot be read.*dict"),
    "features that are none": (Outputs(torch.zeros(2, 3), (None,)), torch.zeros(2, 3), "tuple of tensors"),
    "features that are one tensor": (Outputs(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2, 3), "tuple of"),
}


@pytest.mark.parametrize("case", WRONG_PAIRS)
@pytest.mark.parametrize("given", ["inputs", "teacher_output"])
def test_outputs_that_do_not_fit(case: str, given: str) -> None:
    student_output, teacher_output, match = WRONG_PAIRS[case]
    learner = make_learner(Fixed(teacher_output), networks()[1])
    arguments = {"inputs": batch()} if given == "inputs" else {"teacher_output": teacher_output}
    attempt(learner, None, lambda: learner.distill(student_output, **arguments), match)


def test_neither_inputs_nor_teacher_output() -> None:
    learner, optimizer, output = usual()
    attempt(learner, optimizer, lambda: learner.distill(output), "cannot get the teacher's output.*received neither")


WRONG_MASKS: Dict[str, Any] = {
    "integers": (torch.ones(2, 4, 4, dtype=torch.int64), "integer mask is ambiguous.*mask.bool..*ignore_index="),
    "bytes": (torch.ones(2, 4, 4, dtype=torch.uint8), "integer mask is ambiguous"),
    "negative": (torch.full((2, 4, 4), -1.0), "negative or non-finite"),
    "NaN": (torch.full((2, 4, 4), NAN), "negative or non-finite"),
    "another batch size": (torch.ones(3, 4, 4, dtype=torch.bool), "mask has a wrong shape"),
    "classes": (torch.ones(2, 3, 4, 4, dtype=torch.bool), "mask has a wrong shape"),
    "a list": ([True, False], "mask is no tensor.*list"),
    "a number": (0.5, "mask is no tensor.*float"),
}


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_masks_that_do_not_fit(case: str) -> None:
    mask, match = WRONG_MASKS[case]
    teacher, student = seeded(Segmenter, 0).eval(), seeded(Segmenter, 1)
    learner = make_learner(teacher, student)
    output = student(images())
    attempt(learner, None, lambda: learner.distill(output, images(), mask=mask), match)


def test_inputs_of_another_dtype_than_the_teachers() -> None:
    learner, optimizer, output = usual()
    wide = batch().double()
    attempt(learner, optimizer, lambda: learner.distill(output, wide), "float64 on cpu.*Fix: move the inputs")
    attempt(learner, optimizer, lambda: learner.distill(output, {"x": wide}), "float64 on cpu.*Fix: move the inputs")


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="the meta device stands in for another one since torch 2")
def test_tensors_on_another_device() -> None:
    learner, optimizer, output = usual()
    elsewhere = batch().to("meta")
    attempt(learner, optimizer, lambda: learner.distill(output, elsewhere), "on meta.*Fix: move the inputs")
    logits = learner.teacher(batch()).detach()
    attempt(learner, optimizer, lambda: learner.distill(output, teacher_output=logits.to("meta")), "devices")
    mask = torch.ones(SAMPLES, device="meta")
    attempt(learner, optimizer, lambda: learner.distill(output, batch(), mask=mask), "different devices")


def test_a_model_that_fails_for_another_reason_fails_with_its_own_error() -> None:
    learner, optimizer, output = usual()
    with nothing_changed(learner, optimizer), pytest.raises(RuntimeError, match="shape") as caught:
        learner.distill(output, torch.zeros(SAMPLES, INPUTS + 1))
    assert not isinstance(caught.value, CldaError)


# ----------------------------------------------------------------------------------------------------------- stepping


@pytest.mark.parametrize("wrong", [None, 3, "sgd", nn.Linear(1, 1)])
def test_nothing_to_step(wrong: Any) -> None:
    learner, optimizer, output = usual()
    attempt(learner, optimizer, lambda: learner.step(wrong), "there is nothing to step")


def test_a_sam_optimizer_without_step_fn() -> None:
    learner, _, output = usual()
    sam = make_sam()(list(learner.student.head.parameters()), torch.optim.SGD, lr=0.1)
    learner.distill(output, batch()).backward()
    attempt(learner, sam, lambda: learner.step(sam), "SAM makes two steps.*Fix: call learner.step.step_fn=")


def test_a_step_fn_or_scaler_that_is_none() -> None:
    learner, optimizer, _ = usual()
    attempt(learner, optimizer, lambda: learner.step(step_fn=3), "step_fn cannot be called")
    attempt(learner, optimizer, lambda: learner.step(optimizer, scaler=1024.0), "scaler cannot step")
    attempt(learner, optimizer, lambda: learner.step(optimizer, scaler=optimizer, step_fn=print), "both scaler=")
    attempt(learner, optimizer, lambda: learner.step(optimizer, stepped=True), "cannot ask stepped=.*received bool")
    scaled = lambda: learner.step(optimizer, scaler=optimizer, stepped=print)  # noqa: E731
    attempt(learner, optimizer, scaled, "cannot ask stepped=.*received a scaler beside it")


def test_after_step_without_observe() -> None:
    learner, optimizer, output = usual()
    learner.distill(output, batch())
    attempt(learner, optimizer, learner.after_step, "after_step.. came without observe..*Fix: call learner.observe")


def test_observe_serves_one_step() -> None:
    learner, optimizer, output = usual()
    learner.distill(output, batch())
    learner.observe()
    learner.after_step()
    attempt(learner, optimizer, learner.after_step, "came without observe")


def test_the_users_optimizer_raises() -> None:
    learner, optimizer, output = usual()

    class Broken:
        def step(self) -> None:
            raise ZeroDivisionError("theirs")

    learner.distill(output, batch())
    with nothing_changed(learner, optimizer), pytest.raises(
        CldaError, match="raised ZeroDivisionError: theirs"
    ) as caught:
        learner.step(Broken())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    train(learner, optimizer, 1)
    assert learner.report().steps == 2, "the failed step was not counted"


# ----------------------------------------------------------------------------------------------------------- observing

WRONG_LOSSES: Dict[str, Any] = {
    "a number": (1.0, "cannot use this loss.*float"),
    "text": ("loss", "cannot use this loss.*str"),
    "no graph": (torch.tensor(1.0), "loss given to observe.*requires_grad=False.*pass a function"),
    "no scalar": (torch.ones(2, requires_grad=True), "loss given to observe.*shape"),
    "not of the teacher": (torch.ones((), requires_grad=True) * 2, "does not depend on the teacher"),
    "a function that returns None": (lambda model: None, "function given to observe.*NoneType"),
    "a function that returns a number": (lambda model: 1.0, "function given to observe.*float"),
    "a function that returns logits": (lambda model: model(batch()), "function given to observe.*shape .64, 3."),
    "a function that detaches": (lambda model: model(batch()).sum().detach(), "function given to observe"),
    "a function of something else": (
        lambda model: torch.ones((), requires_grad=True) * 2,
        "does not depend on the teacher",
    ),
}


@pytest.mark.parametrize("case", WRONG_LOSSES)
@pytest.mark.parametrize("domain", ["target", "source"])
def test_losses_that_cannot_be_observed(case: str, domain: str) -> None:
    loss, match = WRONG_LOSSES[case]
    learner, optimizer, _ = usual()
    attempt(learner, optimizer, lambda: learner.observe(loss, domain=domain), match)
    attempt(learner, optimizer, learner.after_step, "came without observe")


def test_a_loss_whose_graph_is_gone() -> None:
    learner, optimizer, _ = usual()
    loss = learner.teacher(batch()).pow(2).sum()
    loss.backward()
    attempt(learner, optimizer, lambda: learner.observe(loss), "graph .* is gone.*Fix: call observe.loss. before")


def test_an_unknown_domain() -> None:
    learner, optimizer, _ = usual()
    attempt(learner, optimizer, lambda: learner.observe(domain="validation"), "domain is unknown")


def test_source_data_without_a_loss() -> None:
    learner, optimizer, output = usual()
    learner.distill(output, batch())
    attempt(learner, optimizer, lambda: learner.observe(domain="source"), "nothing to observe on source data")


@pytest.mark.parametrize("options", [{"selection": DomainShift()}, {"threshold": ReferenceThreshold()}])
def test_no_source_data_where_it_is_needed(options: Dict[str, Any]) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, **options)
    learner.distill(student(batch()), batch())
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match="no source data.*Fix:"):
        learner.step(step_fn=lambda: None)


def test_the_update_needs_inputs_that_were_not_given() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, saliency=Magnitude())
    learner.distill(student(batch()), teacher_output=teacher(batch()))
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match="target batch.*Fix:"):
        learner.step(step_fn=lambda: None)


# ------------------------------------------------------------------------------------------- strategies of wrong kinds

NO_STRATEGIES = ["saliency", "threshold", "selection", "relation", "update", "distillation", "schedule", "probe"]


@pytest.mark.parametrize("role", NO_STRATEGIES)
@pytest.mark.parametrize("wrong", ["default", 3, Taylor, object()])
def test_strategies_that_are_none(role: str, wrong: Any) -> None:
    teacher, student = networks()
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match=f"{role}= is no {role}.*Fix:"):
        CollaborativeLearner(teacher, student, **{role: wrong})


def test_an_extract_or_a_grouping_that_is_none() -> None:
    with pytest.raises(CldaError, match="extract cannot be called.*Fix:"):
        CollaborativeLearner(*networks(), extract="logits")
    with pytest.raises(CldaError, match="grouping is of a wrong type.*Fix:"):
        CollaborativeLearner(*networks(), layers=r"blocks\.\d+")
    with pytest.raises(CldaError, match="grouping failed for parameter.*Fix:"):
        CollaborativeLearner(*networks(), layers=lambda name: 3)
    with pytest.raises(CldaError, match="leaves every parameter out.*Fix:"):
        CollaborativeLearner(*networks(), layers=["no such layer"])
    assert group_layers(networks()[0])


class Answer:
    """A strategy of any role that returns what it was told to."""

    needs_relation, needs_inputs = False, False

    def __init__(self, order: int = 1, **answers: Any) -> None:
        self.order, self.answers = order, answers

    def _answer(self, name: str, default: Any) -> Any:
        answer = self.answers.get(name, default)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def score(self, parameter: Tensor, derivative: Any) -> Any:
        answer = self._answer("score", parameter.abs())
        return answer(parameter) if callable(answer) else answer

    def __call__(self, *_: Any) -> Any:
        return self._answer("call", None)

    def apply(self, context: Any) -> Any:
        with torch.no_grad():
            for name, parameter in context.teacher.named_parameters():
                if any(name in layer.parameters for layer in context.layers):
                    parameter.add_(1)
        return self._answer("apply", UpdateResult(()))

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Nothing."""

    def due(self, step: int) -> Any:
        return self._answer("due", True)

    def observes(self, step: int) -> Any:
        return self._answer("observes", True)

    def strength(self, step: int) -> Any:
        return self._answer("strength", 1.0)


class HalfAState:
    """An update that saves and cannot restore."""

    def apply(self, context: Any) -> Any:
        """Not called."""

    def state_dict(self) -> Any:
        return {"moments": torch.zeros(1)}


def test_an_update_with_half_a_state_is_refused() -> None:
    with pytest.raises(CldaError, match=r"update= is no update.*without \['load_state_dict'\]"):
        make_learner(*networks(), update=HalfAState())
    with pytest.raises(CldaError, match=r"update= is no update.*without \['load_state_dict'\]"):
        Guard(HalfAState())
    with pytest.raises(CldaError, match=r"update= is no update.*Average.*pass an instance"):
        Guard(Average)


RAISED = ZeroDivisionError("theirs")
WRONG_ANSWERS: Dict[str, Any] = {
    "extract: a dict": (lambda: {"extract": lambda output: {"logits": output}}, "dict from extract="),
    "extract: None": (lambda: {"extract": lambda output: None}, "NoneType from extract="),
    "extract: labels": (lambda: {"extract": lambda output: output.argmax(1)}, "extract= misreads"),
    "distillation: None": (lambda: {"distillation": lambda s, t, m: None}, "distillation loss is no scalar"),
    "distillation: no scalar": (lambda: {"distillation": lambda s, t, m: s}, "distillation loss is no scalar"),
    "distillation: reads": (lambda: {"distillation": Reading()}, "reads is unknown"),
    "distillation: features": (lambda: {"distillation": FeatureDistillation()}, "features cannot be paired"),
    "probe: None": (lambda: {"probe": lambda z, m: None}, "probe returned"),
    "probe: no scalar": (lambda: {"probe": lambda z, m: z}, "probe returned"),
    "probe: no graph": (lambda: {"probe": lambda z, m: z.sum().detach()}, "probe returned"),
    "saliency: None": (lambda: {"saliency": Answer(score=lambda p: None)}, "returned no scores for 'stem.weight'"),
    "saliency: a number": (lambda: {"saliency": Answer(score=lambda p: p.sum())}, "returned no scores"),
    "saliency: negative": (lambda: {"saliency": Answer(score=lambda p: -p.abs() - 1)}, "negative scores"),
    "threshold: None": (lambda: {"threshold": lambda *_: None}, "threshold .* something else"),
    "threshold: a number": (lambda: {"threshold": lambda *_: 0.5}, "threshold .* something else"),
    "threshold: a vector": (lambda: {"threshold": lambda *_: torch.ones(2)}, "something else"),
    "selection: None": (lambda: {"selection": Answer(call=None)}, "selection returned something else"),
    "selection: text": (lambda: {"selection": Answer(call="head")}, "selection returned something else"),
    "selection: unknown": (lambda: {"selection": Answer(call=("nothing",))}, "selection returned something else"),
    "selection: never seen": (lambda: {"selection": Answer(call=("unused",))}, "selection returned something else"),
    "selection: no names": (lambda: {"selection": Answer(call=[["head"]])}, "selection returned something else"),
    "relation: None": (lambda: {"relation": Answer(call=None)}, "relation returned something else"),
    "relation: a dict": (lambda: {"relation": Answer(call={"head": "head"})}, "relation returned something else"),
    "relation: names": (lambda: {"relation": Answer(call=RelatedLayers({"head": "head"}))}, "relation returned"),
    "relation: unknown": (
        lambda: {"relation": Answer(call=RelatedLayers({"nothing": group_layers(networks()[1])[0]}))},
        "relation returned",
    ),
    "update: None": (lambda: {"update": Answer(apply=None)}, "Answer raised CldaError: apply.. returned"),
    "update: unknown": (lambda: {"update": Answer(apply=UpdateResult(("nothing",)))}, "apply.. returned"),
    "update: raises": (lambda: {"update": Answer(apply=RAISED)}, "Answer raised ZeroDivisionError: theirs"),
    "criterion: a number": (lambda: {"update": Guard(Answer(), criterion=lambda *_: 0.5)}, "criterion returned"),
    "criterion: None": (lambda: {"update": Guard(Answer(), criterion=lambda *_: None)}, "criterion returned"),
    "criterion: no scalar": (lambda: {"update": Guard(Answer(), criterion=lambda t, *_: t)}, "criterion returned"),
    "criterion: raises": (lambda: {"update": Guard(Answer(), criterion=failing)}, "raised ZeroDivisionError"),
    "strength: above 1": (lambda: {"schedule": Answer(strength=1.5)}, "strength is out of range"),
    "strength: NaN": (lambda: {"schedule": Answer(strength=NAN)}, "strength is not a finite number"),
    "strength: None": (lambda: {"schedule": Answer(strength=None)}, "strength is not a finite number"),
    "optimizer: None": (
        lambda: {"update": MaskedDistillation(optimizer=lambda parameters: None)},
        "does not hold|raised",
    ),
}


class Reading:
    reads = "attention"

    def __call__(self, *_: Any) -> Any:
        """Never called."""


def failing(*_: Any, **__: Any) -> Any:
    raise RAISED


def distil_and_step(learner: CollaborativeLearner, output: Tensor) -> None:
    learner.distill(output, batch())
    learner.step(step_fn=lambda: None)


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_callables_that_return_the_wrong_thing(case: str) -> None:
    make, match = WRONG_ANSWERS[case]
    teacher, student = networks()
    output = student(batch())
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match=match) as caught:
        distil_and_step(make_learner(teacher, student, **{"selection": AllLayers(), **make()}), output)
    assert "Fix: " in str(caught.value)


RAISING: Dict[str, Callable[[], Dict[str, Any]]] = {
    "extract": lambda: {"extract": failing},
    "distillation": lambda: {"distillation": failing},
    "probe": lambda: {"probe": failing},
    "saliency": lambda: {"saliency": Answer(score=failing)},
    "threshold": lambda: {"threshold": failing},
    "selection": lambda: {"selection": Answer(call=RAISED)},
    "relation": lambda: {"relation": Answer(call=RAISED)},
    "strength": lambda: {"schedule": Answer(strength=RAISED)},
    "due": lambda: {"schedule": Answer(due=RAISED)},
    "layers": lambda: {"layers": failing},
}


@pytest.mark.parametrize("case", RAISING)
def test_callables_that_raise_leave_everything_as_it_was(case: str) -> None:
    """Their own exception passes; only those from within an update and an optimizer step are explained."""
    teacher, student = networks()
    teacher.blocks[0].train()
    output = student(batch())
    with no_traces(teacher, student, values_too=True), pytest.raises(ZeroDivisionError, match="theirs"):
        distil_and_step(make_learner(teacher, student, **RAISING[case]()), output)


class Breaking:
    """A strategy that fails as long as it is told to."""

    def __init__(self, working: Any, broken: Any) -> None:
        self.working, self.broken, self.fails = working, broken, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.broken if self.fails else self.working, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self.broken if self.fails else self.working)(*arguments, **named)


@pytest.mark.parametrize("case", ["selection", "update", "criterion"])
def test_a_failed_round_is_no_obstacle_to_the_next(case: str) -> None:
    breaking = {
        "selection": Breaking(AllLayers(), Answer(call=("nothing",))),
        "update": Breaking(Average(decay=0.9), Answer(apply=None)),
        "criterion": Breaking(agreement, failing),
    }[case]
    strategies = {"selection": AllLayers(), "update": Average(decay=0.9)}
    strategies.update({"update": Guard(Average(), criterion=breaking)} if case == "criterion" else {case: breaking})
    teacher, student = networks()
    learner = make_learner(teacher, student, **strategies)
    with pytest.raises(CldaError, match="selection|Breaking|Guard"):
        distil_and_step(learner, student(batch()))
    breaking.fails = False
    distil_and_step(learner, student(batch()))
    assert learner.report().steps == 2
    assert len(learner.report().rounds) == 1


# ----------------------------------------------------------------------------------------------------------- states


def state_after(steps: int = 2, **options: Any) -> Dict[str, Any]:
    teacher, student = networks()
    learner = make_learner(teacher, student, **options)
    train(learner, sgd(student), steps)
    return loaded(saved(learner.state_dict()))


def changed(state: Dict[str, Any], key: str, value: Any) -> Dict[str, Any]:
    return {**state, key: value}


def without(state: Dict[str, Any], key: str) -> Dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def with_observer(**changes: Any) -> Dict[str, Any]:
    state = state_after()
    return changed(state, "observer", {**state["observer"], **changes})


WRONG_STATES: Dict[str, Any] = {
    "no state": (lambda: None, "cannot be read"),
    "a list": (lambda: [1], "cannot be read"),
    "empty": (dict, "cannot be read"),
    "of a model": (lambda: networks()[0].state_dict(), "cannot be read"),
    "of version 0": (lambda: changed(state_after(), "version", 0), "cannot be read.*received version 0"),
    "of no version": (lambda: without(state_after(), "version"), "cannot be read.*received version None"),
    "of version 1, with nothing in it": (lambda: {"version": 1}, "cannot be read.*version 1.*KeyError: 'config'"),
    "a key too few": (lambda: without(state_after(), "observer"), "cannot be read"),
    "a key too many": (lambda: changed(state_after(), "more", 1), "cannot be read"),
    "another architecture": (
        lambda: make_learner(*networks(teacher_depth=5)).state_dict(),
        "another architecture.*teacher_layers",
    ),
    "another student": (lambda: make_learner(*networks(student_depth=1)).state_dict(), "another architecture.*student"),
    "another saliency": (lambda: state_after(saliency=Magnitude()), "another configuration.*saliency"),
    "another temperature": (
        lambda: state_after(distillation=KLDistillation(temperature=1.5)),
        "another configuration.*distillation",
    ),
    "another schedule": (lambda: state_after(schedule=Schedule(warmup=0, interval=2)), "configuration.*schedule"),
    "config of a wrong type": (lambda: changed(state_after(), "config", 3), "another"),
    "steps of a wrong type": (lambda: changed(state_after(), "steps", "many"), "cannot be loaded.*ValueError"),
    "history of a wrong form": (lambda: changed(state_after(), "history", [{"step": 1}]), "cannot be loaded"),
    "observations of another size": (
        lambda: with_observer(
            averages={
                "sums": {"target": torch.zeros(3)},
                "counts": {"target": torch.zeros(3)},
                "known": None,
                "reference": None,
                "reference_frozen": False,
                "last": None,
            },
        ),
        "observations do not fit",
    ),
    "observations cut": (lambda: with_observer(averages={}), "cannot be loaded.*KeyError"),
    "a generator cut": (lambda: with_observer(generator=torch.zeros(3, dtype=torch.uint8)), "cannot be loaded"),
    "another relation": (lambda: changed(state_after(), "relation", {"pairs": {}, "unrelated": {}}), "relation"),
    "an update cut": (lambda: changed(state_after(), "update", 3), "cannot be loaded"),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_states_that_do_not_fit(case: str) -> None:
    make, match = WRONG_STATES[case]
    wrong = make()
    learner, optimizer, _ = usual()
    attempt(learner, optimizer, lambda: learner.load_state_dict(wrong), match)


def featured() -> CollaborativeLearner:
    def extract(logits: Tensor) -> Outputs:
        return Outputs(logits, (logits,))

    distillation = WeightedSum([(1.0, KLDistillation()), (1.0, FeatureDistillation())])
    return make_learner(*networks(), distillation=distillation, extract=extract)


@pytest.mark.parametrize("fresh", [True, False])
def test_projectors_of_a_wrong_form_change_nothing(fresh: bool) -> None:
    learner = featured()
    train(learner, sgd(learner.student), 2)
    state = loaded(saved(learner.state_dict()))
    other = featured()
    if not fresh:
        train(other, sgd(other.student), 1)
    module = state["projectors"]["module"]
    name = next(name for name in module if name.endswith("weight"))
    for wrong_module in ({name: module[name]}, {**module, name: torch.zeros(7, 2)}, {"x": 1}):
        wrong = changed(state, "projectors", {**state["projectors"], "module": wrong_module})
        attempt(other, None, lambda wrong=wrong: other.load_state_dict(wrong), "cannot be loaded")


def test_a_good_state_loads_after_a_bad_one() -> None:
    state = state_after()
    learner, _, _ = usual()
    with pytest.raises(CldaError, match="cannot be loaded"):
        learner.load_state_dict(changed(state, "observer", {}))
    learner.load_state_dict(state)
    assert bits(learner.state_dict()) == bits(state)


# ------------------------------------------------------------------------------------------------------- the rest


def test_a_guard_rejects_what_it_cannot_compare() -> None:
    scores = iter([0.0, NAN])
    teacher, student = networks()
    guard = Guard(Average(decay=0.5), criterion=lambda *_: torch.tensor(next(scores)), backtracks=0)
    learner = make_learner(teacher, student, update=guard, selection=AllLayers())
    before = values(teacher)
    distil_and_step(learner, student(batch()))
    assert learner.report().rounds[0].accepted is False
    assert learner.report().rounds[0].score_after is None
    assert "clda/score_after" not in learner.metrics()
    assert values(teacher) == before


def test_a_host_with_a_non_finite_loss_is_not_our_business() -> None:
    learner, optimizer, output = usual()
    learner.distill(output, batch())
    (host_loss(learner.student, 0) * NAN).backward()
    learner.step(step_fn=lambda: None)
    assert learner.report().discarded == 0


def test_the_teachers_output_in_the_place_of_the_inputs() -> None:
    learner, optimizer, output = usual()
    logits = torch.zeros_like(output)
    attempt(
        learner, optimizer, lambda: learner.distill(output, logits), "shape of the student's logits.*teacher_output="
    )


def test_a_whole_batch_with_its_labels() -> None:
    learner, optimizer, output = usual()
    whole = (batch(), torch.zeros(SAMPLES, dtype=torch.int64))
    attempt(learner, optimizer, lambda: learner.distill(output, whole), "received tuple of 2.*pass images_t alone")


def test_one_tensor_in_the_place_of_batches() -> None:
    teacher, student = networks()
    with no_traces(teacher, student, values_too=True), pytest.raises(
        CldaError, match="items would be taken for batches"
    ):
        teach(teacher, student, batch())
