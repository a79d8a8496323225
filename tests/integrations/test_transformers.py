"""Real runs of transformers' Trainer, on the CPU."""

from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core.distillation import KLDistillation
from clda_core.lead import FixedTrust
from clda_core.selection import AllLayers
from clda_core.update import Average
from tests.docs.test_snippets import snippets
from tests.helpers import INPUTS, WithParameter, batch, bits, labels, seeded, values

pytest.importorskip("accelerate", reason="transformers' Trainer needs Accelerate")
pytest.importorskip("transformers", reason="an integration with transformers needs transformers")
import transformers

from clda_core.integrations.transformers import CollaborationCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # the Trainer's own: no pinned memory without a GPU


class Classifier(nn.Module):
    """A model as the Trainer wants it, without dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, width), nn.Linear(width, 3)

    def forward(self, pixel_values: Any, labels: Any = None) -> Dict[str, Any]:
        logits = self.head(self.body(pixel_values).relu())
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Host(transformers.Trainer):
    learner: CollaborativeLearner
    overflow_at = -1
    logged: Dict[str, float] = {}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(pixel_values=inputs["source"], labels=inputs["labels"])
        target = {"pixel_values": inputs["target"]}
        loss = outputs["loss"] + self.learner.distill(model(**target), target)
        if self.state.global_step == self.overflow_at:
            loss = loss * float("inf")
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: Dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self.learner.metrics()}, *args, **kwargs)


def learner_for(**options: Any) -> CollaborativeLearner:
    teacher, student = (seeded(lambda width=width: Classifier(width), width) for width in (8, 6))
    return CollaborativeLearner(
        teacher,
        student,
        schedule=Schedule(warmup=1, interval=2),
        trust=FixedTrust(),
        update=Average(decay=0.8),
        selection=AllLayers(),
        extract=lambda output: output["logits"],
        **options,
    )


def trainer_for(
    learner: CollaborativeLearner, folder: Path, *, host: Any = Host, callback: Any = None, **options: Any
) -> Any:
    rows = [{"source": x, "target": y, "labels": z} for x, y, z in zip(batch(0, 24), batch(1, 24), labels(2, 24))]
    settings: Dict[str, Any] = {"max_steps": 6, "save_strategy": "no", "logging_steps": 2}
    settings["per_device_train_batch_size"] = 4
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **{**settings, **options},
    )
    callbacks = [callback or CollaborationCallback(learner)]
    trainer = host(model=learner.student, args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.learner = learner
    return trainer


def test_every_optimizer_step_is_one_of_the_learner_and_the_metrics_are_logged(tmp_path: Path) -> None:
    learner = learner_for()
    before = values(learner.teacher)
    trainer = trainer_for(learner, tmp_path)
    trainer.train()
    assert learner.report().steps == trainer.state.global_step == 6
    assert [record.step for record in learner.report().rounds] == [3, 5]
    assert values(learner.teacher) != before
    assert [entry["clda/steps"] for entry in trainer.state.log_history[:3]] == [2.0, 4.0, 6.0]


def test_rounds_know_the_learning_rate(tmp_path: Path) -> None:
    learner = learner_for()
    trainer_for(learner, tmp_path, learning_rate=0.01, lr_scheduler_type="linear", warmup_steps=0).train()
    assert learner.state_dict()["peak"] == pytest.approx(0.01 * 4 / 6)  # the first round is after the third of 6 steps


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_whatever_the_engine_does_steps_are_counted(options: Dict[str, Any], tmp_path: Path) -> None:
    learner = learner_for()
    trainer_for(learner, tmp_path, **options).train()
    assert learner.report().steps == 6
    assert [record.step for record in learner.report().rounds] == [3, 5]


def train_scaled(trainer: Any) -> Any:
    # fp16 is for GPUs; what Accelerate makes of it is this scaler in its optimizer and in its backward().
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.scaler = scaler
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    return scaler


def test_parameters_of_the_loss_train_with_unscaled_gradients(tmp_path: Path) -> None:
    scaled, plain = (learner_for(distillation=WithParameter()) for _ in range(2))
    train_scaled(trainer_for(scaled, tmp_path / "scaled"))
    trainer_for(plain, tmp_path / "plain").train()
    assert WithParameter.moments(scaled) == pytest.approx(WithParameter.moments(plain), rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_scaler_skips_is_none(optim: str, tmp_path: Path) -> None:
    learner = learner_for()
    trainer = trainer_for(learner, tmp_path, optim=optim)
    trainer.overflow_at = 2
    scaler = train_scaled(trainer)
    assert scaler.get_scale() == 512.0
    assert trainer.state.global_step == 6, "the Trainer counts it"
    assert learner.report().steps == 5


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = learner_for()
    trainer_for(whole, tmp_path / "whole").train()
    trainer_for(learner_for(), tmp_path / "run", save_strategy="steps", save_steps=4).train()
    assert (tmp_path / "run" / "checkpoint-4" / "clda.pt").is_file()
    resumed = learner_for()
    trainer_for(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert values(resumed.teacher) == values(whole.teacher)
    assert values(resumed.student) == values(whole.student)
    assert bits(resumed.state_dict()) == bits(whole.state_dict())


def test_resumed_without_our_file_is_a_clear_error(tmp_path: Path) -> None:
    trainer_for(learner_for(), tmp_path, save_strategy="steps", save_steps=4).train()
    (tmp_path / "checkpoint-4" / "clda.pt").unlink()
    learner = learner_for()
    trainer = trainer_for(learner, tmp_path)
    before = values(learner.teacher)
    with pytest.raises(CldaError, match=r"the Trainer resumes, and the teacher cannot.*resume_from= to the callback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert values(learner.teacher) == before


class TakesKwargs(Classifier):
    def forward(self, pixel_values: Any, labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(pixel_values, labels)


def recipe() -> Any:
    """Return the Trainer of docs/integrations.md, by its own code."""
    page = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
    (code,) = [snippet.code for snippet in snippets(page) if "class Adaptation(Trainer)" in snippet.code]
    names: Dict[str, Any] = {"F": F}
    exec(code.partition("\n\nlearner = ")[0], names)
    return names["Adaptation"]


@pytest.mark.parametrize("kind", [Classifier, TakesKwargs])
def test_accumulated_by_the_recipe_a_step_is_that_of_the_whole_batch(kind: Any, tmp_path: Path) -> None:
    """Where the model takes ``**kwargs`` the Trainer itself does not divide by what is accumulated."""
    moves = []
    for size, accumulate in ((8, 1), (2, 4)):
        teacher, student = (seeded(lambda width=width: kind(width), width) for width in (8, 6))
        learner = CollaborativeLearner(
            teacher,
            student,
            distillation=KLDistillation(),
            schedule=Schedule(warmup=100),
            extract=lambda output: output["logits"] if isinstance(output, dict) else output,
        )
        before = [parameter.detach().clone() for parameter in student.parameters()]
        trainer = trainer_for(
            learner,
            tmp_path,
            host=recipe(),
            max_steps=1,
            max_grad_norm=0.0,
            logging_strategy="no",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            learning_rate=0.1,
            seed=3,
        )
        student.forward = lambda inputs, forward=student.forward: forward(inputs)["logits"]
        trainer.train_dataset = trainer.train_dataset[:8]
        trainer.train()
        assert learner.report().steps == 1
        moves.append(torch.cat([(now - was).flatten() for now, was in zip(student.parameters(), before)]))
    assert moves[0].norm() > 1e-3
    assert torch.allclose(moves[0], moves[1], rtol=1e-4, atol=1e-7)


def test_a_student_that_the_trainer_does_not_train_is_refused(tmp_path: Path) -> None:
    learner = learner_for()
    trainer = trainer_for(learner, tmp_path)
    trainer.model = trainer.model_wrapped = seeded(lambda: Classifier(6), 5)
    with pytest.raises(CldaError, match="does not train the learner's student"):
        trainer.train()


def test_a_training_that_raised_can_be_started_again(tmp_path: Path) -> None:
    class Fails(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            if Fails.broken:
                Fails.broken = False
                raise RuntimeError("out of memory")
            return super().step(closure)

    learner = learner_for()
    optimizer = Fails(learner.student.parameters(), lr=0.05)
    callback = CollaborationCallback(learner)
    for expected in (0, 6):
        trainer = trainer_for(learner, tmp_path, callback=callback)
        trainer.optimizer = optimizer
        if Fails.broken:
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train()
        else:
            trainer.train()
        assert learner.report().steps == expected
    assert [record.step for record in learner.report().rounds] == [3, 5]
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("damage", ["cut", "teacher of another width"])
def test_what_cannot_be_restored_changes_neither(damage: str, tmp_path: Path) -> None:
    trainer_for(learner_for(), tmp_path, save_strategy="steps", save_steps=4).train()
    file = tmp_path / "checkpoint-4" / "clda.pt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    else:
        saved = torch.load(file)
        torch.save({**saved, "teacher": Classifier(9).state_dict()}, file)
    learner = learner_for()
    trainer = trainer_for(learner, tmp_path)
    before = bits(learner.state_dict()), values(learner.teacher)
    with pytest.raises(CldaError, match="clda.pt cannot be read" if damage == "cut" else "teacher is of another arch"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (bits(learner.state_dict()), values(learner.teacher)) == before


class ByTurns(Host):
    """A mixed sampler: a batch is of source data or of target data."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        if self.state.global_step % 2:
            target = {"pixel_values": inputs["target"]}
            return self.learner.distill(model(**target), target)
        return model(pixel_values=inputs["source"], labels=inputs["labels"])["loss"]


def test_batches_of_source_or_target_only_are_counted_and_make_rounds(tmp_path: Path) -> None:
    learner = learner_for()  # whose rounds are due after steps 3 and 5, which have no target data
    trainer_for(learner, tmp_path, host=ByTurns).train()
    assert learner.report().steps == 6
    assert [record.step for record in learner.report().rounds] == [4, 6]
