"""One case or more for every strategy and loss the package offers, and what needs none, with the reason."""

import importlib
import inspect
from typing import Any, Callable, Dict, Iterator, List, Tuple

from clda_core import Never, Schedule
from clda_core.distillation import (
    AttentionTransfer,
    ChannelWiseDistillation,
    DecoupledDistillation,
    DISTDistillation,
    FeatureDistillation,
    KLDistillation,
    WeightedSum,
    attention_transfer,
    channel_wise_distillation,
    decoupled_distillation,
    dist_distillation,
    feature_distillation,
    kl_distillation,
)
from clda_core.lead import FixedTrust, LinearTrust
from clda_core.relation import ByName, ByRelativeDepth, BySimilarity, Explicit
from clda_core.saliency import (
    Fisher,
    FixedThreshold,
    Hessian,
    Magnitude,
    MeanThreshold,
    PseudoLabelCrossEntropy,
    QuantileThreshold,
    ReferenceThreshold,
    Taylor,
)
from clda_core.selection import (
    AllLayers,
    BelowRate,
    DomainShift,
    DrawnFraction,
    HighestFraction,
    LowestFraction,
    RandomFraction,
)
from clda_core.update import (
    AlignedAverage,
    Average,
    Guard,
    KeepBest,
    MaskedDistillation,
    agreement,
    consensus,
    mutual_information,
)

MODULES = [
    "clda_core",
    "clda_core.checkpoint",
    "clda_core.distillation",
    "clda_core.lead",
    "clda_core.relation",
    "clda_core.saliency",
    "clda_core.schedule",
    "clda_core.selection",
    "clda_core.update",
    "clda_core.validation",
]

Case = Tuple[str, Callable[[], Any]]
"""The learner's argument that takes it, and how it is made."""

CASES: Dict[str, List[Case]] = {
    "Magnitude": [("saliency", Magnitude)],
    "Taylor": [("saliency", Taylor)],
    "Fisher": [("saliency", Fisher)],
    "Hessian": [("saliency", Hessian), ("saliency", lambda: Hessian(samples=2))],
    "PseudoLabelCrossEntropy": [("probe", PseudoLabelCrossEntropy)],
    "QuantileThreshold": [("threshold", lambda: QuantileThreshold(quantile=0.4))],
    "MeanThreshold": [("threshold", lambda: MeanThreshold(multiple=0.5))],
    "FixedThreshold": [("threshold", lambda: FixedThreshold(1e-3))],
    "ReferenceThreshold": [("threshold", lambda: ReferenceThreshold(of=MeanThreshold(multiple=0.5)))],
    "LowestFraction": [("selection", lambda: LowestFraction(fraction=0.5))],
    "DrawnFraction": [
        ("selection", lambda: DrawnFraction(fraction=0.5)),
        ("selection", lambda: DrawnFraction(fraction=0.5, bias=0.0, seed=3)),
    ],
    "LinearTrust": [("trust", LinearTrust), ("trust", lambda: LinearTrust(zero=-9.0, full=-8.0))],
    "FixedTrust": [("trust", FixedTrust), ("trust", lambda: FixedTrust(0.5))],
    "BelowRate": [("selection", lambda: BelowRate(rate=0.5))],
    "DomainShift": [
        ("selection", lambda: DomainShift(fraction=0.5)),
        ("selection", lambda: DomainShift(margin=0.0)),
    ],
    "HighestFraction": [("selection", HighestFraction)],
    "RandomFraction": [("selection", lambda: RandomFraction(seed=3))],
    "AllLayers": [("selection", AllLayers)],
    "ByName": [("relation", ByName)],
    "ByRelativeDepth": [("relation", ByRelativeDepth)],
    "Explicit": [("relation", lambda: Explicit({"blocks.1": "blocks.0", "stem": "stem"}))],
    "BySimilarity": [("relation", lambda: BySimilarity(minimum=0.0))],
    "Average": [
        ("update", lambda: Average(decay=0.9)),
        ("update", lambda: Average(decay=0.9, buffers="average")),
    ],
    "AlignedAverage": [
        ("update", lambda: AlignedAverage(decay=0.9)),
        ("update", lambda: Guard(AlignedAverage(decay=0.9))),
    ],
    "MaskedDistillation": [
        ("update", lambda: MaskedDistillation(learning_rate=1e-2)),
        ("update", lambda: MaskedDistillation(steps=2, learning_rate=1e-2)),
        ("update", lambda: MaskedDistillation(learning_rate=1e-2, own_targets=True)),
    ],
    "Guard": [
        ("update", lambda: Guard(MaskedDistillation(learning_rate=1e-2))),
        ("update", lambda: Guard(Average(decay=0.5), criterion=agreement)),
    ],
    "KeepBest": [
        ("update", lambda: KeepBest(MaskedDistillation(learning_rate=1e-2), every=2, looks=1)),
        ("update", lambda: KeepBest(Average(decay=0.5), every=1, looks=1)),
    ],
    "consensus": [("criterion", lambda: consensus)],
    "mutual_information": [("criterion", lambda: mutual_information)],
    "agreement": [("criterion", lambda: agreement)],
    "KLDistillation": [("distillation", lambda: KLDistillation(temperature=2.0, class_map=[0, 1, 2]))],
    "ChannelWiseDistillation": [("distillation", ChannelWiseDistillation)],
    "DecoupledDistillation": [("distillation", DecoupledDistillation)],
    "DISTDistillation": [("distillation", DISTDistillation)],
    "FeatureDistillation": [("distillation", FeatureDistillation)],
    "AttentionTransfer": [("distillation", AttentionTransfer)],
    "WeightedSum": [("distillation", lambda: WeightedSum([(1.0, KLDistillation()), (0.5, FeatureDistillation())]))],
    "kl_distillation": [("distillation", lambda: kl_distillation)],
    "channel_wise_distillation": [("distillation", lambda: channel_wise_distillation)],
    "decoupled_distillation": [("distillation", lambda: decoupled_distillation)],
    "dist_distillation": [("distillation", lambda: dist_distillation)],
    "feature_distillation": [("feature function", lambda: feature_distillation)],
    "attention_transfer": [("feature function", lambda: attention_transfer)],
    "Schedule": [
        ("schedule", lambda: Schedule(warmup=1, interval=2, observations=2)),
        ("schedule", lambda: Schedule(warmup=0, interval=1, observe_every=1, decay="cosine", total=8)),
        ("schedule", lambda: Schedule(warmup=0, interval=1, decay="linear", total=8)),
    ],
    "Never": [("schedule", Never)],
}

