"""Start the student from the teacher's related layers."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import nn

from .._host.activations import LEAST_ROWS
from .._host.borrowing import borrowed
from .._host.shards import local, part_for, whole
from ..distillation.class_map import check_class_map, in_students_classes
from ..errors import problem
from ..layers import Layer, LayerGrouping, ModelView, check_models, group_layers, size
from ..outputs import Extract, Outputs, as_outputs, call_model
from ..relation import ByRelativeDepth, RelatedLayers, Relation
from .base import UpdateResult
from .classes import Classes, find_classes
from .norms import frozen_norms, running_statistics
from .writable import check_memory
from .writing import pair_tensors, tensors_of, undone_on_error

__all__ = ["init_student"]


def init_student(
    student: nn.Module,
    teacher: nn.Module,
    relation: Optional[Relation] = None,
    *,
    layers: Optional[LayerGrouping] = None,
    inputs: Any = None,
    class_map: Optional[Sequence[int]] = None,
    extract: Optional[Extract] = None,
) -> UpdateResult:
    """Copy related teacher layers into the student, once, before its training.

    Of several teacher layers related to one student layer, the one at the same relative place among them is copied: the
    first for the first student layer of its stage, the last for the last. Parameters and what norms keep in buffers
    (running statistics; of frozen norms weight and bias too) are copied in place where local name and shape agree. All
    other buffers stay what the student's constructor made them.

    Args:
        student: Written in place.
        teacher: Only read.
        relation: Teacher layer to student layer; :class:`~clda_core.relation.ByRelativeDepth` by default.
        layers: A regrouping for both models, as in :func:`~clda_core.layers.group_layers`.
        inputs: A batch, for relations that need one and for ``class_map``.
        class_map: For each student class the index of the teacher's class, as in the KD loss, where the classes differ.
            The layer that makes the logits, found by running both models on ``inputs``, is then copied row by row of
            its classes; whatever else may have classes in one of its first two dimensions is skipped.
        extract: Reads logits from what the models return, as in the learner; for ``class_map``.

    Returns:
        The student layers written, and what was skipped with its reason.

    Raises:
        CldaError: If the models share parameters, the student is larger than the teacher (they may have been swapped),
            nothing can be copied, or ``class_map`` comes without inputs (32 samples or positions at least) or does not
            fit the logits; the student is unchanged.

    Example:
        >>> big = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> init_student(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), big).updated
        ('0', '2')
    """
    check_models(teacher, student)
    if size(student) > size(teacher):
        raise problem(
            "the student is larger than the teacher",
            expected="init_student(student, teacher), in this order",
            received=f"a student of {size(student):,} parameters and a teacher of {size(teacher):,}",
            fix="swap them; the learner takes the teacher first, init_student what it writes to",
        )
    of_teacher, of_student = group_layers(teacher, layers), group_layers(student, layers)
    check_memory(teacher, student, of_teacher)
    related = (relation or ByRelativeDepth())(ModelView(teacher, of_teacher), ModelView(student, of_student), inputs)
    if not isinstance(related, RelatedLayers):
        raise problem(
            "the relation returned something else",
            expected="clda_core.relation.RelatedLayers",
            received=type(related).__name__,
            fix="return RelatedLayers(pairs, unrelated) from relation=",
        )
    sources: Dict[str, List[Layer]] = {}
    for layer in of_teacher:
        if layer.name in related.pairs:
            sources.setdefault(related.pairs[layer.name].name, []).append(layer)
    updated: List[str] = []
    skipped: Dict[str, str] = {}
    targets, origins = tensors_of(student), tensors_of(teacher)
    classes = None if class_map is None else _classes(teacher, student, inputs, class_map, extract)
    statistics = running_statistics(student) | frozen_norms(student)
    with undone_on_error(student, of_student), torch.no_grad():
        for layer in of_student:
            if layer.name not in sources:
                skipped[layer.name] = "no related teacher layer"
                continue
            peers = [other.name for other in of_student if other.stage == layer.stage and other.name in sources]
            source = _at_relative_place(sources[layer.name], peers.index(layer.name), len(peers))
            pairs, unpaired = pair_tensors(targets, layer, origins, source, statistics, ("student", "teacher"), classes)
            skipped.update(unpaired)
            for target, origin in pairs.items():
                value, into = origins[origin], targets[target]
                if classes is not None and classes.are_rows(origin, value.shape, target, into.shape):
                    value = classes.in_students(whole(value))
                local(into).copy_(part_for(value, into))
            if pairs:
                updated.append(layer.name)
        if not updated:
            raise problem(
                "no teacher layer can be copied into the student",
                expected="at least one related pair of layers with parameters of equal name and shape",
                received=f"skipped: {skipped}",
                fix="pass a relation that pairs layers of equal shape, or start the student otherwise",
            )
    return UpdateResult(tuple(updated), skipped)


def _classes(
    teacher: nn.Module, student: nn.Module, inputs: Any, class_map: Sequence[int], extract: Optional[Extract]
) -> Classes:
    def run(model: nn.Module) -> Outputs:
        whose = "teacher" if model is teacher else "student"
        outputs = as_outputs(call_model(model, inputs), extract, whose)
        count = outputs.logits.shape[1]
        if max(class_map) >= count if model is teacher else len(class_map) != count:
            raise problem(
                "class_map does not fit the logits",
                expected="as many entries as the student has classes, each below the teacher's number of classes",
                received=f"{list(class_map)!r} and {count} classes of the {whose}",
                fix="pass for each class of the student the index of the teacher's class",
            )
        return outputs._replace(logits=in_students_classes(outputs.logits, class_map)) if model is teacher else outputs

    check_class_map(class_map)
    found = None
    if inputs is not None:
        with borrowed(teacher, student, doing="watch", hooked=True):
            found = find_classes(teacher, student, run, class_map)
    if found is None:
        raise problem(
            "the layers that make the logits cannot be found, which class_map= is about",
            expected=f"a batch of at least {LEAST_ROWS} samples, or of as many positions",
            received="no inputs" if inputs is None else "a smaller one",
            fix="pass inputs=, a batch as the models are called with",
        )
    return found


def _at_relative_place(candidates: List[Layer], position: int, count: int) -> Layer:
    place = position / (count - 1) if count > 1 else 0.0
    return candidates[int(place * (len(candidates) - 1) + 0.5)]
