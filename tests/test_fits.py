"""Outputs that are no class scores are refused where that can be seen; in their right form they are not."""

from typing import Any, Dict, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, CollaborativeLearner, Never, Outputs
from clda_core.distillation import AttentionTransfer, FeatureDistillation, KLDistillation, WeightedSum
from tests.helpers import batch, networks

Tokens = torch.arange(28).reshape(4, 7) % 11


class Tagger(nn.Module):
    """Class scores for every token, ``(N, L, C)``, as models of sequences give them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.rest, self.head = nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(self.embed(x)).relu())


@pytest.mark.parametrize("width", [6, 7], ids=["", "a layer as wide as the sequence is long"])
def test_classes_in_the_last_dimension_are_refused_and_transposed_ones_distilled(width: int) -> None:
    teacher, student = Tagger(width + 4), Tagger(width)
    learner = CollaborativeLearner(teacher, student)
    with pytest.raises(CldaError, match=r"classes in the last dimension.*\(4, 7, 5\).*transpose"):
        learner.distill(student(Tokens), Tokens)
    with pytest.raises(CldaError, match="classes in the last dimension"):
        learner.distill(Outputs(student(Tokens)), Tokens)
    learner = CollaborativeLearner(teacher, student, extract=lambda output: output.transpose(1, 2))
    assert learner.distill(student(Tokens), Tokens).item() > 0


def distilled_tokens(loss: Any, transposed: bool) -> Tensor:
    teacher, student = Tagger(16), Tagger(6)

    def output(tagger: Tagger) -> Outputs:
        tokens = tagger.rest(tagger.embed(Tokens))
        return Outputs(tagger(Tokens).transpose(1, 2), (tokens.transpose(1, 2) if transposed else tokens,))

    learner = CollaborativeLearner(teacher, student, distillation=WeightedSum([(1.0, loss)]), schedule=Never())
    return learner.distill(output(student), teacher_output=output(teacher))


@pytest.mark.parametrize("loss", [FeatureDistillation(), AttentionTransfer()])
def test_features_with_channels_in_the_last_dimension_are_refused_and_transposed_ones_distilled(loss: Any) -> None:
    with pytest.raises(CldaError, match=r"student's features.*channels in the last dimension.*\(4, 7, 6\).*transpose"):
        distilled_tokens(loss, transposed=False)
    assert distilled_tokens(loss, transposed=True).item() > 0


class Windows(nn.Module):
    """As Swin: a grid of tokens with the channels in the last dimension, and logits from a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Outputs:
        grid = self.embed(x.permute(0, 2, 3, 1))
        return Outputs(self.head(grid), (grid,))


def turned(outputs: Outputs, *, logits: bool = True, features: bool = True) -> Outputs:
    return Outputs(
        outputs.logits.permute(0, 3, 1, 2) if logits else outputs.logits,
        tuple(one.permute(0, 3, 1, 2) if features else one for one in outputs.features),
    )


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 3)], ids=["square", "the width by far the longest"])
def test_grids_with_channels_in_the_last_dimension_are_refused_and_turned_ones_distilled(
    height: int, width: int
) -> None:
    teacher, student = Windows(32), Windows(16)
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    loss = WeightedSum([(1.0, FeatureDistillation())])
    learner = CollaborativeLearner(teacher, student, distillation=loss, schedule=Never())
    with pytest.raises(CldaError, match=rf"student's features.*last dimension.*\(2, {height}, {width}, 16\).*permute"):
        learner.distill(turned(student(x), features=False), teacher_output=turned(teacher(x)))
    with pytest.raises(CldaError, match=r"teacher's features.*last dimension.*permute"):
        learner.distill(turned(student(x)), teacher_output=turned(teacher(x), features=False))
    assert learner.distill(turned(student(x)), teacher_output=turned(teacher(x))).item() > 0


def test_maps_with_classes_in_the_last_dimension_are_refused() -> None:
    teacher, student = Windows(32), Windows(16)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    learner = CollaborativeLearner(teacher, student)
    with pytest.raises(CldaError, match=r"classes in the last dimension.*\(2, 4, 4, 5\).*permute\(0, 3, 1, 2\)"):
        learner.distill(student(x).logits, teacher_output=turned(teacher(x)).logits)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (64, 64), (16, 64)])
def test_maps_of_convolutions_are_distilled_whatever_their_size(height: int, width: int) -> None:
    """Also where no layer has as many channels as two maps that were concatenated, and one as many as a map is wide."""

    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 64, 1)
            self.head = nn.Conv2d(80, 5, 1)

        def forward(self, x: Tensor) -> Outputs:
            both = torch.cat([self.one(x), self.other(x)], 1)
            return Outputs(self.head(both), (both,))

    teacher, student = Concatenated(), Concatenated()
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    loss = WeightedSum([(1.0, FeatureDistillation()), (1.0, KLDistillation())])
    learner = CollaborativeLearner(teacher, student, distillation=loss, schedule=Never())
    assert learner.distill(student(x), teacher_output=teacher(x)).item() > 0


