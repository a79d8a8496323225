"""What is mixed into a host's LightningModule, and the callback that steps, saves and resumes the learner with it."""

# Without `from __future__ import annotations`, which the host's jsonargparse does not read.

import contextlib
import inspect
from dataclasses import asdict
from functools import partial
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clda_core import CollaborativeLearner
from clda_core.errors import problem
from clda_core.integrations.lightning import CollaborationCallback

from .options import Options
from .random_state import of_our_own
from .teacher import build_teacher
from .views import blanked


class CollaborativeUDA:
    """CLDA for VFM-UDA's training modules: ``class CLDA(CollaborativeUDA, TheHostsModule)``.

    The host's ``train_dataprep`` is called after its gradients are zeroed and before its first backward pass. There the
    gradient of the KD loss is added; :class:`Collaboration` does the rest around the optimizer's step. Teacher and
    learner are no modules of the host, so nothing of them reaches its optimizer, ``state_dict``, ``train()`` or
    distributed wrapper.

    Args:
        clda: What the plug-in does; the command line builds it from the config. Or a mapping of its entries.
    """

    normalize: ClassVar[Callable[[Tensor], Tensor]]

    def __init__(self, *args: Any, clda: Options, **kwargs: Any) -> None:
        options = clda if isinstance(clda, Options) else Options.from_config(clda)
        clda = asdict(options)  # what the host's save_hyperparameters() finds here: plain values, not a class of ours
        super().__init__(*args, **kwargs)
        self.clda = options
        self.learner: Optional[CollaborativeLearner] = None
        if self.clda.enabled:
            sizes = {"num_classes": self.num_classes, "img_size": self.img_size}
            teacher = build_teacher(options.teacher, options.teacher_args, options.checkpoint, options.weights, **sizes)
            self.learner = self.make_learner(teacher, self.network)

    def make_learner(self, teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
        """Build the learner; override it in a subclass for strategies of your own."""
        return self.clda.make_learner(teacher, student)

    def configure_callbacks(self) -> List[Any]:
        """Add ours to the host's."""
        ours = [] if self.learner is None else [Collaboration(self.learner)]
        return [*super().configure_callbacks(), *ours]

    def train_dataprep(self, batch: Any) -> Any:
        """Prepare as the host does, and add the gradient of the KD loss on the target images."""
        prepared = super().train_dataprep(batch)
        if self.learner is not None:
            (*_, source, labels, _), (target, _, ignored) = prepared[:2]
            seed = self.global_step * self.trainer.world_size + self.global_rank
            with of_our_own(seed, target.device):
                self._distil(self.learner, source, labels, target, ignored)
        return prepared

    def _distil(
        self, learner: CollaborativeLearner, source: Tensor, labels: Tensor, target: Tensor, ignored: Tensor
    ) -> None:
        images = self.normalize(target)
        with _keeping_batch_statistics(self.network):
            output = self.network(images)
        loss = learner.distill(
            output,
            images,
            mask=ignored != self.ignore_index,
            view=None if self.clda.view == "none" else partial(self._view, target),
            source_loss=lambda network: F.cross_entropy(
                network(self.normalize(source)), labels, ignore_index=self.ignore_index
            ),
        )
        self.manual_backward(self.clda.weight * loss)

    @torch.no_grad()
    def _view(self, target: Tensor) -> Tensor:
        """Return the target images as the host changes them for its masked loss, position for position.

        The host masks tokens inside the network, and in training mode only; so blocks of the image are blanked here.
        """
        view = self.normalize(self.random_aug_uda(target))
        return blanked(view, self.token_mask_ratio) if self.clda.view == "masked" else view


class Collaboration(CollaborationCallback):
    """The library's callback, which also remembers the world size; its state lies under its name in ``callbacks``."""

    world_size = 1

    def setup(self, trainer: Any, pl_module: Any, stage: Any = None) -> None:
        """Note the world size, before anything is restored."""
        self.world_size = trainer.world_size

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the report."""
        if trainer.is_global_zero:
            print(self.learner.report())

    def state_dict(self) -> Dict[str, Any]:
        """Return the states of learner and teacher, and the world size."""
        return {**super().state_dict(), "world_size": self.world_size}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore learner and teacher, or neither.

        Raises:
            CldaError: If the run had another number of processes, or one of the two does not fit.
        """
        saved = state_dict.get("world_size", self.world_size)
        if saved != self.world_size:
            raise problem(
                "the run is resumed with another number of processes",
                expected=f"{saved}, as the checkpoint was written with",
                received=f"{self.world_size}",
                fix="set trainer.devices and trainer.num_nodes as they were; or start anew from the exported teacher",
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "world_size"})


def check_host(host: type) -> None:
    """Raise unless a class is a training module that the plug-in knows.

    Raises:
        CldaError: If it lacks what we hook into, or prepares its data otherwise.
    """
    wanted = ("train_dataprep", "training_step", "get_optimizers", "configure_optimizers")
    missing = [name for name in wanted if not callable(getattr(host, name, None))]
    if missing or list(inspect.signature(host.train_dataprep).parameters) != ["self", "batch"]:
        raise problem(
            "the host's training module is another one, or of an unknown version",
            expected="UDAVITGeneric of VFM-UDA at commit e154d8f, or UDA of VFM-UDA++ at commit effbb03",
            received=f"{host.__module__}.{host.__qualname__}"
            + (f" without {', '.join(missing)}" if missing else " with another train_dataprep"),
            fix="check out that commit; or mix CollaborativeUDA into your module, whose train_dataprep(batch) returns "
            "((..., source images, labels, ignored), (target images, labels, ignored), ...)",
        )


@contextlib.contextmanager
def _keeping_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch as in training, without moving its running statistics."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
