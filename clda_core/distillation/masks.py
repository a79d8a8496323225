"""Which positions count: masks, the weights that they are, and whether what stands at these positions can be used."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from ..errors import check_number, problem

__all__ = ["check_values", "leaves_nothing", "mask_weights", "nearest", "per_position", "valid_mask", "weighted_mean"]


def valid_mask(mask: Optional[Tensor], ignore_index: Optional[int]) -> Optional[Tensor]:
    """Return a mask as the strategies take it: bool or float weights. An integer label map becomes a bool mask.

    A position of a label map counts where its label is neither ``ignore_index`` nor negative, which is never a class.

    Raises:
        CldaError: If the mask is of integers and there is no ``ignore_index``: whether its zeros count, as those of a
            label map do and those of a 0/1 mask do not, cannot be told; or if ``ignore_index`` is no integer.
    """
    if ignore_index is not None:
        check_number("ignore_index", ignore_index, integer=True)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise problem(
            "mask is no tensor",
            expected="bool or float weights (N, ...), or an integer label map",
            received=type(mask).__name__,
            fix="pass torch.as_tensor(mask)",
        )
    if mask.dtype == torch.bool or mask.is_floating_point() or mask.is_complex():
        return mask
    if ignore_index is None:
        raise problem(
            "an integer mask is ambiguous",
            expected="bool or float weights, or a label map together with ignore_index=",
            received=f"a mask of {mask.dtype} without ignore_index",
            fix="pass mask.bool() if it holds 0 and 1, or ignore_index= (255, -100, ...) if it holds labels",
        )
    labels = mask.detach().long()  # in uint8, -100 would be compared as 156
    return (labels != ignore_index) & (labels >= 0)


def leaves_nothing(mask: Tensor) -> bool:
    """Return whether a mask ignores every position."""
    return not bool((mask != 0).any())


def mask_weights(mask: Tensor, like: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the mask as weights ``(N, *positions)`` of which the largest is 1, on its own grid or one per sample."""
    mask = per_position(mask, like, grid, "mask").detach()
    if mask.dtype == torch.bool:
        return mask.to(dtype)
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32)).masked_fill(~(mask > 0), 0.0)
    largest = mask.max()  # only ratios matter, and the sum of huge weights overflows
    return (mask / largest.masked_fill(largest == 0, 1.0)).to(dtype)


def per_position(values: Tensor, like: Tensor, grid: Sequence[int], what: str) -> Tensor:
    """Return a mask or labels as ``(N, *positions)``, on their own grid or on one position a sample.

    Raises:
        CldaError: If the values cannot belong to the positions of ``like`` brought to ``grid``.
    """
    batch, dims = like.shape[0], like.dim() - 2
    if not isinstance(values, Tensor) or values.is_complex():
        raise problem(
            f"the {what} cannot be used",
            expected="a bool, float or integer tensor",
            received=str(values.dtype) if isinstance(values, Tensor) else type(values).__name__,
            fix="pass a tensor on the logits' device",
        )
    if values.device != like.device:
        raise problem(
            f"the {what} and the logits are on different devices",
            expected=str(like.device),
            received=str(values.device),
            fix="move both to one device",
        )
    shape = tuple(values.shape)
    if len(shape) == dims + 2 and shape[1] == 1:
        values = values.squeeze(1)
    elif len(shape) == 1:
        values = values.reshape(-1, *[1] * dims)
    sizes = list(zip(values.shape[1:], grid))
    comparable = all(mine >= its for mine, its in sizes) or all(mine <= its for mine, its in sizes)
    if values.dim() != dims + 1 or len(values) != batch or not values.numel() or not comparable:
        positions = ", ".join(map(str, [batch, *grid]))
        raise problem(
            f"the {what} has a wrong shape",
            expected=f"({batch},) or ({positions}), the latter at any resolution",
            received=f"shape {shape}",
            fix="pass one value per sample, or one per position",
        )
    return values


def nearest(positions: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize ``(N, *positions)`` to ``(N, *grid)``, taking the value at the centre of each new position.

    ``F.interpolate(mode="nearest")`` takes the corner, which bilinear interpolation of the logits may not even read.
    """
    for dim, size in enumerate(grid, start=1):
        if positions.shape[dim] != size:
            centres = torch.arange(size, dtype=torch.float32, device=positions.device) + 0.5
            positions = positions.index_select(dim, (centres * (positions.shape[dim] / size)).long())
    return positions


def weighted_mean(values: Tensor, weights: Optional[Tensor]) -> Tensor:
    """Return ``Σ w·v / Σ w`` over all elements, 0 where all weights are 0; the plain mean without weights."""
    if weights is None:
        return values.mean()
    total = weights.sum()
    return (weights * values).sum() / total.masked_fill(total == 0, 1.0)


def check_values(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> None:
    """Raise on values no loss can use. Looks only at tensors on the CPU: elsewhere it would wait for the device.

    The losses themselves pass NaN and infinity on, since a step under AMP may overflow and is then skipped.

    Args:
        student: Logits ``(N, C, ...)``.
        teacher: Logits ``(N, C', ...)``, possibly on another grid.
        mask: As for :class:`~clda_core.distillation.Distillation`.

    Raises:
        CldaError: If the mask is of integers, every position is ignored, a float mask is negative or not finite, or
            logits at a position that counts are not finite.
    """
    valid_mask(mask, None)
    if not all(tensor.device.type == "cpu" for tensor in (student, teacher, mask) if tensor is not None):
        return
    if mask is not None:
        floating = mask.is_floating_point()
        if floating and not bool((torch.isfinite(mask) & (mask >= 0)).all()):
            raise problem(
                "the mask has negative or non-finite weights",
                expected="finite weights >= 0",
                received=f"between {mask.min().item():g} and {mask.max().item():g}",
                fix="pass weights >= 0, for example the confidence of pseudo-labels",
            )
        if leaves_nothing(mask):
            raise problem(
                "all positions are ignored",
                expected="at least one position that counts",
                received=f"a mask of shape {tuple(mask.shape)} without one",
                fix="skip the batch, or check what made the mask",
            )
    for name, logits in (("student", student), ("teacher", teacher)):
        finite = torch.isfinite(logits.detach())
        if mask is not None and not bool(finite.all()):
            weights = mask_weights(mask, logits, logits.shape[2:], torch.float32)
            finite = finite | (nearest(weights, logits.shape[2:]) == 0).unsqueeze(1)
        if not bool(finite.all()):
            raise problem(
                f"the {name}'s logits are not finite",
                expected="finite logits at every position that counts",
                received=f"{int((~finite).sum())} NaN or infinite of {finite.numel()}",
                fix=f"look for an overflow in the {name}'s forward pass, or leave these positions out with mask=",
            )
