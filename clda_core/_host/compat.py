"""The one place that knows which torch is installed: newer features where present, from torch 1.7.1 on."""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .layout import is_dense


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float, *, alike: bool = False) -> None:
    """Move each target in place towards its source: ``target <- target + weight · (source - target)``.

    Fused across tensors where torch has the kernel. Sources are brought to their target's dtype and device, unless
    ``alike`` says that they are of these already.
    """
    fused = getattr(torch, "_foreach_lerp_", None)
    with torch.no_grad():
        matched = sources if alike else [source.to(target) for target, source in zip(targets, sources)]
        if fused is not None and matched:
            fused(targets, matched, weight)
            return
        for target, source in zip(targets, matched):
            target.lerp_(source, weight)


def halve_towards_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Write the mean of each target and its source into the target; an infinity that both hold stays.

    ``lerp`` would make NaN of it: of a mask, or of the start of a range observer.
    """
    pairs = list(zip(targets, sources))
    with torch.no_grad():
        # Old versions of torch take tensors of one dtype at a time.
        for kind in dict.fromkeys((target.dtype, target.device) for target in targets):
            chosen = [pair for pair in pairs if (pair[0].dtype, pair[0].device) == kind]
            torch._foreach_mul_([target for target, _ in chosen], 0.5)
            torch._foreach_add_([target for target, _ in chosen], [source for _, source in chosen], alpha=0.5)


def clones(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return copies without a graph, those of one dtype and device in a few kernels where torch has them."""
    with torch.no_grad():
        if _fused_copy(tensors) is None:
            return [tensor.clone() for tensor in tensors]
        copies = [torch.empty_like(tensor) for tensor in tensors]
        copy_(copies, tensors)
    return copies


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Write each source into its target, those of one dtype and device in a few kernels where torch has them."""
    fused = _fused_copy(targets)
    with torch.no_grad():
        if fused is None:
            for target, source in zip(targets, sources):
                target.copy_(source)
            return
        by_kind: Dict[Any, Tuple[List[Tensor], List[Tensor]]] = {}
        for target, source in zip(targets, sources):
            chosen = by_kind.setdefault((target.dtype, target.device), ([], []))
            chosen[0].append(target)
            chosen[1].append(source)
        for chosen in by_kind.values():
            fused(*chosen)


def _fused_copy(tensors: Sequence[Tensor]) -> Optional[Callable[..., None]]:
    """Return the operation that writes to all of these tensors, if torch has one: from 2.1 on, for no subclass."""
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    return getattr(torch, "_foreach_copy_", None) if plain else None


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norms of tensors that are not empty, float32 on the first one's device.

    Fused where torch has the kernel.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(0, device=tensors[0].device)
    fused = getattr(torch, "_foreach_norm", None)
    found = [tensor.norm() for tensor in filled] if fused is None else list(fused(filled))
    if len({(norm.dtype, norm.device) for norm in found}) > 1:
        found = [norm.float().to(tensors[0].device) for norm in found]
    return torch.stack(found).float().to(tensors[0].device)


@functools.lru_cache(maxsize=None)
def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64, which MPS has not."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def wide(value: Tensor) -> Tensor:
    """Convert to float64, which autocast leaves alone, where the device has it."""
    return value.double() if has_float64(value.device) else value.float()


def adam(parameters: Sequence[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """Return Adam, all parameters in one kernel where torch has that for them, or else in a few, or one by one."""
    options: Dict[str, Any] = {}
    if all(type(one) in (Tensor, nn.Parameter) and one.is_floating_point() for one in parameters):
        # What the fused kernel cannot do is found out as late as in its first step.
        devices = {parameter.device.type for parameter in parameters}
        flat = devices <= {"cpu", "cuda"} and all(map(is_dense, parameters))
        options = {"fused": True} if flat and _has_fused_adam() else {"foreach": True}
    try:
        return torch.optim.Adam(parameters, lr=learning_rate, **options)
    except (TypeError, RuntimeError):  # before torch 1.12; on a device without the kernel
        return torch.optim.Adam(parameters, lr=learning_rate)


@functools.lru_cache(maxsize=1)
def has_complex_adam() -> bool:
    """Return whether Adam takes the real and the imaginary part of a parameter for two: from torch 1.13 on."""
    parameter = torch.tensor([1 + 1j], requires_grad=True, device="cpu")
    parameter.grad = torch.tensor([3 + 0.1j], device="cpu")
    torch.optim.Adam([parameter], lr=0.1).step()
    return bool((parameter.detach() - (0.9 + 0.9j)).abs().max() < 1e-3)


@functools.lru_cache(maxsize=1)
def _has_fused_adam() -> bool:
    try:
        torch.optim.Adam([torch.zeros(1, requires_grad=True, device="cpu")], fused=True)
    except (TypeError, RuntimeError):  # before torch 1.13; before 2.4, where the kernel is for CUDA alone
        return False
    return True


def fast_paths() -> Dict[str, bool]:
    """Return which of the newer features that this module looks for this torch has."""
    kernels = {name: hasattr(torch, f"_foreach_{name}") for name in ("copy_", "lerp_", "norm")}
    return {
        **{f"foreach {name.rstrip('_')}": there for name, there in kernels.items()},
        "fused Adam": _has_fused_adam(),
        "Tensor.view(dtype)": _has_view_of_bits(),
        "inference mode": hasattr(torch, "inference_mode"),
    }


def _has_view_of_bits() -> bool:
    try:
        torch.zeros(1, device="cpu").view(torch.int32)
    except TypeError:  # before torch 1.8
        return False
    return True


def leading_bits(values: Tensor, bits: int, *, overwrite: bool = False) -> Tensor:
    """Return the leading ``bits`` bits of each float32 value as a non-negative integer: sign, exponent, top mantissa.

    Args:
        values: Shape ``(n,)``, float32, without a gradient.
        bits: 9 to 31.
        overwrite: Whether their memory may be used for the result, which saves most of the time.
    """
    try:
        pattern = values.view(torch.int32)
    except TypeError:  # Tensor.view(dtype) came with torch 1.8
        if values.device.type != "cpu":
            return leading_bits_by_search(values, bits)
        import numpy

        pattern = torch.from_numpy(values.numpy().view(numpy.int32))
    shift, mask = _shift_and_mask(bits)
    if overwrite:
        pattern >>= shift
    else:
        pattern = pattern >> shift
    return pattern.bitwise_and_(mask)


@functools.lru_cache(maxsize=4)
def _shift_and_mask(bits: int) -> Tuple[Tensor, Tensor]:
    """Return the operands as tensors, with which integer operations take half the time that they take with numbers."""
    shift, mask = torch.tensor([32 - bits, (1 << bits) - 1], dtype=torch.int32, device="cpu").unbind()
    return shift, mask


def leading_bits_by_search(values: Tensor, bits: int) -> Tensor:
    """Return :func:`leading_bits` (all NaNs under one code) by comparison with the smallest value of each code."""
    import numpy

    codes = numpy.arange(1 << (bits - 1), dtype=numpy.int32) << (32 - bits)
    edges = torch.from_numpy(codes.view(numpy.float32)).to(values.device)
    infinity = 255 << (bits - 9)
    found = torch.bucketize(values.abs(), edges[: infinity + 1], right=True) - 1
    found = torch.where(torch.isnan(values), torch.full_like(found, len(edges) - 1), found)
    return found + (values < 0) * len(edges)


def autocast_off(device_type: str) -> ContextManager[Any]:
    """Return a context in which no operation on that kind of device is cast to a lower precision."""
    if not hasattr(torch, "autocast"):  # before 1.10 only CUDA had it, under this name
        return torch.cuda.amp.autocast(enabled=False)
    try:
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:  # a device without autocast, such as meta
        return nullcontext()


def out_of_inference_mode() -> ContextManager[Any]:
    """Return a context in which new tensors can be trained, also where the caller is in ``torch.inference_mode()``."""
    mode = getattr(torch, "inference_mode", None)  # came with torch 1.9
    return nullcontext() if mode is None else mode(False)


def made_in_inference_mode(tensor: Tensor) -> bool:
    """Return whether autograd refuses to save a tensor, since it was made in ``torch.inference_mode()``."""
    asked = getattr(tensor, "is_inference", None)  # came with torch 1.9
    return asked is not None and bool(asked())


def load_plain(path: str) -> Any:
    """Load a file to the CPU, of tensors and plain Python types only where torch can check that: from 1.13 on."""
    # Asked for rather than tried: a damaged file may raise a TypeError too, and must not be read without the check.
    if "weights_only" in inspect.signature(torch.load).parameters:
        return torch.load(path, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu")


def noting_draws(noted: List[str]) -> Optional[ContextManager[Any]]:
    """Return a context that lists this thread's draws from global generators in ``noted``; None before torch 1.13."""
    tag = getattr(getattr(torch, "Tag", None), "nondeterministic_seeded", None)
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        return None
    if tag is None:
        return None
    mode: Any = TorchDispatchMode

    class Noting(mode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if tag in func.tags and kwargs.get("generator") is None and _drops(func, args, kwargs):
                noted.append(str(func))
            return func(*args, **kwargs)

    return Noting()


def _drops(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operation with a probability of dropout (fused attention) drops anything; True without one."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


def parametrized(module: nn.Module) -> bool:
    """Return whether torch.nn.utils.parametrize, which came with torch 1.9, computes tensors of this module."""
    kind = getattr(getattr(nn.utils, "parametrize", None), "ParametrizationList", None)
    lists = getattr(module, "parametrizations", None)  # the tables of a scripted module have no get()
    return kind is not None and isinstance(lists, nn.Module) and any(isinstance(one, kind) for one in lists.children())


def uninitialized(tensor: Tensor) -> bool:
    """Return whether this is a parameter or buffer of a lazy module (from torch 1.8 on) that has no shape yet."""
    is_lazy = getattr(nn.parameter, "is_lazy", None)
    return is_lazy is not None and bool(is_lazy(tensor))
