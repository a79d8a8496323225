from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clda_core.layers import group_layers
from clda_core.update.norms import running_statistics
from clda_core.update.writing import Snapshot, blend, names_in, pair_tensors, tensors_of, undone_on_error
from tests._host.test_layout import LAYOUTS
from tests.helpers import no_traces
from tests.models import CNN, ResNet
from tests.reference_update import average, float64
from tests.update.rounds import changed, randomise, same_bits, values


def scramble(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(3) if not tensor.is_floating_point() else tensor.fill_(float("nan"))


def test_snapshot_restores_its_layers_bit_for_bit_and_nothing_else() -> None:
    model = randomise(ResNet((2, 1)))
    model.layer1[0].conv1.weight.data[0, 0, 0] = torch.tensor([float("nan"), -0.0, float("inf")])
    before = values(model)
    layers = [layer for layer in group_layers(model) if layer.name in ("layer1.0", "fc")]
    with no_traces(model):
        snapshot = Snapshot(model, names_in(layers))
        scramble(model)
        snapshot.restore()
    kept = {name for layer in layers for name in (*layer.parameters, *layer.buffers)}
    assert {"layer1.0.bn1.running_var", "fc.bias"} < kept
    assert set(changed(model, before)) == set(before) - kept


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_undone_on_error(error: type) -> None:
    model = randomise(CNN())
    before = values(model)

    def half_way() -> None:
        with undone_on_error(model, group_layers(model)):
            model.classifier.bias.data.zero_()
            raise error("stop")

    with pytest.raises(error, match="stop"):
        half_way()
    assert not changed(model, before)


def test_undone_on_error_keeps_what_succeeded() -> None:
    model = randomise(CNN())
    with undone_on_error(model, group_layers(model)):
        model.classifier.bias.data.zero_()
    assert model.classifier.bias.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [0.0, 0.013, 0.7, 1.0])
def test_blend(weight: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = {name: torch.randn(5, generator=generator, dtype=dtype) for name in "ab"}
    # Another order and another dtype than the targets'.
    sources = {name: torch.randn(5, generator=generator, dtype=torch.float64) for name in "ba"}
    expected = {n: average(targets[n], sources[n].to(dtype), 1 - weight) for n in "ab"}
    before = {name: target.clone() for name, target in targets.items()}
    where = {name: target.data_ptr() for name, target in targets.items()}
    blend(targets, sources, weight)
    for name, target in targets.items():
        assert target.dtype == dtype
        assert target.data_ptr() == where[name]
        assert torch.allclose(target.double(), torch.from_numpy(expected[name]), rtol=1e-6, atol=1e-7)
    if weight == 0:
        assert all(same_bits(targets[name], before[name]) for name in "ab")
    if weight == 1:
        assert all(same_bits(targets[name], sources[name].to(dtype)) for name in "ab")


def test_blend_writes_parameters_that_require_grad() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    blend({"p": parameter}, {"p": torch.ones(2)}, 0.5)
    assert parameter.tolist() == [0.5, 0.5]
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_blend_of_nothing() -> None:
    blend({}, {}, 0.5)


def test_pairs_are_made_by_local_name_and_reasons_name_the_rest() -> None:
    teacher, student = ResNet((2, 1)), ResNet((1, 1))
    student.layer1[0].conv2 = nn.Conv2d(4, 4, 1, bias=False)
    student.layer1[0].bn1 = nn.Identity()
    layer = {layer.name: layer for layer in group_layers(teacher)}["layer1.1"]
    related = {layer.name: layer for layer in group_layers(student)}["layer1.0"]
    pairs, unpaired = pair_tensors(
        tensors_of(teacher), layer, tensors_of(student), related, running_statistics(teacher)
    )
    assert list(pairs) == [
        "layer1.1.conv1.weight",
        "layer1.1.bn2.weight",
        "layer1.1.bn2.bias",
        "layer1.1.bn2.running_mean",
        "layer1.1.bn2.running_var",
    ]
    assert pairs["layer1.1.conv1.weight"] == "layer1.0.conv1.weight"
    assert unpaired["layer1.1: conv2.weight"] == (
        "shapes differ: (4, 4, 3, 3) in the teacher, (4, 4, 1, 1) in the student"
    )
    assert unpaired["layer1.1: bn1.running_var"] == "student layer 'layer1.0' has no 'bn1.running_var'"
    without = pair_tensors(tensors_of(teacher), layer, tensors_of(student), related, None)
    assert list(without[0]) == [name for name in pairs if "running" not in name]
    assert not any("running" in name for name in without[1])


def test_a_norm_beside_its_convolution_is_paired_by_its_distance() -> None:
    teacher, student = CNN(), CNN()
    layers = {layer.name: layer for layer in group_layers(teacher)}
    layer = layers["features.0"]
    pairs, unpaired = pair_tensors(tensors_of(teacher), layer, tensors_of(student), layer, running_statistics(teacher))
    assert list(pairs) == [*layer.parameters, *layer.buffers]
    assert not unpaired


def of_layout(layout: str, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randn(4, 3, 2, 5, generator=generator, dtype=torch.float64).to(dtype))


WRITABLE = ["row-major", "channels last", "permuted", "a slice", "every other element"]
DTYPES = [torch.float32, torch.float64]
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@quick
@given(
    targets=st.lists(st.tuples(st.sampled_from(WRITABLE), st.sampled_from(DTYPES)), min_size=1, max_size=4),
    sources=st.lists(st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(DTYPES)), min_size=4, max_size=4),
    weight=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_averages_are_those_of_float64_for_every_pair_of_layouts(targets: Any, sources: Any, weight: float) -> None:
    ours = {str(index): of_layout(kind[0], index, kind[1]) for index, kind in enumerate(targets)}
    theirs = {name: of_layout(kind[0], 9 + index, kind[1]) for index, (name, kind) in enumerate(zip(ours, sources))}
    expected = {name: average(ours[name], theirs[name], 1 - weight) for name in ours}
    blend(ours, theirs, weight)
    for name, tensor in ours.items():
        tolerance = 1e-6 if torch.float32 in (tensor.dtype, theirs[name].dtype) else 1e-14
        np.testing.assert_allclose(float64(tensor), expected[name], rtol=0, atol=tolerance)


@quick
@given(
    kinds=st.lists(st.tuples(st.sampled_from(WRITABLE), st.sampled_from(DTYPES)), min_size=1, max_size=4),
)
def test_a_snapshot_restores_and_halves_elements_of_every_layout(kinds: Any) -> None:
    model = nn.ParameterDict(
        {str(i): nn.Parameter(of_layout(layout, i, dtype)) for i, (layout, dtype) in enumerate(kinds)}
    )
    layers = group_layers(model)
    before = {name: float64(parameter) for name, parameter in model.items()}
    snapshot = Snapshot(model, names_in(layers))
    now = {}
    with torch.no_grad():
        for name, parameter in model.items():
            parameter.add_(of_layout("channels last", 30, parameter.dtype))
            now[name] = float64(parameter)
    snapshot.go_halfway_back()
    for name, parameter in model.items():
        np.testing.assert_allclose(float64(parameter), (before[name] + now[name]) / 2, rtol=0, atol=1e-6)
    snapshot.restore()
    for name, parameter in model.items():
        assert np.array_equal(float64(parameter), before[name])
