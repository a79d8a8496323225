"""Real runs of mmengine's Runner, on the CPU."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from clda_core import CldaError
from clda_core.selection import AllLayers
from clda_core.update import Average
from tests.helpers import INPUTS, WithParameter, batch, bits, labels, seeded, values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports of torch is deprecated there
    pytest.importorskip("mmengine.runner", reason="an integration with mmengine needs mmengine")
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from clda_core.integrations.mmengine import CollaborationHook

pytestmark = pytest.mark.filterwarnings("ignore")  # mmengine's own, which is older than torch and Python here


class Host(BaseModel):
    overflow_at = -1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, width), nn.Linear(width, 3)
        self.calls = 0

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if mode != "loss":
            return self.head(self.body(inputs).relu())
        source, target = inputs
        losses = {"loss_source": F.cross_entropy(self(source), data_samples)}
        losses["loss_kd"] = self.learner.distill(self(target), target)
        self.calls += 1
        if self.calls == self.overflow_at:
            losses["loss_source"] = losses["loss_source"] * float("inf")
        return losses


class CpuAmpOptimWrapper(AmpOptimWrapper):
    """The real one refuses to be built without a GPU; with the CPU's scaler it steps all the same."""

    def __init__(self, **options: Any) -> None:
        OptimWrapper.__init__(self, **options)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def optim_context(self, model: nn.Module) -> Any:
        return OptimWrapper.optim_context(self, model)


def data() -> List[Dict[str, Any]]:
    rows = zip(batch(0, 32), batch(1, 32), labels(2, 32))
    return [{"inputs": (source, target), "data_samples": label} for source, target, label in rows]


def run(folder: Path, *, wrapper: Any = OptimWrapper, overflow_at: int = -1, resume: Any = None, **options: Any) -> Any:
    hook = CollaborationHook(
        seeded(lambda: Host(8), 8),
        schedule={"warmup": 1, "interval": 2},
        update=Average(decay=0.8),
        selection=AllLayers(),
        log_interval=1,
        enabled=options.pop("enabled", True),
        distillation=options.pop("distillation", None),
    )
    student = seeded(lambda: Host(6), 6)
    student.overflow_at = overflow_at
    hooked, param_scheduler = options.pop("hooked", True), options.pop("param_scheduler", None)
    if not hooked:
        student.learner = SimpleNamespace(distill=lambda output, images: output.sum() * 0)
    optimizer: Any = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    if options.pop("adam", False):
        optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    runner = Runner(
        model=student,
        work_dir=str(folder),
        train_dataloader=DataLoader(data(), batch_size=4),
        train_cfg={"by_epoch": False, "max_iters": 8},
        optim_wrapper=wrapper(optimizer=optimizer, **options),
        param_scheduler=param_scheduler,
        custom_hooks=[hook] if hooked else [],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 4, "by_epoch": False}},
        load_from=resume,
        resume=resume is not None,
        default_scope="mmengine",
        experiment_name=f"{folder.name}-{id(hook)}",
    )
    runner.train()
    return runner, hook.learner


def test_a_disabled_learner_leaves_the_host_alone(tmp_path: Path) -> None:
    disabled, learner = run(tmp_path / "disabled", enabled=False)
    alone, _ = run(tmp_path / "alone", hooked=False)
    assert values(disabled.model) == values(alone.model)
    assert learner.report().steps == 0


def test_every_optimizer_step_is_one_of_the_learner(tmp_path: Path) -> None:
    runner, learner = run(tmp_path)
    assert learner.report().steps == 8
    assert [record.step for record in learner.report().rounds] == [3, 5, 7]
    assert "step" not in vars(runner.optim_wrapper)
    assert runner.message_hub.get_scalar("train/clda/rounds").current() == 3
    saved = torch.load(tmp_path / "iter_4.pth", weights_only=False)
    assert sorted(saved["clda"]) == ["learner", "teacher"]
    assert sorted(saved["state_dict"]) == ["body.bias", "body.weight", "head.bias", "head.weight"]


def test_rounds_know_the_learning_rate(tmp_path: Path) -> None:
    halved = {"type": "MultiStepLR", "milestones": [2], "gamma": 0.5, "by_epoch": False}
    _, learner = run(tmp_path, param_scheduler=halved, adam=True)
    assert [record.step for record in learner.report().rounds] == [3, 5, 7]
    assert learner.state_dict()["peak"] == pytest.approx(0.025)  # halved before the first of them


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    _, learner = run(tmp_path, accumulative_counts=2, clip_grad={"max_norm": 0.1})
    assert learner.report().steps == 4
    assert [record.step for record in learner.report().rounds] == [3]


@pytest.mark.parametrize("clip", [None, {"max_norm": 1.0}])
def test_a_step_that_the_scaler_skips_is_none(clip: Any, tmp_path: Path) -> None:
    runner, learner = run(tmp_path, wrapper=CpuAmpOptimWrapper, overflow_at=3, clip_grad=clip)
    assert runner.optim_wrapper.loss_scaler.get_scale() == 512.0
    assert learner.report().steps == 7


