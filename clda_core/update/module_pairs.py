"""Which modules of related layers are averaged into which."""

from __future__ import annotations

import weakref
from typing import AbstractSet, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from torch import nn

from .._host.names import canonical_modules
from ..layers import Layer, local_names
from .base import RoundContext
from .norms import NO_STATISTIC

__all__ = ["ModulePair", "paired_modules"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ModulePair(NamedTuple):
    """A teacher's module and the student's that is averaged into it.

    Attributes:
        layer: The teacher layer's name.
        name: The teacher module's name.
        other: The student module's.
        teacher: Weak reference to the teacher's module.
        student: Weak reference to the student's.
        depthwise: Whether both convolve each channel by itself.
        tensors: Canonical by local name.
    """

    layer: str
    name: str
    other: str
    teacher: Any
    student: Any
    depthwise: bool
    tensors: Mapping[str, str]

    @property
    def key(self) -> str:
        """What the pair's map is kept under."""
        return f"{self.name} <- {self.other}"


def paired_modules(
    context: RoundContext, statistics: Optional[AbstractSet[str]]
) -> Tuple[List[ModulePair], Dict[str, str]]:
    """Pair the leaf modules of selected and related layers by local name; say what cannot be aligned.

    Args:
        context: The round.
        statistics: Names of the only buffers to be averaged, ``None`` if none is to be.
    """
    of_teacher, of_student = canonical_modules(context.teacher), canonical_modules(context.student)
    pairs: List[ModulePair] = []
    skipped: Dict[str, str] = {}
    for layer in context.layers:
        related = context.related.get(layer.name)
        if related is None:
            skipped[layer.name] = "no related student layer"
            continue
        candidates = _owners(related, related.parameters + related.buffers)
        names = layer.parameters
        if statistics is not None:
            names += tuple(name for name in layer.buffers if name in statistics)
            others = local_names(layer, [name for name in layer.buffers if name not in statistics])
            skipped.update({f"{layer.name}: {short}": NO_STATISTIC for short in others})
        for owner, (name, tensors) in _owners(layer, names).items():
            if owner not in candidates:
                reason: Optional[str] = f"student layer {related.name!r} has no module with this local name"
            else:
                other = candidates[owner][0]
                module, partner = of_teacher.get(name), of_student.get(other)
                reason = _why_not(module, partner)
            if reason is None:
                modules = weakref.ref(module), weakref.ref(partner)
                pairs.append(ModulePair(layer.name, name, other, *modules, _is_depthwise(module), tensors))
            else:
                skipped.update({f"{layer.name}: {short}": reason for short in tensors})
    return pairs, skipped


def _owners(layer: Layer, names: Sequence[str]) -> Dict[str, Tuple[str, Dict[str, str]]]:
    """Return by local module name the module's canonical name and its tensors' canonical by local names."""
    owners: Dict[str, Tuple[str, Dict[str, str]]] = {}
    for short, name in local_names(layer, names).items():
        owner = owners.setdefault(short.rpartition(".")[0], (name.rpartition(".")[0], {}))
        owner[1][short] = name
    return owners


def _why_not(module: Optional[nn.Module], partner: Optional[nn.Module]) -> Optional[str]:
    """Return why a teacher's module and a student's cannot be aligned, or ``None`` if they can."""
    if any(one is None or next(one.children(), None) is not None for one in (module, partner)):
        return "it does not belong to a leaf module"
    kinds = _kind(module), _kind(partner)
    if kinds[0] is None:
        return f"{type(module).__name__} cannot be aligned"
    if kinds[0] != kinds[1]:
        return f"a {type(module).__name__} does not pair with a {type(partner).__name__}"
    if isinstance(module, _CONVOLUTIONS) and isinstance(partner, _CONVOLUTIONS):
        if module.kernel_size != partner.kernel_size:
            return f"kernel sizes differ: {module.kernel_size} in the teacher, {partner.kernel_size} in the student"
        plain = module.groups == partner.groups == 1
        if not plain and not (_is_depthwise(module) and _is_depthwise(partner)):
            groups = f"groups={module.groups} and groups={partner.groups}"
            return f"{groups}: only ungrouped or depthwise pairs can be aligned"
    return None


def _kind(module: Any) -> Optional[type]:
    """Return what a module must share with its partner, ``None`` if modules of its kind cannot be aligned."""
    for kind in (*_CONVOLUTIONS, nn.Linear, nn.modules.batchnorm._BatchNorm):
        if isinstance(module, kind):
            return kind
    return type(module) if all(parameter.dim() == 1 for parameter in module.parameters()) else None


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels
