"""The teacher's weight update alone, against the fused kernel and other packages' averages on the same tensors."""

from __future__ import annotations

import copy
from typing import Callable, Dict, Iterator

import torch
from torch import nn

from benchmarks.cost.figures import Figure, figure
from benchmarks.cost.others import missing, other
from benchmarks.cost.settings import Setting
from benchmarks.cost.timing import OFTEN, interleaved, ratio, spread
from clda_core._host.names import looking_once
from clda_core.layers import canonical_buffers, canonical_parameters, group_layers
from clda_core.update import Average, RoundContext

BANDWIDTH, OTHERS = 0.9, 1.0
IN_CACHE = 64 * 2**20
"""Bytes below which the bandwidth is not judged: they may lie in the processor's cache, where no memory is moved."""
_DECAY = 0.99
_PASSES = 3  # read the target, read the source, write the target


def weights(setting: Setting, device: torch.device, repeats: int) -> Iterator[Figure]:
    """Move every layer of a network towards another of the same architecture, BatchNorm statistics too.

    As inside a round, which looks once for all that it does whether a tensor was replaced: that is in the iteration.
    """
    target, source = setting.teacher().to(device), setting.teacher().to(device)
    tensors, others = _floating(target), _floating(source)
    count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    update, context = Average(decay=_DECAY, buffers="average"), _everything(target, source)
    averaged = torch.optim.swa_utils.AveragedModel(
        copy.deepcopy(target), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(_DECAY), use_buffers=True
    )
    averaged.update_parameters(source)
    tasks: Dict[str, Callable[[], object]] = {
        "Average": lambda: update.apply(context),
        "_foreach_lerp_": lambda: torch._foreach_lerp_(tensors, others, 1 - _DECAY),
        "torch's AveragedModel": lambda: averaged.update_parameters(source),
    }
    timm = other("timm.utils")
    if timm is not None:
        ema = timm.ModelEmaV3(target, decay=_DECAY)
        tasks["timm's ModelEmaV3"] = lambda: ema.update(source)
    with torch.no_grad(), looking_once(target, source):
        times = interleaved(tasks, repeats=OFTEN * repeats, device=device)
    where = f"{setting.name}, {count / 2**20:,.0f} MiB in {len(tensors)} tensors"
    for name, seconds in times.items():
        rates = spread([_PASSES * count / 1e9 / second for second in seconds])
        yield figure("weights", f"{name}: bytes read and written a second", where, rates, unit="GB/s")
    found, budget = ratio(times, "_foreach_lerp_", "Average"), None if count < IN_CACHE else BANDWIDTH
    note = "" if budget else "in the processor's cache, where picking the tensors out of the models shows; not judged"
    yield figure("weights", "Average: bytes a second / _foreach_lerp_", where, found, at_least=budget, note=note)
    for name in ("timm's ModelEmaV3", "torch's AveragedModel"):
        what = f"Average: time / {name}"
        if name in times:
            yield figure("weights", what, where, ratio(times, "Average", name), at_most=OTHERS)
        else:
            yield Figure("weights", what, where, None, at_most=OTHERS, note=missing("timm"))


def _floating(model: nn.Module) -> list:
    tensors = [*canonical_parameters(model).values(), *canonical_buffers(model).values()]
    return [tensor.detach() for tensor in tensors]


def _everything(target: nn.Module, source: nn.Module) -> RoundContext:
    layers = group_layers(target)
    return RoundContext(
        teacher=target,
        student=source,
        layers=layers,
        related={layer.name: layer for layer in group_layers(source)},
        inputs=None,
        mask=None,
        forward=lambda model, inputs: model(inputs),
    )
