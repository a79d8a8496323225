"""Segmentation from GTA or SYNTHIA to Cityscapes: any teacher and student of Hugging Face's transformers.

The host is DACS-style self-training with rare-class sampling; CLDA is added to it in the lines marked so. Train a
teacher, then a student with it, on one device or with `accelerate launch` on several:

    python -m examples.huggingface.segmentation --source GTA --target CITYSCAPES --teacher facebook/dinov2-base \
        --teacher-only --output runs/teacher
    python -m examples.huggingface.segmentation --source GTA --target CITYSCAPES --teacher runs/teacher/teacher \
        --student nvidia/mit-b0 --output runs/clda

`--rounds off` is KD from the frozen teacher, the baseline; `--clda off` is the host alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassJaccardIndex

from clda_core import CldaError, CollaborativeLearner, Never, Schedule
from clda_core.checkpoint import LearnerAndTeacher
from clda_core.update import MaskedDistillation

from .dacs import IGNORE, HostEma, change_colours, class_mix, segmentation_loss, upsample
from .running import Checkpoints, Curve, HostAlone, check_finite, learning_rate_factor, progress, share_buffers, start
from .segmentation_data import CLASSES, Pairs, RareClassSampling, Whole, pixel_counts, source_split, target_splits
from .segmentation_networks import Segmenter, check, load

MAY_CHANGE = ("output", "resume", "workers", "statistics", "save_every")  # when a run is resumed
VIEW_STRENGTH = 0.6  # of the second view's change of colours; the student is trained with half of it


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of GTA or SYNTHIA as downloaded, or of Cityscapes")
    add("--target", type=Path, required=True, help="folder of Cityscapes, or of data in its layout")
    add("--teacher", help="name on the hub or folder; trained, except with --teacher-only")
    add("--student", help="name on the hub or folder")
    add("--output", type=Path, required=True, help="folder for checkpoints, networks, results and TensorBoard")
    add("--teacher-only", action="store_true", help="train the teacher by the host alone")
    add("--clda", choices=("on", "off"), default="on", help="off: the host alone, no teacher")
    add("--rounds", choices=("on", "stronger", "off"), default="on", help="off: frozen teacher; stronger: experimental")
    add("--interval", type=int, default=7, help="optimizer steps between rounds")
    add("--kd-weight", type=float, default=1.0, help="factor of the KD loss")
    add("--steps", type=int, default=40000, help="optimizer steps")
    add("--batch", type=int, default=2, help="images of each domain per process and micro-batch")
    add("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    add("--crop", type=int, default=512)
    add("--source-height", type=int, default=720, help="to which larger images are scaled down")
    add("--target-height", type=int, default=512)
    add("--rate", type=float, default=6e-5, help="AdamW's learning rate at its peak, for pretrained parts")
    add("--head-rate", type=float, default=10.0, help="factor of it for the head")
    add("--warmup", type=int, default=1500, help="steps in which the learning rate rises")
    add("--ema", type=float, default=0.999, help="decay of the host EMA")
    add("--threshold", type=float, default=0.968, help="probability from which a pseudo-label counts as confident")
    add("--rare", type=float, default=0.01, help="temperature of rare-class sampling")
    add("--statistics", type=Path, help="file for the source's class counts (default: in the source's folder)")
    add("--save-every", type=int, default=2000, help="steps from one evaluation and checkpoint to the next")
    add("--workers", type=int, default=4, help="processes that load images, per process")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    args = parser.parse_args(given)
    for name in ("steps", "batch", "accumulate", "crop", "interval", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.teacher is None and (args.teacher_only or args.clda == "on"):
        parser.error("--teacher is needed, except with --clda off")
    if args.student is None and not args.teacher_only:
        parser.error("--student is needed, except with --teacher-only")
    return args


def main(given: Optional[Sequence[str]] = None) -> None:
    args = arguments(given)
    try:
        train(args, start(args.output, args.accumulate))
    except CldaError as error:
        raise SystemExit(f"error: {error}") from error


def train(args: argparse.Namespace, accelerator: Accelerator) -> Tuple[Segmenter, Optional[Segmenter]]:
    """Train, write what came out into ``args.output``, and return the trained network and its teacher if it has one."""
    source, (target, validation) = source_split(args.source), target_splits(args.target)
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    checkpoints = Checkpoints(accelerator, args.output, settings)
    first = checkpoints.first_step(args.resume)

    pairs = Pairs(source, target, args.crop, (args.source_height, args.target_height), args.seed)
    model, teacher, learner = networks(args, accelerator)
    host_ema = HostEma(model, args.ema)
    loader = batches_of(args, accelerator, pairs, first)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), weight_decay=0.01)
    student, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    set_seed(args.seed + 1 + accelerator.process_index)  # of dropout: the same with a teacher and without
    curve = Curve()
    checkpoints.load([host_ema, curve, *([LearnerAndTeacher(learner)] if learner.enabled else [])])  # CLDA 2 of 4
    measure = Evaluation(Whole(validation, args.target_height), source.classes, accelerator, args.workers)
    accelerator.init_trackers("tensorboard")
    if first == 0:
        curve.add(0, student=measure(model), teacher=measure(teacher))

    model.train()
    batches, steps = iter(loader), progress(first, args.steps, accelerator)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, args.steps, args.warmup)
        for micro in range(args.accumulate):
            number = (step * args.accumulate + micro) * accelerator.num_processes + accelerator.process_index
            with accelerator.accumulate(student):
                with accelerator.autocast():
                    loss = loss_of(student, next(batches), number, host_ema, learner, args)
                accelerator.backward(loss)
                learner.step(optimizer)  # CLDA 4 of 4, instead of optimizer.step()
                optimizer.zero_grad()
        share_buffers(accelerator, model)
        host_ema.update(model)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            figures = {"loss": check_finite(float(loss.detach()), step + 1), **learner.metrics()}
            steps.set_postfix(loss=f"{figures['loss']:.3f}")
            accelerator.log(figures, step=step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            changes = learner.enabled and args.rounds != "off"
            curve.add(step + 1, student=measure(model), teacher=measure(teacher) if changes else curve.last("teacher"))
            accelerator.log(curve.flat(), step=step + 1)
            checkpoints.save(step + 1)
    accelerator.end_training()
    if accelerator.is_main_process:
        finish(args, curve, learner, model, teacher)
    return model, teacher


def networks(args: argparse.Namespace, accelerator: Accelerator) -> Tuple[Segmenter, Optional[Segmenter], Any]:
    """Return the network that the host trains, its teacher if it has one, and the learner or what stands for it."""
    set_seed(args.seed)
    name, role = (args.teacher, "teacher") if args.teacher_only else (args.student, "student")
    model = load(name, role, trained=False).to(accelerator.device)
    check(model, role, args.crop, trains=True)
    if args.teacher_only or args.clda == "off":
        return model, None, HostAlone()
    teacher = load(args.teacher, "teacher", trained=True).requires_grad_(False).to(accelerator.device)
    check(teacher, "teacher", args.crop, trains=False)
    schedule = Never() if args.rounds == "off" else Schedule(interval=args.interval)
    stronger = {"learns_on": "view", "own_targets": True, "source_weight": 1.0} if args.rounds == "stronger" else {}
    learner = CollaborativeLearner(teacher, model, schedule=schedule, update=MaskedDistillation(**stronger))
    return model, teacher, learner  # CLDA 1 of 4


def batches_of(args: argparse.Namespace, accelerator: Accelerator, pairs: Pairs, first: int) -> DataLoader:
    """Return the loader of all batches from a step on; Accelerate gives every process its own."""
    with accelerator.main_process_first():
        counts = pixel_counts(pairs.source, args.statistics or args.source / "class-pixels.npz")
    pairs.sampling = RareClassSampling(counts, args.rare)
    per_step = args.batch * args.accumulate * accelerator.num_processes
    return DataLoader(
        pairs,
        batch_size=args.batch,
        sampler=range(first * per_step, args.steps * per_step),
        num_workers=args.workers,
        generator=torch.Generator(),  # of its own, so that it draws nothing from the global one
    )


def loss_of(
    student: nn.Module,
    batch: Dict[str, Tensor],
    number: int,
    host_ema: HostEma,
    learner: Any,
    args: argparse.Namespace,
) -> Tensor:
    """Return the host's loss on source and mixed images, and the KD loss on the target where there is a learner."""
    rng = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
    source, target, labels = batch["source"] / 255, batch["target"] / 255, batch["labels"]
    pseudo_labels, weight = host_ema.pseudo_labels(target, args.threshold)
    mixed, mixed_labels, weights = class_mix(source, labels, target, pseudo_labels, weight, rng)
    images = [source, change_colours(mixed, rng)]
    if learner.enabled:
        images.append(change_colours(target, rng))
    logits = student(torch.cat(images)).split(len(source))
    loss = segmentation_loss(logits[0], labels) + segmentation_loss(logits[1], mixed_labels, weights)
    if learner.enabled:
        of_view = torch.Generator().manual_seed(-1 - args.seed * 1_000_003 - number)  # the host's draws stay the same
        loss = loss + args.kd_weight * learner.distill(  # CLDA 3 of 4
            logits[2],
            target,
            view=lambda: change_colours(target, of_view, VIEW_STRENGTH),
            source_loss=lambda network: segmentation_loss(network(source), labels),
        )
    return loss


