from typing import Any, List

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clda_core import similarity
from clda_core.errors import CldaError
from clda_core.layers import ModelView, group_layers
from clda_core.relation import ByName, ByRelativeDepth, BySimilarity, Explicit, RelatedLayers, needs_inputs
from tests import reference_relation as reference
from tests.helpers import no_traces
from tests.models import CNN, ResNet, SegFormer, ViT, mlp
from tests.update.rounds import images, randomise

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
RELATIONS = [ByName(), ByRelativeDepth(), BySimilarity(minimum=0.0), Explicit({"conv1": "conv1"})]


def view(model: nn.Module, by: Any = None) -> ModelView:
    return ModelView(model, group_layers(model, by))


def named(related: RelatedLayers) -> "dict[str, str]":
    return {teacher: layer.name for teacher, layer in related.pairs.items()}


def blocks(depth: int, name: str = "blocks") -> nn.Module:
    return nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2) for _ in range(depth)])})


@pytest.mark.parametrize("relation", RELATIONS, ids=repr)
@pytest.mark.parametrize("depths", [((3, 2), (1, 1)), ((1, 1), (2, 3)), ((2, 2), (2, 2))])
def test_every_teacher_layer_is_related_or_unrelated_with_a_reason(relation: Any, depths: Any) -> None:
    teacher, student = ResNet(depths[0], width=6), ResNet(depths[1], width=4)
    related = relation(view(teacher), view(student), images())
    every = [layer.name for layer in group_layers(teacher)]
    assert sorted([*related.pairs, *related.unrelated]) == sorted(every)
    assert all(related.unrelated.values())
    assert set(named(related).values()) <= {layer.name for layer in group_layers(student)}


def test_only_similarity_needs_inputs() -> None:
    assert [needs_inputs(relation) for relation in RELATIONS] == [False, False, True, False]


def test_by_name() -> None:
    related = ByName()(view(ResNet((2, 1))), view(ResNet((1, 1), width=2)))
    assert named(related) == {"conv1": "conv1", "layer1.0": "layer1.0", "layer2.0": "layer2.0", "fc": "fc"}
    assert related.unrelated == {"layer1.1": "the student has no layer named 'layer1.1'"}


@given(st.integers(1, 12), st.integers(1, 12))
@quick
def test_relative_depth_equals_the_nearest_depth(count: int, others: int) -> None:
    related = ByRelativeDepth()(*[ModelView(nn.Identity(), group_layers(blocks(depth))) for depth in (count, others)])
    indices = [int(name.rpartition(".")[2]) for name in named(related).values()]
    assert indices == [reference.relative_index(index, count, others) for index in range(count)]
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert count == 1 or indices[-1] == others - 1


def test_relative_depth_stays_within_the_stage_and_falls_back_to_names() -> None:
    related = ByRelativeDepth()(view(ResNet((4, 1))), view(ResNet((2, 3))))
    assert named(related) == {
        "conv1": "conv1",
        "layer1.0": "layer1.0",
        "layer1.1": "layer1.0",
        "layer1.2": "layer1.1",
        "layer1.3": "layer1.1",
        "layer2.0": "layer2.0",
        "fc": "fc",
    }


def test_relative_depth_pairs_stages_of_other_names_in_order() -> None:
    related = ByRelativeDepth()(view(ResNet((2, 1))), view(SegFormer((1, 2)).backbone))
    assert named(related) == {"layer1.0": "block1.0", "layer1.1": "block1.0", "layer2.0": "block2.0"}
    assert set(related.unrelated) == {"conv1", "fc"}


def test_relative_depth_uses_names_where_the_numbers_of_stages_differ() -> None:
    student = nn.ModuleDict({"one": blocks(2), "two": blocks(2)})
    related = ByRelativeDepth()(view(blocks(3, "other")), view(student))
    assert not related.pairs
    assert set(related.unrelated) == {"other.0", "other.1", "other.2"}


def test_relative_depth_takes_a_bare_sequential_as_one_stage() -> None:
    big = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    assert list(named(ByRelativeDepth()(view(big), view(nn.Sequential(nn.Linear(2, 2))))).values()) == ["0"] * 3


