"""Image folders of two domains: a teacher and a student of transformers, adapted by self-training and CLDA.

    accelerate launch -m examples.huggingface.classification --teacher-only --teacher facebook/dinov2-large --lora 16 \
        --source office31/amazon --target office31/webcam --output runs/teacher
    accelerate launch -m examples.huggingface.classification --teacher runs/teacher/teacher \
        --student WinKawaks/vit-tiny-patch16-224 --source office31/amazon --target office31/webcam --output runs/student

Processes and mixed precision are those of ``accelerate launch``. A domain is a folder with one
folder of images per class (Office-31, Office-Home, VisDA-2017), or a text file with a path, relative to that file, and
a label in each line (DomainNet, VisDA-2017). The target's labels are used to evaluate only. Self-training is that of
FixMatch: the *host EMA*, an average of the network that is being trained, labels the target images of which it is sure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, get_cosine_schedule_with_warmup
from transformers.image_processing_base import ImageProcessingMixin

from clda_core import CldaError, CollaborativeLearner, Never, Outputs, Schedule
from clda_core.checkpoint import LearnerAndTeacher, atomically
from clda_core.errors import problem
from examples.huggingface.dacs import by_batch_statistics
from examples.huggingface.image_folders import Pairs, Whole, in_classes_of, read_domain
from examples.huggingface.running import Checkpoints, Curve, HostAlone, start

MAY_DIFFER_WHEN_RESUMED = ("output", "resume", "save_every", "workers")


class Reads(NamedTuple):
    """How a model reads images: of what size, with which mean and deviation."""

    size: int
    mean: Tuple[float, ...]
    deviation: Tuple[float, ...]

    def __call__(self, images: Tensor) -> Dict[str, Tensor]:
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        mean, deviation = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.deviation))
        return {"pixel_values": (images - mean) / deviation}


def reads_of(name: str, config: Any) -> Reads:
    """Return what the model's own image processor says; ImageNet's figures where it has none."""
    try:
        told = ImageProcessingMixin.get_image_processor_dict(name)[0]
    except (OSError, ValueError):
        told = getattr(config, "pretrained_cfg", None) or {}  # timm's
        told = {"image_mean": told.get("mean"), "image_std": told.get("std"), "size": told.get("input_size")}
    size = told.get("crop_size") or told.get("size") or getattr(config, "image_size", None) or 224
    size = (
        next(iter(size.values())) if isinstance(size, dict) else size[-1] if isinstance(size, (list, tuple)) else size
    )
    mean, deviation = told.get("image_mean") or (0.485, 0.456, 0.406), told.get("image_std") or (0.229, 0.224, 0.225)
    return Reads(int(size), tuple(mean), tuple(deviation))


def load_model(whose: str, name: str, classes: Sequence[str], *, trained: bool) -> Tuple[nn.Module, Reads]:
    """Build a model by name or path: with a head for these classes, or as it was trained for them."""
    adapters = Path(name, "adapter_config.json").is_file()
    label2id = {label: number for number, label in enumerate(classes)}
    head = {"num_labels": len(classes), "id2label": dict(enumerate(classes)), "label2id": label2id}
    try:
        config = AutoConfig.from_pretrained(name)
        base = name
        if adapters:
            from peft import PeftConfig, PeftModel

            base = PeftConfig.from_pretrained(name).base_model_name_or_path
        if trained:
            check_classes(whose, name, config, classes)
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **head}
        model, loaded = AutoModelForImageClassification.from_pretrained(base, **options)
        if adapters:
            model = PeftModel.from_pretrained(model, name, is_trainable=True)
    except (OSError, ValueError) as error:
        raise problem(
            f"the {whose} cannot be loaded",
            expected="name or folder of a model for AutoModelForImageClassification, or of LoRA adapters on one",
            received=f"{name} ({str(error).partition(chr(10))[0]})",
            fix="check the name, and that the hub can be reached or the model lies in its cache",
        ) from error
    if trained and not adapters and (loaded["missing_keys"] or loaded["mismatched_keys"]):
        raise untrained(whose, name, f"no weights for {sorted(map(str, loaded['missing_keys']))[:3]}")
    model, reads = model.float(), reads_of(name, config)
    check_logits(whose, model, reads, len(classes))
    return model, reads


def untrained(whose: str, name: str, received: str) -> CldaError:
    return problem(
        f"the {whose} is not trained for these classes",
        expected="a classifier of the source's classes in their order",
        received=f"{name} with {received}",
        fix=f"train it first: --teacher-only --teacher {name}, then pass the folder teacher of its --output",
    )


def check_classes(whose: str, name: str, config: Any, classes: Sequence[str]) -> None:
    labels = [config.id2label[number] for number in sorted(config.id2label)]
    if len(labels) != len(classes):
        raise untrained(whose, name, f"{len(labels)} classes instead of {len(classes)}")
    if labels != list(classes) and labels != [f"LABEL_{number}" for number in range(len(labels))]:
        raise untrained(whose, name, f"the classes {labels[:5]}, ... instead of {list(classes)[:5]}, ...")


def check_logits(whose: str, model: nn.Module, reads: Reads, classes: int) -> None:
    """Run the model once, on a black image."""
    images = torch.zeros(1, 3, reads.size, reads.size)
    with torch.no_grad():
        try:
            output = model.eval()(**reads(images))
        except (TypeError, ValueError) as error:
            output = error
    shape = tuple(getattr(getattr(output, "logits", None), "shape", ()))
    if shape != (1, classes):
        raise problem(
            f"the {whose} does not classify images",
            expected=f"an output with logits of shape (1, {classes}) for pixel_values of shape {tuple(images.shape)}",
            received=f"logits of shape {shape}" if shape else f"{type(output).__name__} {output}"[:120],
            fix="pass a model for image classification",
        )


def with_adapters(model: nn.Module, rank: int, targets: Sequence[str], classes: int) -> nn.Module:
    """Freeze the model and put LoRA adapters on it; the head stays trainable, and is saved with them."""
    from peft import LoraConfig, get_peft_model

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = [name for name, module in linear.items() if module.out_features == classes][-1:]
    try:
        return get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), modules_to_save=head)
        )
    except ValueError as error:
        raise problem(
            "LoRA finds no layer to adapt",
            expected=f"linear layers named {', '.join(targets)}",
            received=f"{type(model).__name__} with {sorted({name.rpartition('.')[2] for name in linear})}",
            fix="name some of them with --lora-targets",
        ) from error


def check_adapters(model: nn.Module) -> None:
    """Raise where adapters were trained, but would not be by rounds, which would then write the base model."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if hasattr(model, "peft_config") and not any("lora_" in name for name in trainable):
        raise problem(
            "the teacher's adapters have no trainable parameters",
            expected="LoRA matrices with requires_grad=True, which are all that rounds then write",
            received=f"{len(trainable)} trainable parameters, none of them of LoRA",
            fix="pass the local folder of the adapters as --teacher, or a model that they are merged into",
        )


