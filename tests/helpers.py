"""Small networks, host loops, and what must be the same after the learner has worked on a user's objects."""

import io
import pickle
import random
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CollaborativeLearner, Schedule
from clda_core.distillation import kl_distillation
from clda_core.lead import FixedTrust

INPUTS, CLASSES = 5, 3
SAMPLES = 64
"""Enough rows for relations and alignments by activations."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.fc(x))))


class Net(nn.Module):
    """BatchNorm, dropout, repeated blocks, a head that no loss uses, a frozen parameter, a non-persistent buffer."""

    def __init__(self, depth: int = 2, width: int = 6, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)
        self.unused = nn.Linear(width, 2)
        self.unused.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a model was deep-copied")

    def features(self, x: Tensor) -> List[Tensor]:
        values = [torch.relu(self.stem(x))]
        for block in self.blocks:
            values.append(block(values[-1]))
        return values

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1]) * self.scale


class Segmenter(nn.Module):
    """Logits at a quarter of the resolution."""

    def __init__(self, width: int = 4, stride: int = 2, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride, 1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))))


def seeded(build: Callable[[], Any], seed: int) -> Any:
    """Build with a seed of its own, and leave the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def networks(teacher_depth: int = 3, student_depth: int = 2, seed: int = 0) -> Tuple[Net, Net]:
    """Return a teacher in eval mode with BatchNorm statistics of its own, and a student in training mode."""
    teacher = seeded(lambda: Net(teacher_depth), seed)
    student = seeded(lambda: Net(student_depth), seed + 1)
    for index, block in enumerate(teacher.blocks):
        block.norm.running_mean.fill_(0.1 * index)
        block.norm.running_var.fill_(1.0 + 0.1 * index)
    return teacher.eval(), student.train()


def batch(seed: int = 0, count: int = SAMPLES) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 0, count: int = SAMPLES) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def images(seed: int = 0, count: int = 2, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def every_step(**options: Any) -> Schedule:
    return Schedule(**{"warmup": 0, "interval": 1, "observe_every": 1, **options})


def make_learner(teacher: nn.Module, student: nn.Module, **options: Any) -> CollaborativeLearner:
    """Return a learner that makes a round at every step, and trusts the student in each."""
    return CollaborativeLearner(teacher, student, **{"schedule": every_step(), "trust": FixedTrust(), **options})


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)


def host_loss(student: nn.Module, step: int) -> Tensor:
    return F.cross_entropy(student(batch(100 + step)), labels(step))


def train_step(
    learner: CollaborativeLearner, optimizer: Any, step: int, before_step: Optional[Callable[[], Any]] = None
) -> None:
    """One iteration of a host: a supervised loss on source data, and KD on target data."""
    target = batch(step)
    optimizer.zero_grad()
    loss = host_loss(learner.student, step) + learner.distill(learner.student(target), target)
    loss.backward()
    if before_step is not None:
        before_step()
    learner.step(optimizer)


