"""One training on several processes of the CPU that torchrun started: each rank takes its part of every batch."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .self_training import Batch


@contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that torchrun started; a process that it did not start stays alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Return the number of ranks, 1 for a process that is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def cores() -> int:
    """Return this process's share of the machine's cores, which ranks that all take them all would wait for."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def first() -> bool:
    """Return whether this is the rank that shows and writes what all of them computed."""
    return count() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Wait for the other ranks."""
    if count() > 1:
        dist.barrier()


def part(batch: Batch) -> Batch:
    """Return this rank's part of a batch that all ranks have drawn alike."""
    if count() == 1:
        return batch
    rank = dist.get_rank()
    return Batch(
        *[getattr(batch, name).chunk(count())[rank] for name in ("images", "labels", "target", "target_strong")]
    )


def averaging_gradients(model: nn.Module) -> nn.Module:
    """Return the model in DistributedDataParallel, which also gives every rank the weights of the first."""
    return model if count() == 1 else DistributedDataParallel(model)


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's BatchNorm statistics, which are those of its part of the data."""
    if count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