def save_model(model: nn.Module, reads: Reads, folder: Path) -> None:
    """Save what ``--teacher``, ``AutoModelForImageClassification`` and a pipeline of transformers read."""
    model.save_pretrained(folder)
    model.config.save_pretrained(folder)  # peft saves the adapters only
    told = {"image_processor_type": "ViTImageProcessor", "size": {"height": reads.size, "width": reads.size}}
    told.update(image_mean=reads.mean, image_std=reads.deviation)
    (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")


def train(options: argparse.Namespace) -> Dict[str, Any]:
    """Train the student, or with ``--teacher-only`` the teacher alone, and return what was measured."""
    source, target = read_domain(options.source), read_domain(options.target)
    classes, target = source.classes, in_classes_of(source, target)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # DINOv2's mask token gets no gradient
    accelerator = start(options.output, options.accumulate, unused)
    checkpoints, curve = Checkpoints(accelerator, options.output, settings_of(options)), Curve()
    first = checkpoints.first_step(options.resume)

    set_seed(options.seed)  # the same new heads and adapters on every process
    teacher, teacher_reads = load_model("teacher", options.teacher, classes, trained=not options.teacher_only)
    if options.lora and not hasattr(teacher, "peft_config"):
        teacher = with_adapters(teacher, options.lora, options.lora_targets, len(classes))
    check_adapters(teacher)
    network, reads = teacher, teacher_reads
    learner: Any = HostAlone()
    if not options.teacher_only:
        network, reads = load_model("student", options.student, classes, trained=False)
        teacher.to(accelerator.device)
        schedule = Schedule() if options.rounds == "on" else Never()
        learner = CollaborativeLearner(teacher, network, extract=lambda output: output.logits, schedule=schedule)
    network.to(accelerator.device).train()
    host_ema = AveragedModel(network, avg_fn=towards(options.ema), use_buffers=True).eval()
    bare = network

    accumulate = accelerator.gradient_accumulation_steps
    micro_batch = options.batch * accelerator.num_processes
    size = max(reads.size, teacher_reads.size)
    span = (micro_batch * accumulate * step for step in (first, options.steps))
    # A generator of their own: loaders draw from the global one otherwise, and a resumed run another number of times.
    loading = {"batch_size": options.batch, "num_workers": options.workers, "generator": torch.Generator()}
    batches = DataLoader(Pairs(source, target, size, options.seed, *span), **loading)
    evaluation = DataLoader(Whole(target, size), **loading)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=options.rate)
    network, optimizer, batches, evaluation = accelerator.prepare(network, optimizer, batches, evaluation)
    rates = get_cosine_schedule_with_warmup(optimizer.optimizer, options.steps // 20, options.steps)

    def add_to_curve(step: int) -> None:
        measured = {} if options.teacher_only else {"student": evaluate(accelerator, bare, reads, evaluation, classes)}
        curve.add(step, teacher=evaluate(accelerator, teacher, teacher_reads, evaluation, classes), **measured)

    if not first:
        add_to_curve(0)
    set_seed(options.seed, device_specific=True)
    checkpoints.load([rates, host_ema, curve, *([LearnerAndTeacher(learner)] if learner.enabled else [])])
    accelerator.init_trackers("tensorboard")
    step = first
    shown = tqdm(total=options.steps, initial=first, unit="step", disable=not accelerator.is_main_process)
    for images_s, labels_s, images_t, strong_t in batches:
        with accelerator.accumulate(network):
            logits_s, logits_t = network(**reads(torch.cat([images_s, strong_t]))).logits.chunk(2)
            with torch.no_grad(), accelerator.autocast(), by_batch_statistics(host_ema):
                confidence, labels_t = host_ema(**reads(images_t)).logits.float().softmax(1).max(1)
            sure = (confidence >= options.threshold).float()
            loss_s = F.cross_entropy(logits_s, labels_s)
            loss_t = (sure * F.cross_entropy(logits_t, labels_t, reduction="none")).mean()
            loss = loss_s + loss_t
            if learner.enabled:
                for_student = {"student_inputs": reads(images_t), "student_view": reads(strong_t)}
                with accelerator.autocast():  # the teacher runs in it too
                    loss = loss + learner.distill(
                        Outputs(logits_t),
                        teacher_reads(images_t),
                        view=teacher_reads(strong_t),
                        **({} if reads == teacher_reads else for_student),
                    )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
            learner.step(optimizer)  # and makes a round if one is due
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        rates.step()
        host_ema.update_parameters(bare)
        step += 1
        shown.update()
        if step % options.save_every == 0 or step == options.steps:
            add_to_curve(step)
            losses = {"loss/source": loss_s.item(), "loss/target": loss_t.item(), "sure": sure.mean().item()}
            accelerator.log({**losses, **curve.flat(), **learner.metrics()}, step=step)
            checkpoints.save(step)
    shown.close()
    results = {**checkpoints.settings, "curve": curve.points}
    if accelerator.is_main_process:
        save_model(teacher, teacher_reads, options.output / "teacher")
        if learner.enabled:
            save_model(bare, reads, options.output / "student")
            results["report"] = learner.report().to_dict()
            print(learner.report())
        with atomically(options.output / "results.json") as path:
            Path(path).write_text(json.dumps(results, indent=2), encoding="utf-8")
    accelerator.end_training()
    return results


def towards(decay: float) -> Any:
    """Return the average's rule: faster at first, so that the start is soon forgotten; counts of BatchNorm included."""
    return lambda average, value, updates: average + (value - average) * max(1.0 - decay, 1.0 / (int(updates) + 1))


def evaluate(
    accelerator: Accelerator, model: nn.Module, reads: Reads, loader: Any, classes: Sequence[str]
) -> Dict[str, float]:
    """Return accuracies on the target in percent: the mean over classes, over images, and each class's."""
    by_class = MulticlassAccuracy(len(classes), average="none", sync_on_compute=False).to(accelerator.device)
    overall = MulticlassAccuracy(len(classes), average="micro", sync_on_compute=False).to(accelerator.device)
    training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        for images, labels in loader:
            predicted = model(**reads(images)).logits.argmax(1)
            predicted, labels = accelerator.gather_for_metrics((predicted, labels))
            for metric in (by_class, overall):
                metric.update(predicted, labels)
    model.train(training)
    each = (100 * by_class.compute()).tolist()
    named = {f"class/{name}": value for name, value in zip(classes, each)}
    return {"mean": sum(each) / len(each), "overall": 100 * overall.compute().item(), **named}


def settings_of(options: argparse.Namespace) -> Dict[str, Any]:
    """Return what a run that is resumed has to have in common with the one before."""
    settings = {name: value for name, value in vars(options).items() if name not in MAY_DIFFER_WHEN_RESUMED}
    return {**settings, "source": str(options.source), "target": str(options.target)}


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "classification", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", required=True, help="name or folder of the big model, or of LoRA adapters")
    add("--student", help="name or folder of the small model; it gets a new head where it has none for the classes")
    add("--source", type=Path, required=True, help="folder or list of the labelled domain")
    add("--target", type=Path, required=True, help="folder or list of the domain to adapt to")
    add("--output", type=Path, required=True, help="folder for checkpoints, models, results and TensorBoard")
    add("--steps", type=int, default=10_000, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=32, help="images of each domain, process and micro-batch (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="micro-batches per optimizer step (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--rounds", choices=("on", "off"), default="on", help="off: KD from the frozen teacher, the baseline")
    add("--teacher-only", action="store_true", help="train the teacher by self-training alone, without a student")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--lora", type=int, default=0, metavar="RANK", help="put LoRA adapters on the teacher (default: none)")
    add("--lora-targets", nargs="+", default=["q_proj", "v_proj", "query", "value", "qkv"], help="default: %(default)s")
    add("--rate", type=float, default=1e-4, help="AdamW's learning rate at its peak (default: %(default)s)")
    add("--threshold", type=float, default=0.95, help="confidence of a pseudo-label that counts (default: %(default)s)")
    add("--ema", type=float, default=0.999, help="decay of the host EMA (default: %(default)s)")
    add("--save-every", type=int, default=500, metavar="STEPS", help="evaluate and save (default: %(default)s)")
    add("--workers", type=int, default=4, help="processes that load images, per process (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.teacher_only and not options.student:
        parser.error("--student is missing; to train the teacher alone add --teacher-only")
    if (
        min(options.steps, options.batch, options.save_every) < 1
        or min(options.seed, options.lora, options.workers) < 0
    ):
        parser.error("--steps, --batch and --save-every must be at least 1, --seed, --lora and --workers at least 0")
    return options


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit status."""
    try:
        train(parse(arguments))
    except CldaError as error:
        if PartialState().is_main_process:
            print(f"classification: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