def train(learner: CollaborativeLearner, optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        train_step(learner, optimizer, step)


# ------------------------------------------------------------------------------------------- bits, and what is left


def bits(value: Any) -> Any:
    """Return something that is equal for bitwise equal nested structures of tensors and plain data."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    if isinstance(value, float):
        return value.hex()
    return value


def values(model: nn.Module) -> Dict[str, Any]:
    """Return the bits of all parameters and buffers, also of those that no checkpoint holds."""
    return {name: bits(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def traces(model: nn.Module) -> Dict[str, Any]:
    """Return everything beside the values that an outsider could leave on a model, by what it is."""
    found: Dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: class"] = type(module)
        found[f"{name}: attributes"] = sorted(vars(module))
        found[f"{name}: training"] = module.training
        found[f"{name}: modules"] = [(key, id(child)) for key, child in module._modules.items()]
        found[f"{name}: parameters"] = [(key, id(parameter)) for key, parameter in module._parameters.items()]
        found[f"{name}: buffers"] = [(key, id(buffer)) for key, buffer in module._buffers.items()]
        found[f"{name}: hooks"] = {
            key: list(value) for key, value in vars(module).items() if key.endswith("hooks") and value
        }
    for name, parameter in model.named_parameters():
        found[f"{name}: address"] = parameter.data_ptr()
        found[f"{name}: requires_grad"] = parameter.requires_grad
        found[f"{name}: is_leaf"] = parameter.is_leaf
        found[f"{name}: attributes"] = sorted(vars(parameter))
        found[f"{name}: hooks"] = list(parameter._backward_hooks or ())
        gradient = parameter.grad
        found[f"{name}: grad"] = None if gradient is None else (gradient.data_ptr(), gradient._version, bits(gradient))
    return found


def random_states() -> Tuple[Any, ...]:
    kind, keys, *rest = numpy.random.get_state()
    return bits(torch.get_rng_state()), random.getstate(), kind, keys.tobytes(), rest


@contextmanager
def no_traces(*models: nn.Module, values_too: bool = False, rng: bool = True) -> Iterator[None]:
    """Fail if the block leaves anything on the models or draws from a global random generator."""
    before = [traces(model) for model in models]
    values_before = [values(model) for model in models]
    state, modes = random_states(), (torch.is_grad_enabled(), torch.get_default_dtype())
    yield
    for model, traced, valued in zip(models, before, values_before):
        assert traces(model) == traced
        if values_too:
            assert values(model) == valued
    if rng:
        assert random_states() == state
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == modes


@contextmanager
def nothing_changed(learner: CollaborativeLearner, optimizer: Any = None) -> Iterator[None]:
    """Fail if the block changes the models, the optimizer, the learner's state or a random state."""
    optimizer_before = None if optimizer is None else bits(optimizer.state_dict())
    learner_before = bits(learner.state_dict())
    with no_traces(learner.teacher, learner.student, values_too=True):
        yield
    assert bits(learner.state_dict()) == learner_before
    if optimizer is not None:
        assert bits(optimizer.state_dict()) == optimizer_before


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loaded(data: bytes) -> Any:
    """Load what :func:`saved` wrote, allowing plain types and tensors only where torch can check that."""
    try:
        return torch.load(io.BytesIO(data), weights_only=True)
    except TypeError:  # before torch 1.13
        return _PlainUnpickler.checked(data)


class _PlainUnpickler(pickle.Unpickler):
    """Stands in for ``weights_only=True``: only what torch itself needs for tensors may be looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("torch", "collections"):
            raise pickle.UnpicklingError(f"{module}.{name} is no plain type")
        return super().find_class(module, name)

    @classmethod
    def checked(cls, data: bytes) -> Any:
        class Module:
            Unpickler = cls
            load = staticmethod(pickle.load)

        return torch.load(io.BytesIO(data), pickle_module=Module)


def scheduled_noise(x: Tensor) -> Tensor:
    """What a model that draws even in eval mode does."""
    return x + 0.01 * torch.randn_like(x)


def make_sam() -> Any:
    """Return the class of a small SAM optimizer, as its users have it: two steps, and a ``step`` with a closure."""

    class SAM(torch.optim.Optimizer):
        def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
            super().__init__(params, dict(rho=rho, **options))
            self.base_optimizer = base(self.param_groups, **options)
            self.param_groups = self.base_optimizer.param_groups

        @torch.no_grad()
        def first_step(self, zero_grad: bool = False) -> None:
            gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack(gradients).norm()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    e_w = p.grad * (group["rho"] / (norm + 1e-12))
                    p.add_(e_w)
                    self.state[p]["e_w"] = e_w
            if zero_grad:
                self.zero_grad()

        @torch.no_grad()
        def second_step(self, zero_grad: bool = False) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(self.state[p]["e_w"])
            self.base_optimizer.step()
            if zero_grad:
                self.zero_grad()

        def step(self, closure: Any = None) -> None:
            assert closure is not None, "SAM requires closure, but it was not provided"
            closure = torch.enable_grad()(closure)
            self.first_step(zero_grad=True)
            closure()
            self.second_step()

    return SAM


class FakeScaler:
    """A GradScaler for the CPU, where old versions of torch have none: skips a step whose gradients overflowed."""

    def __init__(self, scale: float = 1024.0) -> None:
        self.factor = scale
        self.unscaled: Dict[int, bool] = {}

    def get_scale(self) -> float:
        return self.factor

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor

    def unscale_(self, optimizer: Any) -> None:
        if id(optimizer) in self.unscaled:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self.factor)
        self.unscaled[id(optimizer)] = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def step(self, optimizer: Any) -> Any:
        if id(optimizer) not in self.unscaled:
            self.unscale_(optimizer)
        return optimizer.step() if self.unscaled[id(optimizer)] else None

    def update(self, new_scale: Optional[float] = None) -> None:
        self.factor = self.factor if new_scale is None else new_scale
        self.unscaled.clear()


class WithParameter(nn.Module):
    """A KD loss that owns a parameter; its optimizer's moments tell at which scale the gradients came."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        return self.factor * kl_distillation(student, teacher, mask=mask)

    @staticmethod
    def moments(learner: CollaborativeLearner) -> List[float]:
        (state,) = learner.state_dict()["projectors"]["optimizer"]["optimizer"]["state"].values()
        return [float(state["exp_avg"]), float(state["exp_avg_sq"])]


def scalers() -> List[Callable[[], Any]]:
    real = getattr(getattr(torch, "amp", None), "GradScaler", None)
    return [FakeScaler] + ([] if real is None else [lambda: real("cpu", init_scale=1024.0)])
