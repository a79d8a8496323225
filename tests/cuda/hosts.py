"""Pairs of networks on a device, their images, and the training step of a host."""

from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CollaborativeLearner, Outputs
from clda_core.lead import FixedTrust
from tests.helpers import every_step, seeded

CLASSES = 5
Pair = Tuple[nn.Module, nn.Module]


class Segmenter(nn.Module):
    """Convolutions, BatchNorm and dropout; logits at half the resolution, and features."""

    def __init__(self, width: int, depth: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout))
            for _ in range(depth)
        )
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x), x


class Encoder(nn.Module):
    """PyTorch's Transformer layers over patches; logits and features at the patches."""

    def __init__(self, width: int, depth: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        x = self.embed(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits, features = (y.transpose(1, 2).reshape(len(y), -1, *grid) for y in (self.head(x), x))
        return logits, features


def segmenters(device: torch.device, dropout: float = 0.1, *, alike: bool = False) -> Pair:
    """Return a frozen teacher in eval mode and a student in training mode; ``alike`` says that they are as wide."""
    teacher = seeded(lambda: Segmenter(16, 3, dropout), 0)
    student = seeded(lambda: Segmenter(16 if alike else 8, 2, dropout), 1)
    return teacher.to(device).eval().requires_grad_(False), student.to(device)


def encoders(device: torch.device, dropout: float = 0.1, *, alike: bool = False) -> Pair:
    teacher = seeded(lambda: Encoder(24, 3, dropout), 0)
    student = seeded(lambda: Encoder(24 if alike else 12, 2, dropout), 1)
    return teacher.to(device).eval().requires_grad_(False), student.to(device)


PAIRS: Dict[str, Callable[..., Pair]] = {"segmenters": segmenters, "encoders": encoders}


def both(output: Any) -> Outputs:
    """Read logits and features, as ``extract=``."""
    return output if isinstance(output, Outputs) else Outputs(output[0], (output[1],))


def images(device: torch.device, step: int = 0, count: int = 4, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(step)).to(device)


def labels(device: torch.device, grid: Any, step: int = 0, count: int = 4) -> Tensor:
    """Return a label map, some of it 255."""
    made = torch.randint(0, CLASSES + 1, (count, *grid), generator=torch.Generator().manual_seed(step))
    return torch.where(made == CLASSES, torch.full_like(made, 255), made).to(device)


def learner_of(pair: Pair, **options: Any) -> CollaborativeLearner:
    """Return a learner that makes a round at every step and trusts the student, unless told otherwise."""
    return CollaborativeLearner(*pair, **{"extract": both, "schedule": every_step(), "trust": FixedTrust(), **options})


def supervised(network: nn.Module, x: Tensor) -> Tensor:
    """Return a host's loss on source data; deterministic on CUDA, where a cross-entropy over a grid is not."""
    logits = network(x)[0]
    targets = F.one_hot(labels(x.device, logits.shape[2:], count=len(x)) % CLASSES, CLASSES).movedim(-1, 1)
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def iteration(
    learner: CollaborativeLearner,
    optimizer: Any,
    step: int,
    device: torch.device,
    *,
    scaler: Any = None,
    autocast: Optional[torch.dtype] = None,
    **options: Any,
) -> Tensor:
    """Make one step of a host, and return the loss, without waiting for it."""
    x = images(device, step)
    optimizer.zero_grad()
    with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        loss = supervised(learner.student, images(device, 100 + step))
        loss = loss + learner.distill(learner.student(x), x, **options)
    (loss if scaler is None else scaler.scale(loss)).backward()
    learner.step(optimizer, scaler=scaler)
    if scaler is not None:
        scaler.update()
    return loss.detach()


def generators(device: torch.device) -> Tuple[bytes, ...]:
    """Return the states of the CPU's generator and the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)


@contextmanager
def no_draw(device: torch.device) -> Iterator[None]:
    """Fail if the block leaves a global generator in another state."""
    before = generators(device)
    yield
    assert generators(device) == before


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """Let CUDA raise where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