def parameter_groups(model: Segmenter, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Return what the optimizer trains: the head at a higher rate, as it is new."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for of_head, factor in ((False, 1.0), (True, args.head_rate)):
        chosen = [each for name, each in trained if ("head" in name or "classifier" in name) == of_head]
        groups.append({"params": chosen, "peak": args.rate * factor, "lr": args.rate * factor})
    return groups


class Evaluation:
    """The IoU of each class in %, and their mean over those classes of the source that the validation labels have."""

    def __init__(self, data: Whole, classes: Sequence[int], accelerator: Accelerator, workers: int) -> None:
        self.classes, self.accelerator = classes, accelerator
        part = Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes))
        self.loader = DataLoader(part, num_workers=workers, generator=torch.Generator())

    @torch.no_grad()
    def __call__(self, model: Optional[nn.Module]) -> Dict[str, float]:
        if model is None:
            return {}
        device, was_training = self.accelerator.device, model.training
        score = MulticlassJaccardIndex(len(CLASSES), average=None, ignore_index=IGNORE).to(device)
        model.eval()
        for images, labels in self.loader:
            with self.accelerator.autocast():
                logits = model(images.to(device) / 255)
            score.update(upsample(logits.float(), labels.unsqueeze(1)).argmax(dim=1), labels.to(device))
        model.train(was_training)
        each = 100.0 * score.compute()  # over all processes
        with score.sync_context():
            there = score.confmat.sum(dim=1) > 0
        figures = {f"IoU {CLASSES[index]}": float(each[index]) for index in self.classes if there[index]}
        return {"mIoU": sum(figures.values()) / max(1, len(figures)), **figures}


def finish(
    args: argparse.Namespace, curve: Curve, learner: Any, model: Segmenter, teacher: Optional[Segmenter]
) -> None:
    """Write the networks, the figures and the learner's report, and print how the networks did."""
    model.save(args.output / ("teacher" if args.teacher_only else "student"))
    results: Dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(args).items()}}
    results["curve"] = curve.points
    if teacher is not None:
        teacher.save(args.output / "teacher")
        results["report"] = learner.report().to_dict()
        print(learner.report())
    (args.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    for name, figures in curve.points[-1].items():
        if figures and name != "step":
            print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in figures.items()))
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
