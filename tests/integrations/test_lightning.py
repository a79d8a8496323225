"""Real runs of Lightning's Trainer, on the CPU."""

import signal
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core.lead import FixedTrust
from clda_core.selection import AllLayers
from clda_core.update import Average
from tests.helpers import WithParameter, batch, bits, labels, make_sam, networks, traces, values

pytest.importorskip("lightning", reason="an integration with Lightning needs Lightning")
import lightning.pytorch as lightning
from lightning.pytorch.plugins import MixedPrecision

from clda_core.integrations.lightning import CollaborationCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own: few workers, no logger, short epochs


class Module(lightning.LightningModule):
    """A host: a supervised loss on source data, and KD on target data."""

    def __init__(self, learner: CollaborativeLearner, overflow_at: int = -1) -> None:
        super().__init__()
        self.student = learner.student
        self.__dict__["learner"] = learner
        self.overflow_at = overflow_at

    def training_step(self, data: List[Tensor], index: int) -> Tensor:
        source, target, classes = data
        loss = F.cross_entropy(self.student(source), classes) + self.learner.distill(self.student(target), target)
        return loss * float("inf") if index == self.overflow_at else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(batch(0, 24), batch(1, 24), labels(2, 24)), batch_size=4)


def learner_for(**options: Any) -> CollaborativeLearner:
    teacher, student = networks()
    for module in student.modules():  # Lightning does not save the random state that dropout draws from
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    strategies = {
        "schedule": Schedule(warmup=1, interval=2),
        "trust": FixedTrust(),
        "update": Average(decay=0.8),
        "selection": AllLayers(),
    }
    return CollaborativeLearner(teacher, student, **{**strategies, **options})


def fit(learner: CollaborativeLearner, folder: Path, resume: Any = None, overflow_at: int = -1, **options: Any) -> Any:
    settings: Dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        **{**settings, **options},
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CollaborationCallback(learner)],
    )
    trainer.fit(Module(learner, overflow_at), loader(), ckpt_path=resume)
    return trainer


def test_every_optimizer_step_is_one_of_the_learner(tmp_path: Path) -> None:
    learner = learner_for()
    before = values(learner.teacher)
    attributes = traces(learner.student)["stem: attributes"]
    trainer = fit(learner, tmp_path)
    assert learner.report().steps == trainer.global_step == 6
    assert [record.step for record in learner.report().rounds] == [3, 5]
    assert values(learner.teacher) != before
    assert traces(learner.student)["stem: attributes"] == attributes
    assert "step" not in vars(trainer.optimizers[0])