def test_parameters_of_the_loss_train_with_unscaled_gradients(tmp_path: Path) -> None:
    _, scaled = run(tmp_path / "scaled", wrapper=CpuAmpOptimWrapper, distillation=WithParameter())
    _, plain = run(tmp_path / "plain", distillation=WithParameter())
    assert WithParameter.moments(scaled) == pytest.approx(WithParameter.moments(plain), rel=1e-3)


def test_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # mmengine's checkpoints hold more than tensors
    whole, learner = run(tmp_path / "whole")
    resumed, other = run(tmp_path / "second", resume=str(tmp_path / "whole" / "iter_4.pth"))
    assert values(resumed.model) == values(whole.model)
    assert values(other.teacher) == values(learner.teacher)
    assert bits(other.state_dict()) == bits(learner.state_dict())


class Fails(torch.optim.SGD):
    broken = False

    def step(self, closure: Any = None) -> Any:
        if Fails.broken:
            Fails.broken = False
            raise RuntimeError("out of memory")
        return super().step(closure)


class StepsItself(Host):
    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        losses = self(**self.data_preprocessor(data, True), mode="loss")
        optim_wrapper.zero_grad()
        sum(losses.values()).backward()
        optim_wrapper.optimizer.step()
        return losses


def built(folder: Path, student: Any, optim_wrapper: Any) -> Any:
    hook = CollaborationHook(
        seeded(lambda: Host(8), 8),
        schedule={"warmup": 1, "interval": 2},
        update=Average(decay=0.8),
        selection=AllLayers(),
    )
    runner = Runner(
        model=student,
        work_dir=str(folder),
        train_dataloader=DataLoader(data(), batch_size=4),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper=optim_wrapper,
        custom_hooks=[hook],
        default_scope="mmengine",
        experiment_name=f"{folder.name}-{id(hook)}",
    )
    return runner, hook


def test_a_run_that_raised_can_be_started_again_with_the_same_learner(tmp_path: Path) -> None:
    student = seeded(lambda: Host(6), 6)
    wrapper = OptimWrapper(optimizer=Fails(student.parameters(), lr=0.05))
    runner, hook = built(tmp_path, student, wrapper)
    Fails.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.train()
    learner = hook.learner
    runner.train()
    assert hook.learner is runner.model.learner is learner
    assert learner.report().steps == 8
    assert "step" not in vars(wrapper)
    runner.call_hook("before_run")  # as runner.test() does
    assert hook.learner is learner
    runner.call_hook("after_run")
    assert learner.report().steps == 8


def test_an_optimizer_of_something_else_or_several_are_refused(tmp_path: Path) -> None:
    student = seeded(lambda: Host(6), 6)
    other = OptimWrapper(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    runner, _ = built(tmp_path / "other", student, other)
    with pytest.raises(CldaError, match="does not train the learner's student"):
        runner.train()
    several = OptimWrapperDict(body=other, head=other)
    runner, _ = built(tmp_path / "several", student, several)
    with pytest.raises(CldaError, match="cannot tell which optimizer trains the student.*received OptimWrapperDict of"):
        runner.train()


def test_steps_that_are_not_seen_are_said(tmp_path: Path) -> None:
    student = seeded(lambda: StepsItself(6), 6)
    runner, _ = built(tmp_path, student, OptimWrapper(optimizer=torch.optim.SGD(student.parameters(), lr=0.05)))
    with pytest.warns(UserWarning, match="8 batches were trained, and no optimizer step of the student was seen"):
        runner.train()


def test_a_checkpoint_without_our_state_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run(tmp_path / "alone", hooked=False)
    with pytest.warns(UserWarning, match="the training resumes, and its checkpoint holds no state of Collaboration"):
        run(tmp_path / "second", resume=str(tmp_path / "alone" / "iter_4.pth"))


class ByTurns(Host):
    """A mixed sampler: a batch is of source data or of target data."""

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if mode != "loss":
            return super().forward(inputs, data_samples, mode)
        source, target = inputs
        self.calls += 1
        if self.calls % 2 == 0:
            return {"loss_kd": self.learner.distill(self(target), target)}
        return {"loss_source": F.cross_entropy(self(source), data_samples)}


def test_batches_of_source_or_target_only_are_counted_and_make_rounds(tmp_path: Path) -> None:
    student = seeded(lambda: ByTurns(6), 6)  # of rounds that are due after steps 3, 5 and 7, without target data
    runner, hook = built(tmp_path, student, OptimWrapper(optimizer=torch.optim.SGD(student.parameters(), lr=0.05)))
    runner.train()
    assert hook.learner.report().steps == 8
    assert [record.step for record in hook.learner.report().rounds] == [4, 6, 8]