def test_explicit() -> None:
    related = Explicit({"layer1.1": "layer2.0"})(view(ResNet((2, 1))), view(ResNet((1, 1))))
    assert named(related) == {"layer1.1": "layer2.0"}
    assert related.unrelated["conv1"] == "the explicit mapping leaves it out"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"layer1.7": "conv1"}, r"names teacher layers that do not exist: expected names among \['conv1'.*'layer1.0'"),
        ({"conv1": "layer9.0"}, r"names student layers.*received \['layer9.0'\].*perhaps \[.*'layer2.0'"),
        ({"conv1": "§"}, "use one of the student's layer names"),
    ],
)
def test_explicit_names_that_do_not_exist(mapping: Any, message: str) -> None:
    with pytest.raises(CldaError, match=message):
        Explicit(mapping)(view(ResNet((2, 1))), view(ResNet((1, 1))))


@pytest.mark.parametrize("mapping", [{}, ["conv1"], {"conv1": 3}, None])
def test_explicit_refuses_what_is_no_mapping_of_names(mapping: Any) -> None:
    with pytest.raises(CldaError, match="not a mapping of layer names: expected a non-empty mapping"):
        Explicit(mapping)


@pytest.mark.parametrize(("rows", "channels", "related"), [
    (31, 2, False),
    (32, 2, True),
    (64, 64, False),
    (2000, 64, True),
])  # fmt: skip
def test_similarity_needs_rows_in_proportion_to_the_channels(rows: int, channels: int, related: bool) -> None:
    """Unrelated features of as many channels as rows look alike, and those of one batch of two are the same."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, channels, generator=generator)
    others = torch.randn(rows, channels, generator=generator)
    teacher, student = Features(features, others), Features(others, features)
    found = BySimilarity(minimum=0.9)(view(teacher), view(student), torch.zeros(1))
    assert named(found) == ({"a": "b", "b": "a"} if related else {})
    if not related:
        assert f"compared over {rows} rows (samples x positions), where unrelated features" in found.unrelated["a"]
        assert "at least 32 and at most 0.25 are needed" in found.unrelated["a"]


def test_a_rank_with_too_few_rows_leaves_the_decision_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(200, 3, generator=generator), torch.randn(200, 3, generator=generator)
    given: List[Any] = []

    def run(count: int, others: Any) -> RelatedLayers:
        def reduced(tensors: Any) -> List[Tensor]:
            given.append(tensors[0])
            return [tensors[0] if others is None else tensors[0] + others]

        monkeypatch.setattr(similarity, "sum_across_ranks", reduced)
        teacher, student = Features(first[:count], second[:count]), Features(second[:count], first[:count])
        return BySimilarity(minimum=0.9)(view(teacher), view(student), torch.zeros(1))

    assert not run(1, None).pairs
    assert named(run(200, None)) == {"a": "b", "b": "a"}
    alone, large = given
    for count, others in ((1, large), (200, alone)):
        assert named(run(count, others)) == {"a": "b", "b": "a"}
    assert "over 1 rows" in run(1, alone).unrelated["a"]


class Features(nn.Module):
    """Puts out what it is told to, through two modules that only add a bias."""

    def __init__(self, first: Tensor, second: Tensor, convolves: bool = False) -> None:
        super().__init__()
        self.values = (first, second)
        self.a, self.b = Bias(convolves), Bias(convolves)
        self.never = nn.Linear(2, 2)
        self.loose = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.values[0]).sum() + self.b(self.values[1]).sum() + x.sum() + self.loose


class Bias(nn.Module):
    def __init__(self, convolves: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        if convolves:
            self.convolution = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def test_similarity_finds_the_rotated_copy_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(64, 4, generator=generator) for _ in range(2))
    turn = torch.tensor([[0.6, 0.8, 0, 0], [-0.8, 0.6, 0, 0], [0, 0, 0, 1], [0, 0, 1.0, 0]])
    teacher, student = Features(first, second), Features(second @ turn * 3, first[:, [2, 0, 3, 1]] - 1)
    related = BySimilarity(minimum=0.9)(view(teacher), view(student), torch.zeros(1))
    assert named(related) == {"a": "b", "b": "a"}
    assert related.unrelated == {
        "loose": "it is a group of parameters, not a module with an output to compare",
        "never": "its module is not called in the forward pass",
    }


@pytest.mark.parametrize("convolves", [True, False])
def test_similarity_equals_the_oracle_on_maps_of_two_sizes(convolves: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    fine, coarse = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 4, 4, generator=generator)
    pooled = fine.reshape(3, 4, 4, 2, 4, 2).mean((3, 5))
    matrices = [value.permute(0, 2, 3, 1).reshape(48, -1).numpy() for value in (pooled, coarse)]
    expected = reference.linear_cka(*matrices)
    maps = [value if convolves else value.permute(0, 2, 3, 1) for value in (fine, coarse)]
    teacher, student = (view(Features(value, value, convolves), lambda name: name.partition(".")[0]) for value in maps)
    related = BySimilarity(minimum=1.0)(teacher, student, torch.zeros(1))
    assert f"a, has a linear CKA of {expected:.2f}, below minimum=1" in related.unrelated["b"]


def test_similarity_does_not_compare_vectors_with_maps_or_take_what_is_not_finite() -> None:
    vectors, maps = torch.randn(8, 3), torch.randn(8, 3, 4, 4)
    teacher = Features(vectors, torch.full((8, 3, 4, 4), float("nan")))
    related = BySimilarity(minimum=0.0)(view(teacher), view(Features(maps, maps)), torch.zeros(1))
    assert not related.pairs
    assert related.unrelated["a"] == related.unrelated["b"]
    assert "no student layer has finite features on a grid comparable" in related.unrelated["a"]


@pytest.mark.parametrize("build", [ResNet, ViT, SegFormer, CNN, mlp])
def test_similarity_relates_a_model_to_itself_by_name(build: Any) -> None:
    model = randomise(build(), 3)
    inputs = torch.randn(64, 5) if build is mlp else images(count=64)
    related = BySimilarity(minimum=0.99)(view(model), view(model), inputs)
    assert related.pairs
    assert all(name == other for name, other in named(related).items())


def test_similarity_takes_keyword_and_positional_inputs() -> None:
    model = view(randomise(ResNet((1, 1)), 3))
    expected = named(BySimilarity()(model, model, images()))
    assert named(BySimilarity()(model, model, {"x": images()})) == expected
    assert named(BySimilarity()(model, model, (images(),))) == expected


@pytest.mark.parametrize("samples", [32, 77, 200])
def test_similarity_bounds_its_rows(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compare = similarity.cka_and_chance
    monkeypatch.setattr(similarity, "cka_and_chance", lambda x, y: seen.append(x.shape[0]) or compare(x, y))
    model = view(ResNet((1, 1)))
    BySimilarity(samples=samples)(model, model, images(count=50))
    assert seen
    assert max(seen) <= samples


def test_similarity_gives_hooks_and_modes_back_when_a_model_raises() -> None:
    model = randomise(ResNet((1, 1)), 3)
    with no_traces(model), pytest.raises(RuntimeError, match="."):
        BySimilarity()(view(model), view(model), torch.zeros(2, 7))


def test_user_groups_without_a_module_are_unrelated() -> None:
    model = ResNet((1, 1))
    related = BySimilarity()(view(model, lambda name: "all"), view(model), images())
    assert related.unrelated == {"all": "it is a group of parameters, not a module with an output to compare"}


def test_similarity_without_inputs() -> None:
    model = view(ResNet((1, 1)))
    with pytest.raises(CldaError, match=r"cannot be related by similarity without inputs.*received None"):
        BySimilarity()(model, model)


@pytest.mark.parametrize("options", [{"minimum": -0.1}, {"minimum": 1.1}, {"samples": 31}, {"samples": 64.5}])
def test_similarity_refuses_arguments_out_of_range(options: Any) -> None:
    with pytest.raises(CldaError, match=f"^{next(iter(options))} is"):
        BySimilarity(**options)