def test_a_disabled_learner_leaves_the_host_alone(tmp_path: Path) -> None:
    learner, alone = learner_for(enabled=False), learner_for(enabled=False)
    fit(learner, tmp_path)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Module(alone), loader())
    assert values(learner.student) == values(alone.student)


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]
)
def test_whatever_the_engine_does_steps_are_counted(options: Dict[str, Any], tmp_path: Path) -> None:
    learner = learner_for()
    trainer = fit(learner, tmp_path, **options)
    steps = 3 if "accumulate_grad_batches" in options else 6
    assert learner.report().steps == trainer.global_step == steps
    assert [record.step for record in learner.report().rounds] == [3, 5][: steps // 2]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        optimizer = lambda self: torch.optim.Adam(self.student.parameters(), fused=True)  # noqa: E731
        monkeypatch.setattr(Module, "configure_optimizers", optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = scaler  # Lightning builds one for fp16 on CUDA only
    learner = learner_for()
    trainer = fit(learner, tmp_path, overflow_at=2, plugins=[plugin])
    assert trainer.global_step == 6, "Lightning counts it"
    assert learner.report().steps == 5
    assert learner.report().discarded == 0
    assert scaler.get_scale() == 512.0


def test_parameters_of_the_loss_train_with_unscaled_gradients(tmp_path: Path) -> None:
    scaled, plain = (learner_for(distillation=WithParameter()) for _ in range(2))
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(scaled, tmp_path, plugins=[plugin])
    fit(plain, tmp_path, precision="bf16-mixed")
    assert WithParameter.moments(scaled) == pytest.approx(WithParameter.moments(plain), rel=0.1)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = learner_for()
    fit(whole, tmp_path / "whole", max_epochs=2)
    first = learner_for()
    trainer = fit(first, tmp_path / "first", enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = learner_for()
    fit(resumed, tmp_path / "second", tmp_path / "last.ckpt", max_epochs=2)
    assert values(resumed.teacher) == values(whole.teacher)
    assert values(resumed.student) == values(whole.student)
    assert bits(resumed.state_dict()) == bits(whole.state_dict())
    assert not [name for name in torch.load(tmp_path / "last.ckpt")["state_dict"] if "teacher" in name]


def test_metrics_reach_the_loggers(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    learner = learner_for()
    fit(learner, tmp_path, logger=CSVLogger(str(tmp_path)), log_every_n_steps=2)
    (file,) = tmp_path.rglob("metrics.csv")
    header, *lines = file.read_text().splitlines()
    assert {"clda/kd_loss", "clda/rounds", "clda/lsr_mean"} <= set(header.split(","))
    assert [line.split(",")[header.split(",").index("step")] for line in lines] == ["2", "4", "6"]


class WithOptimizers(Module):
    """The host with optimizers of its own, stepped by Lightning or by ``steps``."""

    def __init__(self, learner: CollaborativeLearner, build: Callable[[nn.Module], Any], steps: Any = None) -> None:
        super().__init__(learner)
        self.build, self.steps = build, steps
        self.automatic_optimization = steps is None

    def configure_optimizers(self) -> Any:
        return self.build(self.student)

    def training_step(self, data: List[Tensor], index: int) -> Any:
        loss = super().training_step
        if self.steps is None:
            return loss(data, index)
        return self.steps(self, lambda: self.manual_backward(loss(data, index)))


def fit_with(learner: CollaborativeLearner, folder: Path, module: Any, callback: Any = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        **{"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options},
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback or CollaborationCallback(learner)],
    )
    trainer.fit(module, loader())
    return trainer


class ClosureSAM(make_sam()):
    """A SAM whose ``step`` evaluates its closure twice, as Lightning wants it."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
        return loss


def two_halves(module: Any, backward: Any) -> None:
    optimizer = module.optimizers()
    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step(zero_grad=True)


def sam(student: nn.Module) -> Any:
    return ClosureSAM(student.parameters(), torch.optim.SGD, lr=0.05)


TWO_STEPS: Dict[str, Any] = {
    "LBFGS": (lambda student: torch.optim.LBFGS(student.parameters(), lr=0.01, max_iter=3), None),
    "SAM with a closure": (sam, None),
    "SAM in two halves": (sam, two_halves),
}


@pytest.mark.parametrize("kind", TWO_STEPS)
def test_an_optimizer_that_evaluates_the_loss_several_times_makes_one_step(kind: str, tmp_path: Path) -> None:
    learner = learner_for(schedule=Schedule(warmup=1, interval=2, observe_every=1))
    trainer = fit_with(learner, tmp_path, WithOptimizers(learner, *TWO_STEPS[kind]))
    assert learner.report().steps == 6
    assert [record.step for record in learner.report().rounds] == [3, 5]
    optimizer = trainer.optimizers[0]
    for each in (optimizer, getattr(optimizer, "base_optimizer", optimizer)):
        assert "step" not in vars(each)


def test_a_scheduler_of_the_host_sees_the_steps(tmp_path: Path) -> None:
    """It watches the optimizer's step() as well, and warns if it does not see one before its own."""

    def scheduled(student: nn.Module) -> Any:
        optimizer = torch.optim.Adam(student.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    learner = learner_for()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step")
        trainer = fit_with(learner, tmp_path, WithOptimizers(learner, scheduled))
        (optimizer,) = trainer.optimizers
        assert learner.report().steps == 6
        assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
        assert [record.step for record in learner.report().rounds] == [3, 5]
        assert learner.state_dict()["peak"] == pytest.approx(0.05)  # what the third step was made with
        trainer.lr_scheduler_configs[0].scheduler.step()  # would warn, had its own watch of the step been lost


def test_an_optimizer_that_holds_part_of_the_student_counts(tmp_path: Path) -> None:
    learner = learner_for()
    assert learner.student.stem.weight.requires_grad, "the first trainable parameter, which no optimizer holds"
    parts = lambda student: [torch.optim.SGD(student.blocks.parameters(), lr=0.05)]  # noqa: E731
    fit_with(learner, tmp_path, WithOptimizers(learner, parts))
    assert learner.report().steps == 6


def test_of_several_optimizers_the_one_with_most_of_the_student_counts(tmp_path: Path) -> None:
    learner = learner_for()

    def parts(student: nn.Module) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (student.stem, student.blocks)]

    def steps(module: Any, backward: Any) -> None:
        small, big = module.optimizers()
        backward()
        small.step()
        if module.trainer.fit_loop.epoch_loop.batch_idx % 2:
            big.step()

    fit_with(learner, tmp_path, WithOptimizers(learner, parts, steps))
    assert learner.report().steps == 3


def test_a_student_that_the_engine_does_not_train_is_refused(tmp_path: Path) -> None:
    learner = learner_for()
    module = WithOptimizers(learner, lambda student: torch.optim.SGD(networks()[1].parameters(), lr=0.05))
    with pytest.raises(CldaError, match="does not train the learner's student.*Fix: build the learner with the very"):
        fit_with(learner, tmp_path, module)
    learner.enabled = False
    fit_with(learner, tmp_path, module)


def test_steps_that_are_not_seen_are_said(tmp_path: Path) -> None:
    def by_hand(module: Any, backward: Any) -> None:
        backward()
        with torch.no_grad():
            for parameter in module.student.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad)

    learner = learner_for()
    module = WithOptimizers(learner, lambda student: torch.optim.SGD(student.parameters(), lr=0.05), by_hand)
    with pytest.warns(UserWarning, match="6 batches were trained, and no optimizer step of the student was seen"):
        fit_with(learner, tmp_path, module)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_training_that_raised_in_a_step_can_be_started_again(error: BaseException, tmp_path: Path) -> None:
    """The optimizer calls ``super().step()``, for which torch fires the hooks of a step once more."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # from when on torch does so

    class Fails(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            loss = closure()
            if Fails.broken:
                Fails.broken = False
                raise error
            return super().step(lambda: loss)

    learner = learner_for()
    callback = CollaborationCallback(learner)
    optimizer = Fails(learner.student.parameters(), lr=0.05)
    module = WithOptimizers(learner, lambda student: optimizer)
    handler = signal.getsignal(signal.SIGINT)  # which Lightning does not give back
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit_with(learner, tmp_path, module, callback)
    signal.signal(signal.SIGINT, handler)
    assert "step" not in vars(optimizer)
    assert learner.report().steps == 0
    fit_with(learner, tmp_path, module, callback)
    assert learner.report().steps == 6
    assert [record.step for record in learner.report().rounds] == [3, 5]


def test_learner_and_teacher_are_restored_both_or_neither(tmp_path: Path) -> None:
    callback = CollaborationCallback(learner_for())
    learner = learner_for()
    fit(learner, tmp_path)
    before = bits(learner.state_dict()), values(learner.teacher)
    state = callback.state_dict()
    wrong = torch.nn.Linear(2, 2).state_dict()
    for broken in ({**state, "teacher": wrong}, {"learner": state["learner"]}, {**state, "learner": {"version": 99}}):
        with pytest.raises(CldaError, match=r"another architecture|does not hold this training|newer clda-core"):
            CollaborationCallback(learner).load_state_dict(broken)
        assert (bits(learner.state_dict()), values(learner.teacher)) == before


def test_a_checkpoint_without_our_state_is_said(tmp_path: Path) -> None:
    learner = learner_for()
    trainer = fit(learner, tmp_path, enable_checkpointing=True)
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, CollaborationCallback)]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="the training resumes, and its checkpoint holds no state of Collaboration"):
        fit(learner_for(), tmp_path, tmp_path / "last.ckpt", max_epochs=2)


class ByTurns(Module):
    """A mixed sampler: a batch is of source data or of target data."""

    def training_step(self, data: List[Tensor], index: int) -> Tensor:
        source, target, classes = data
        if index % 2:
            return self.learner.distill(self.student(target), target)
        return F.cross_entropy(self.student(source), classes)


def test_batches_of_source_or_target_only_are_counted_and_make_rounds(tmp_path: Path) -> None:
    learner = learner_for()  # whose rounds are due after steps 3 and 5, which have no target data
    trainer = fit_with(learner, tmp_path, ByTurns(learner))
    assert learner.report().steps == trainer.global_step == 6
    assert [record.step for record in learner.report().rounds] == [4, 6]
