"""Parameters that FSDP2 divides among the ranks (DTensor): each rank's part, and what must be known of the others'."""

from __future__ import annotations

import sys
from typing import Any, Iterable, List, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import problem
from .ranks import adding, mean_where_seen, share_of_mean
from .undo import without_gradients


def is_sharded(tensor: Optional[Tensor]) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, any other tensor itself: detached, on the same memory."""
    sharded: Any = tensor.detach()
    if not is_sharded(sharded):
        return sharded  # type: ignore[no-any-return]
    with torch.no_grad():
        part: Tensor = sharded.to_local()
    return part


def here(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, detached; any other tensor itself, which takes no operation."""
    return local(tensor) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a detached tensor gathered from all ranks; each of them has to call this."""
    sharded: Any = tensor.detach()
    full: Tensor = sharded.full_tensor() if is_sharded(sharded) else sharded
    return full


def part_for(value: Tensor, target: Tensor) -> Tensor:
    """Return the part of ``value`` that belongs to this rank's part of ``target``, a tensor of the same shape."""
    if not is_sharded(target):
        return whole(value)
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = target
    mesh = sharded.device_mesh
    given: Any = value.detach()
    if not is_sharded(given):
        given = DTensor.from_local(given.to(target.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(given.redistribute(mesh, sharded.placements))


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part as a tensor that is sharded like another one."""
    if not is_sharded(like):
        return part
    sharded: Any = like
    wrapped: Tensor = type(sharded.detach()).from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return wrapped


def sum_over_shards(tensor: Tensor, of: Sequence[Optional[Tensor]]) -> Tensor:
    """Return a figure summed over the ranks that hold the other parts of sharded tensors; itself if none is sharded."""
    sharded: List[Any] = [one for one in of if is_sharded(one)]
    if not sharded:
        return tensor
    mesh = sharded[0].device_mesh
    summed = tensor.clone()
    dist.all_reduce(summed, group=mesh.get_group(mesh.ndim - 1))
    return summed


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> List[Optional[Tensor]]:
    """Differentiate by parameters of a model of FSDP2, averaged over the ranks with data; ``.grad`` stays as it was.

    FSDP2 gathers and divides in ``backward()`` alone, not in ``torch.autograd.grad``. Only ``parameters`` may require
    gradients.
    """
    if not loss.requires_grad:
        return [None] * len(parameters)
    with without_gradients(parameters):
        (loss * share_of_mean(loss.device)).backward()  # type: ignore[no-untyped-call]
        found = [parameter.grad for parameter in parameters]
    plain = [index for index, parameter in enumerate(parameters) if not is_sharded(parameter)]
    if plain:
        for index in plain:
            gradient = found[index]
            if gradient is not None and gradient.is_sparse:
                found[index] = gradient.to_dense()
        with adding(True):  # the loss already is zero where there is no data
            averaged = mean_where_seen([found[index] for index in plain], [parameters[index] for index in plain])
        for index, gradient in zip(plain, averaged):
            found[index] = gradient
    return found


def reshard(modules: Iterable[nn.Module]) -> bool:
    """Let the modules of FSDP2 hold their sharded parameters, in place of the gathered ones of a forward pass.

    Gathered parameters would not follow what is written to the sharded ones.

    Returns:
        Whether there are such modules.
    """
    kind = _class("FSDPModule")
    found: List[Any] = [] if kind is None else [module for module in modules if isinstance(module, kind)]
    for module in found:
        module.reshard()
    return bool(found)


def check_sharding(whose: str, model: nn.Module) -> None:
    """Raise unless a model is whole on every rank, or sharded by FSDP2 alone."""
    flat = _class("FullyShardedDataParallel")
    if flat is not None and any(isinstance(module, flat) for module in model.modules()):
        raise problem(
            f"the {whose} is wrapped in FullyShardedDataParallel, whose flat parameters hide the layers",
            expected="a model sharded by FSDP2, or whole on every rank",
            received="FSDP1",
            fix="shard with torch.distributed.fsdp.fully_shard (torch 2.6 or newer), or use DistributedDataParallel",
        )
    sharded: List[Any] = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    if not sharded:
        return
    kind = _class("FSDPModule")
    by_fsdp = kind is not None and any(isinstance(module, kind) for module in model.modules())
    layouts = {(parameter.device_mesh, tuple(parameter.placements)[:-1]) for parameter in sharded}
    mesh, outer = next(iter(layouts))
    if (
        not by_fsdp
        or len(layouts) > 1
        or not all(placement.is_replicate() for placement in outer)
        or not all(parameter.placements[-1].is_shard() for parameter in sharded)
    ):
        raise problem(
            f"the {whose} is sharded in a way that is not supported",
            expected="parameters divided by fully_shard (torch 2.6 or newer) over one mesh",
            received=f"{sharded[0].placements} on a mesh of {mesh.ndim} dimensions",
            fix="use fully_shard alone, without tensor parallelism",
        )


def _class(name: str) -> Any:
    """Return a class of torch.distributed.fsdp; ``None`` if nobody has imported that, for it takes time."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, None)