NOT_STRATEGIES = {
    "LearnerAndTeacher": "an object with a state: integrations/test_accelerate.py",
    "CldaError": "the error",
    "CollaborativeLearner": "the learner: test_learner.py",
    "teach": "a function: test_teaching.py",
    "Criterion": "a type",
    "Distillation": "a protocol",
    "Histogram": "data: saliency/test_histogram.py",
    "Layer": "data",
    "Look": "data: test_lead.py",
    "NeedsInputs": "a protocol",
    "Outputs": "data",
    "Probe": "a type",
    "RelatedLayers": "data",
    "Relation": "a protocol",
    "Report": "data: test_report.py",
    "RoundContext": "data",
    "Elementwise": "a protocol",
    "RandomVectors": "a protocol",
    "RoundRecord": "data",
    "RoundSchedule": "a protocol",
    "SaliencyEstimator": "a protocol",
    "Selection": "a protocol",
    "SourceLoss": "a type",
    "Threshold": "a protocol",
    "Trust": "a type",
    "Update": "a protocol",
    "UpdateResult": "data",
    "atomically": "a context for files: test_checkpoint.py",
    "check_values": "a check",
    "checkpoint": "a module: test_checkpoint.py",
    "derivatives": "a function on models: saliency/test_base.py",
    "distillation_loss": "calls a loss",
    "group_layers": "a function on models: test_layers.py",
    "init_student": "a function on models: update/test_initialise.py",
    "layer_saliency_rates": "a function of a histogram: saliency/test_threshold.py",
    "load": "reads a file: test_checkpoint.py",
    "pack": "the states of learner and teacher: test_checkpoint.py",
    "read": "reads a file: test_checkpoint.py",
    "unpack": "restores learner and teacher: test_checkpoint.py",
    "linear_cka": "a function of features: test_similarity.py",
    "saliency_rates": "a function on models: saliency/test_rates.py",
    "save": "writes a file: test_checkpoint.py",
    "ByClass": "a protocol",
    "MakesView": "a protocol",
    "Validator": "a protocol",
    "mixed": "a function of inputs: validation/test_mixval.py",
    "validate": "a function on models: validation/test_scores.py",
    "validation_statistics": "a function on models: validation/test_scores.py",
    "ConsistencyIoU": "a validator: validation/test_validators.py",
    "ConsistentInformation": "a validator: validation/test_validators.py",
    "HardConsistency": "a validator: validation/test_validators.py",
    "MixVal": "a validator: validation/test_validators.py",
    "MutualInformation": "a validator: validation/test_validators.py",
    "NegativeEntropy": "a validator: validation/test_validators.py",
    "NeighbourhoodDensity": "a validator: validation/test_validators.py",
    "SoftConsistency": "a validator: validation/test_validators.py",
}


def public_names() -> Iterator[str]:
    for module in MODULES:
        yield from importlib.import_module(module).__all__


def cases(*roles: str) -> List[Any]:
    """Return ``(name, role, make)`` for every case, or those of some roles."""
    return [
        (f"{name}{index or ''}", role, make)
        for name, made in CASES.items()
        for index, (role, make) in enumerate(made)
        if not roles or role in roles
    ]


def is_function(made: Any) -> bool:
    return inspect.isfunction(made)