def test_a_loss_of_the_users_own_may_read_features_as_it_likes() -> None:
    def loss(student: Any, teacher: Any, mask: Any) -> Tensor:
        return student[0].pow(2).mean()

    loss.reads = "features"  # type: ignore[attr-defined]
    assert distilled_tokens(loss, transposed=False).item() > 0


def test_signals_with_classes_in_dimension_1_are_distilled() -> None:
    teacher, student = (nn.Sequential(nn.Conv1d(3, 7, 1), nn.Conv1d(7, 5, 1)) for _ in range(2))
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    assert CollaborativeLearner(teacher, student).distill(student(x), x).item() > 0


class Configured(nn.Linear):
    """As a model of transformers."""

    class Config(NamedTuple):
        problem_type: Any

    def __init__(self, problem_type: Any, classes: int = 4) -> None:
        super().__init__(5, classes)
        self.config = self.Config(problem_type)


@pytest.mark.parametrize("task", ["regression", "multi_label_classification"])
def test_tasks_without_exclusive_classes_are_refused(task: str) -> None:
    teacher, student = Configured(task), Configured(task)
    with pytest.raises(CldaError, match=f"no scores of classes.*{task}"):
        CollaborativeLearner(teacher, student).distill(student(batch()), batch())
    own = CollaborativeLearner(
        teacher, student, schedule=Never(), distillation=lambda s, t, mask=None: (s - t).pow(2).mean()
    )
    assert own.distill(student(batch()), batch()).item() > 0, "a loss of one's own may serve them"
    teacher, student = Configured("single_label_classification"), Configured(None)
    assert CollaborativeLearner(teacher, student).distill(student(batch()), batch()).item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4, 7), (2, 19, 6, 6)])
def test_probabilities_are_refused_and_their_logarithms_distilled(shape: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p, of_teacher = logits.softmax(1).to(dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    learner = CollaborativeLearner(*networks(), schedule=Never())
    with pytest.raises(CldaError, match="student's logits seem to be probabilities"):
        learner.distill(p, teacher_output=of_teacher)
    with pytest.raises(CldaError, match="teacher's logits seem to be probabilities"):
        learner.distill(logits, teacher_output=of_teacher.softmax(1))
    assert learner.distill(p.float().log(), teacher_output=of_teacher).item() > 0
    own = CollaborativeLearner(*networks(), schedule=Never(), distillation=lambda s, t, mask: (s - t).pow(2).mean())
    assert own.distill(p, teacher_output=of_teacher).item() > 0


def test_a_softmax_in_eval_mode_alone_is_refused_at_the_first_step() -> None:
    class Classifier(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else super().forward(x).softmax(1)

    teacher, student = nn.Linear(5, 4), Classifier(5, 4)
    learner = CollaborativeLearner(teacher, student)
    learner.distill(student(batch()), batch()).backward()
    with pytest.raises(CldaError, match="student's logits seem to be probabilities"):
        learner.observe()


def test_one_output_is_a_regression() -> None:
    teacher, student = nn.Linear(5, 1), nn.Linear(5, 1)
    with pytest.raises(CldaError, match="no scores of classes.*regression.*two logits"):
        CollaborativeLearner(teacher, student).distill(student(batch()), batch())


def test_detections_are_refused() -> None:
    teacher, student = nn.Linear(5, 3), nn.Linear(5, 3)

    def detect(model: nn.Module) -> Dict[str, Tensor]:
        logits = model(torch.ones(2, 4, 5))
        return {"logits": logits, "pred_boxes": logits}

    learner = CollaborativeLearner(teacher, student, extract=lambda output: output["logits"])
    with pytest.raises(CldaError, match="detects objects"):
        learner.distill(detect(student), teacher_output=detect(teacher))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -gradient


NAMES = ["GradientReverseFunction", "ReverseLayerF", "GradReverse", "RevGrad", "GRL", "GR", "_GradientScalarReversal"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_behind_a_gradient_reversal_are_refused(name: str) -> None:
    teacher, student = networks()
    reverse = type(name, (Reversal,), {}).apply
    learner = CollaborativeLearner(teacher, student, schedule=Never())
    with pytest.raises(CldaError, match=f"gradient reversal.*{name}"):
        learner.distill(student.head(reverse(student.features(batch())[-1])), batch())


def test_a_loss_that_is_read_first_does_not_hide_a_gradient_reversal() -> None:
    teacher, student = networks()
    learner = CollaborativeLearner(teacher, student, schedule=Never())
    reverse = type("GradReverse", (Reversal,), {}).apply
    with torch.no_grad():
        learner.distill(student(batch()), batch())
    with pytest.raises(CldaError, match=r"gradient reversal.*GradReverse"):
        learner.distill(student.head(reverse(student.features(batch())[-1])), batch())


@pytest.mark.parametrize("name", ["ReversibleFunction", "GroupNormFn", "GridSample", "Grouped"])
def test_other_functions_of_a_hosts_own_are_not_taken_for_reversals(name: str) -> None:
    teacher, student = networks()
    function = type(name, (Reversal,), {}).apply
    learner = CollaborativeLearner(teacher, student, schedule=Never())
    assert learner.distill(student.head(function(student.features(batch())[-1])), batch()).item() > 0
