import copy
import gc
import inspect
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Dict, List, Optional

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clda_core.errors import CldaError
from clda_core.layers import ModelView, group_layers
from clda_core.outputs import Outputs
from clda_core.relation import ByName, BySimilarity
from clda_core.update import RoundContext
from clda_core.update.aligned_average import AlignedAverage
from clda_core.update.alignment import ChannelMaps, expressed
from clda_core.update.classes import MAY_BE_CLASSES
from tests import reference_relation as reference
from tests.helpers import bits, no_traces
from tests.models import CNN, ResNet, SegFormer, ViT, mlp
from tests.update.rounds import changed, images, randomise, round_context, values


class Net(nn.Module):
    """Plain layers, a depthwise one among them, whose hidden channels may be permuted or duplicated."""

    def __init__(self, a: int = 6, b: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, a, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(a)
        self.depth = nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(a, b, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(b)
        self.fc = nn.Linear(b, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.depth(self.relu(self.bn1(self.conv1(x))) + 0.1))
        return self.fc(self.relu(self.bn2(self.conv2(x))).mean((2, 3)))


HIDDEN_1 = ["conv1.weight", "conv1.bias", "bn1.", "depth."]
HIDDEN_2 = ["conv2.weight", "conv2.bias", "bn2."]


def copied(source: nn.Module, a: List[int], b: List[int]) -> Net:
    """Return a net of which hidden channel i copies channel a[i] or b[i]; its function is the source's."""
    net = Net(len(a), len(b))
    state: Dict[str, Tensor] = {}
    for name, value in source.state_dict().items():
        if value.dim() and any(name.startswith(prefix) for prefix in HIDDEN_1):
            value = value[a]
        if value.dim() and any(name.startswith(prefix) for prefix in HIDDEN_2):
            value = value[b]
        if name == "conv2.weight":
            value = value[:, a] / torch.tensor([float(a.count(i)) for i in a]).view(1, -1, 1, 1)
        if name == "fc.weight":
            value = value[:, b] / torch.tensor([float(b.count(i)) for i in b])
        state[name] = value
    net.load_state_dict(state)
    return net


def alive(seed: int, **widths: int) -> nn.Module:
    """Return a net in which every channel varies."""
    net = randomise(Net(**widths), seed)
    with torch.no_grad():
        for name in ("bn1", "bn2"):
            getattr(net, name).bias.fill_(1.0)
        net.depth.bias.fill_(2.0)
    return net


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),
        ([3, 0, 5, 1, 4, 2], [4, 2, 0, 1, 3]),
        ([3, 0, 5, 1, 4, 2, 0, 0, 3], [4, 2, 0, 1, 3, 3, 2]),
    ],
    ids=["same", "permuted", "widened"],
)
def test_a_teacher_that_copies_the_student_is_mapped_back_to_itself(a: List[int], b: List[int]) -> None:
    student = alive(0)
    teacher = copied(student, a, b)
    inputs = images(count=40)
    before, expected = values(teacher), teacher.eval()(inputs)
    assert torch.allclose(expected, student.eval()(inputs), atol=1e-5)
    result = AlignedAverage(decay=0.0, buffers="average").apply(round_context(teacher, student, inputs=inputs))
    assert result.updated == ("conv1", "depth", "conv2", "fc")
    assert not result.skipped
    assert torch.allclose(teacher(inputs), expected, atol=1e-5)
    for name, value in values(teacher).items():
        assert torch.allclose(value, before[name], atol=1e-6), name


def test_a_net2net_teacher_with_uneven_shares_keeps_its_function() -> None:
    student = alive(0)
    teacher = copied(student, [0, 1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        teacher.conv2.weight[:, 5] += 0.4
        teacher.conv2.weight[:, 6] -= 0.4
    inputs = images(count=40)
    expected, before = teacher.eval()(inputs), values(teacher)
    AlignedAverage(decay=0.0).apply(round_context(teacher, student, inputs=inputs))
    assert changed(teacher, before)
    assert torch.allclose(teacher(inputs), expected, atol=1e-5)


def test_only_one_layer_of_a_permuted_student_fits_the_others_of_the_teacher() -> None:
    teacher = alive(0)
    student = copied(teacher, [3, 0, 5, 1, 4, 2], [4, 2, 0, 1, 3])
    expected = teacher.eval()(images(count=40))
    with torch.no_grad():
        teacher.conv2.weight += 0.01 * torch.randn(
            teacher.conv2.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    assert not torch.allclose(teacher(images(count=40)), expected, atol=1e-3)
    AlignedAverage(decay=0.0).apply(round_context(teacher, student, ["conv2"], inputs=images(count=40)))
    assert torch.allclose(teacher(images(count=40)), expected, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_step_is_exponential(decay: float, strength: float) -> None:
    teacher, student = alive(0), alive(1)
    aligned = copy.deepcopy(teacher)
    AlignedAverage(decay=0.0).apply(round_context(aligned, student, inputs=images(count=40)))
    target, before = values(aligned), values(teacher)
    AlignedAverage(decay=decay).apply(round_context(teacher, student, inputs=images(count=40), strength=strength))
    weight = strength * (1 - decay)
    for name, _ in teacher.named_parameters():
        expected = before[name] + weight * (target[name] - before[name])
        assert torch.allclose(values(teacher)[name], expected, atol=1e-6), name


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3, 3)])
def test_expressed_weights_equal_the_oracle(shape: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(size, generator=generator) for size in (shape, (3, 2, *shape[2:])))
    out, into = [2, -1, 0, 2], [1, 1, -1, 0, 1]
    found = expressed(teacher, student, ChannelMaps(into, out), depthwise=False)
    oracle = reference.aligned_weight(teacher.double().numpy(), student.double().numpy(), out, into)
    assert found is not None
    assert np.allclose(found.numpy(), np.array(oracle), atol=1e-6)


@pytest.mark.parametrize("out", [[2, 0, 1], [2, -1, 1]], ids=["all matched", "one left out"])
@pytest.mark.parametrize("into", [[1, 0], [1, 1]], ids=["permuted", "shared"])
@pytest.mark.parametrize(("ours", "theirs"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_a_students_tensor_is_expressed_in_the_teachers_dtype(
    out: Any, into: Any, ours: Any, theirs: Any, depthwise: bool
) -> None:
    teacher, student = torch.full((3, 2), 8.0, dtype=ours), torch.tensor([[0, 1], [2, 3], [4, 5.0]], dtype=theirs)
    found = expressed(teacher, student, ChannelMaps(into, out), depthwise=depthwise)
    columns = [0, 1] if depthwise else into
    share = 1 if depthwise else into.count(1)
    expected = [[8.0, 8.0] if row < 0 else [student[row, column].item() / share for column in columns] for row in out]
    assert found is not None
    assert found.dtype == ours
    assert found.tolist() == expected
    assert teacher.unique().tolist() == [8.0], "the teacher is not written"


@pytest.mark.parametrize(("ours", "theirs"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_models_of_different_dtypes_are_averaged_in_the_teachers(ours: torch.dtype, theirs: torch.dtype) -> None:
    teacher, student = alive(0).to(ours), alive(1).to(theirs)
    same = copy.deepcopy(teacher)

    def forward(model: nn.Module, inputs: Tensor) -> Outputs:
        return Outputs(model(inputs.to(next(model.parameters()).dtype)))

    for net, other in ((teacher, student), (same, copy.deepcopy(student).to(ours))):
        context = round_context(net, other, inputs=images(count=40), forward=forward)
        assert AlignedAverage(decay=0.5, buffers="average").apply(context).updated
    for name, value in values(teacher).items():
        assert value.dtype == values(same)[name].dtype
        assert torch.allclose(value, values(same)[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (lambda: ResNet((3, 2), width=6), lambda: ResNet((2, 1), width=4)),
        (lambda: ResNet((1, 1), width=4), lambda: ResNet((2, 2), width=6)),
        (lambda: ViT(3, dim=8), lambda: ViT(2, dim=4)),
        (lambda: SegFormer((2, 2)), lambda: SegFormer((1, 1))),
        (CNN, CNN),
        (lambda: Net(7, 6), lambda: Net(3, 2)),
    ],
)
@pytest.mark.parametrize("buffers", ["keep", "average"])
def test_unrelated_networks_of_any_width_leave_no_trace_but_the_selected_layers(
    teacher: Any, student: Any, buffers: Any
) -> None:
    teacher, student = randomise(teacher(), 1), randomise(student(), 2)
    for parameter in teacher.parameters():
        parameter.grad = torch.ones_like(parameter)
    selected = group_layers(teacher)[1::2]
    allowed = [name for layer in selected for name in layer.parameters]
    allowed += [name for layer in selected for name in layer.buffers if buffers == "average"]
    of_teacher, of_student = values(teacher), values(student)
    context = round_context(teacher, student, [layer.name for layer in selected], inputs=images(count=40))
    with no_traces(teacher, student):
        result = AlignedAverage(decay=0.5, buffers=buffers).apply(context)
    assert result.updated
    assert set(changed(teacher, of_teacher)) <= set(allowed)
    assert not changed(student, of_student)
    assert all(torch.isfinite(value).all() for value in values(teacher).values())
    accounted = {key.partition(":")[0] for key in result.skipped} | set(result.updated)
    assert accounted == {layer.name for layer in selected}


def test_the_logits_keep_their_classes() -> None:
    """Classes permuted in the student must not be permuted back: they mean what they mean."""
    teacher = alive(0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.fc.weight.copy_(teacher.fc.weight.flip(0))
        student.fc.bias.copy_(teacher.fc.bias.flip(0))
    AlignedAverage(decay=0.0).apply(round_context(teacher, student, ["fc"], inputs=images(count=40)))
    assert torch.allclose(teacher.fc.weight, student.fc.weight, atol=1e-6)


def test_channels_that_do_not_vary_keep_the_teachers_weights() -> None:
    teacher, student = alive(0), alive(1)
    with torch.no_grad():
        teacher.depth.weight[2] = 0
    before = values(teacher)
    AlignedAverage(decay=0.0).apply(round_context(teacher, student, inputs=images(count=40)))
    assert torch.equal(teacher.depth.weight[2], before["depth.weight"][2])
    assert torch.equal(teacher.depth.bias[2], before["depth.bias"][2])
    kept = (teacher.conv2.weight == before["conv2.weight"]).all(3).all(2).all(0)
    assert kept.tolist() == [channel == 2 for channel in range(6)]


def pair(teacher: nn.Module, student: nn.Module) -> RoundContext:
    related = ByName()(ModelView(teacher, group_layers(teacher)), ModelView(student, group_layers(student))).pairs
    return round_context(teacher, student, inputs=images(count=40), related=related)


def body(layer: Optional[nn.Module], after: Optional[nn.Module] = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), layer or nn.Identity(), after or nn.Identity())


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), r"kernel sizes differ: \(3, 3\) in the teacher, \(1, 1\)"),
        (nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1), "groups=2 and groups=1: only ungrouped or depthwise"),
        (nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1), "groups=4 and groups=1: only ungrouped or depthwise"),
        (nn.ConvTranspose2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d cannot be aligned"),
        (nn.GroupNorm(2, 4), nn.BatchNorm2d(4), "a GroupNorm does not pair with a BatchNorm2d"),
        (nn.Conv2d(4, 4, 1), nn.Linear(8, 4), "a Conv2d does not pair with a Linear"),
    ],
)
def test_what_cannot_be_aligned_is_skipped_by_name_with_its_reason(
    ours: nn.Module, theirs: nn.Module, reason: str
) -> None:
    teacher, student = body(ours), body(theirs)
    before = values(teacher)
    result = AlignedAverage(decay=0.0).apply(pair(teacher, student))
    own = {key: value for key, value in result.skipped.items() if key.endswith("weight")}
    assert own
    with pytest.raises(KeyError, match=reason):
        raise KeyError(*own.values())
    assert all(name.startswith("0.") for name in changed(teacher, before))


def test_a_bias_the_student_lacks_is_skipped() -> None:
    result = AlignedAverage().apply(pair(body(nn.Conv2d(4, 4, 1)), body(nn.Conv2d(4, 4, 1, bias=False))))
    assert result.skipped == {"1: bias": "the student's module '1' has no such tensor"}


def test_parameters_without_a_leaf_module_and_modules_not_called_are_skipped() -> None:
    result = AlignedAverage().apply(round_context(randomise(ViT(), 0), randomise(ViT(), 1), inputs=images(count=40)))
    assert result.skipped["cls_token: cls_token"] == "it does not belong to a leaf module"
    teacher, student = ResNet((1, 1)), ResNet((1, 1))
    teacher.spare = nn.Linear(2, 2)
    student.spare = nn.Linear(2, 2)
    result = AlignedAverage().apply(round_context(teacher, student, inputs=images(count=40)))
    assert result.skipped["spare: weight"] == "its module is not called in the forward pass"


def test_a_module_that_only_the_teacher_calls_is_skipped() -> None:
    class Chain(nn.Module):
        def __init__(self, calls: List[str]) -> None:
            super().__init__()
            self.calls, self.first, self.second, self.head = calls, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in self.calls:
                x = getattr(self, name)(x).tanh()
            return x

    teacher, student = randomise(Chain(["first", "second", "head"]), 0), randomise(Chain(["first", "head"]), 1)
    result = AlignedAverage().apply(round_context(teacher, student, inputs=images(0, 64)[:, 0, 0, :6]))
    assert result.skipped["second: weight"] == "its module is not called in the forward pass"
    assert {"first", "head"} <= set(result.updated)


def test_activations_that_are_not_finite_are_skipped() -> None:
    teacher, student = alive(0), alive(1)
    with torch.no_grad():
        student.conv2.bias.fill_(float("nan"))
    before = values(teacher)
    result = AlignedAverage(decay=0.0).apply(round_context(teacher, student, ["conv2"], inputs=images(count=40)))
    assert not result.updated
    assert "not finite" in result.skipped["conv2: weight"]
    assert not changed(teacher, before)


def test_layers_without_a_relation_are_skipped() -> None:
    context = round_context(alive(0), alive(1), inputs=images(count=40), related={})
    assert set(AlignedAverage().apply(context).skipped.values()) == {"no related student layer"}


def test_a_model_that_raises_gets_its_hooks_and_modes_back() -> None:
    teacher, student = alive(0), alive(1)
    with no_traces(teacher, student, values_too=True), pytest.raises(RuntimeError, match="."):
        AlignedAverage().apply(round_context(teacher, student, inputs=torch.zeros(2, 9)))


def test_without_inputs() -> None:
    with pytest.raises(CldaError, match="the update needs this step's target batch"):
        AlignedAverage().apply(round_context(alive(0), alive(1)))


def test_without_inputs_once_channels_are_matched() -> None:
    teacher, student, update = alive(0), alive(1), AlignedAverage()
    update.apply(round_context(teacher, student, inputs=images(0, 40)))
    before, state = values(teacher), str(update.state_dict())
    with pytest.raises(CldaError, match="the update needs this step's target batch"):
        update.apply(round_context(teacher, student))
    assert not changed(teacher, before)
    assert str(update.state_dict()) == state


@pytest.mark.parametrize(
    "options",
    [{"decay": 1.1}, {"decay": float("nan")}, {"buffers": "copy"}] + [{"minimum": 1.0}, {"samples": 31}],
)
def test_refuses_arguments_out_of_range(options: Any) -> None:
    with pytest.raises(CldaError, match=f"^{next(iter(options))} is"):
        AlignedAverage(**options)


def _aligned(update: AlignedAverage, teacher: nn.Module, student: nn.Module, seeds: Any) -> List[int]:
    """Apply rounds with other images and layers each; return how often each ran the teacher."""
    runs: List[int] = []

    def forward(model: nn.Module, inputs: Any) -> Outputs:
        runs[-1] += model is teacher
        return Outputs(model(inputs))

    for seed in seeds:
        runs.append(0)
        layers = ["conv1", "conv2"] if seed < 2 else ["conv1", "conv2", "fc"]
        update.apply(round_context(teacher, student, layers, inputs=images(seed, 40), forward=forward))
    return runs


def test_channels_stay_matched_for_some_rounds_and_new_layers_are_matched_when_they_come() -> None:
    teacher, student = alive(0), alive(1)
    update = AlignedAverage(decay=0.9, realign_every=4)
    assert _aligned(update, teacher, student, range(9)) == [1, 0, 1, 0, 1, 0, 0, 0, 1]


def test_matching_in_every_round_equals_an_update_that_knows_nothing_yet() -> None:
    teacher, twin, student = alive(0), alive(0), alive(1)
    _aligned(AlignedAverage(decay=0.9, realign_every=1), teacher, student, range(3))
    for seed in range(3):
        _aligned(AlignedAverage(decay=0.9), twin, student, [seed])
    assert not changed(teacher, values(twin))


@pytest.mark.parametrize("change", ["a parameter", "a module", "the relation"])
def test_later_rounds_follow_what_was_exchanged_since(change: str) -> None:
    """Which modules pair is kept from round to round, for as long as both models hold the same."""
    teacher, student, update = alive(0), alive(1), AlignedAverage(decay=0.5)
    update.apply(pair(teacher, student))
    context = pair(teacher, student)
    if change == "a parameter":
        student.conv2.weight = nn.Parameter(torch.full_like(student.conv2.weight, 3.0))
    elif change == "a module":
        student.conv2 = randomise(copy.deepcopy(student.conv2), 7)
    else:
        related = {**context.related, "fc": group_layers(student)[0]}
        context = round_context(teacher, student, inputs=images(count=40), related=related)
    twin = copy.deepcopy(teacher)
    again = AlignedAverage(decay=0.5)
    again.load_state_dict(update.state_dict())
    result = update.apply(context)
    assert result == again.apply(round_context(twin, student, inputs=context.inputs, related=context.related))
    assert not changed(teacher, values(twin))


def test_it_keeps_no_model_alive() -> None:
    update, teacher = AlignedAverage(), alive(0)
    update.apply(round_context(teacher, alive(1), inputs=images(count=40)))
    dead = [weakref.ref(teacher), *map(weakref.ref, teacher.modules()), *map(weakref.ref, teacher.parameters())]
    del teacher
    gc.collect()
    assert not any(reference() is not None for reference in dead)


def test_other_models_are_aligned_anew() -> None:
    update, student = AlignedAverage(decay=0.9), alive(1)
    _aligned(update, alive(0), student, range(2))
    teacher, twin = alive(3), alive(3)
    assert _aligned(update, teacher, student, [0]) == [1]
    _aligned(AlignedAverage(decay=0.9), twin, student, [0])
    assert not changed(teacher, values(twin))


@pytest.mark.parametrize("how", ["state", "pickle"])
def test_resumed_it_writes_the_same_bit_for_bit(how: str, tmp_path: Any) -> None:
    teacher, student = alive(0), alive(1)
    update = AlignedAverage(decay=0.9, realign_every=4)
    _aligned(update, teacher, student, range(3))
    other = copy.deepcopy(teacher)
    if how == "state":
        torch.save(update.state_dict(), tmp_path / "state.pt")
        resumed = AlignedAverage(decay=0.9, realign_every=4)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    else:
        resumed = pickle.loads(pickle.dumps(update))
    assert bits(resumed.state_dict()) == bits(update.state_dict())
    assert _aligned(resumed, other, student, range(3, 7)) == _aligned(update, teacher, student, range(3, 7))
    assert not changed(other, values(teacher))


def test_mlp() -> None:
    teacher, student = randomise(mlp(hidden=8), 0), randomise(mlp(hidden=4), 1)
    result = AlignedAverage().apply(round_context(teacher, student, inputs=torch.randn(32, 5)))
    assert result.updated == ("0", "2", "5")


class Written(nn.Module):
    """What the second module reads is what the first put out, but for what was written into it in between."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(5, 6), nn.Linear(6, 3), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.between is not None:
            self.between(x)
        return self.second(x)


def _negated_in_part(x: Tensor) -> Tensor:
    return x.mul_(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))


@pytest.mark.parametrize("between", [None, _negated_in_part], ids=["nothing", "in place"])
def test_what_one_module_puts_out_and_the_next_takes_in_is_matched_once(
    between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    matched: List[Any] = []
    module = inspect.getmodule(AlignedAverage)
    whole = module._matched

    def counting(*arguments: Any) -> Any:
        matched.append(whole(*arguments))
        return matched[-1]

    monkeypatch.setattr(module, "_matched", counting)
    teacher, student = randomise(Written(between), 0), randomise(Written(None), 1)
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    related = {layer.name: layer for layer in group_layers(student)}
    update = AlignedAverage(decay=0.0)
    assert update.apply(round_context(teacher, student, inputs=inputs, related=related)).updated == ("first", "second")
    assert len(matched) == (3 if between is None else 4), "of the inputs, the hidden channels, the logits"
    maps = {name: (into.tolist(), out.tolist()) for name, (into, out) in update.state_dict()["maps"].items()}
    same = maps["second <- second"][0] == maps["first <- first"][1]
    assert same is (between is None)


class Ranks:
    """Two ranks in two threads, whose sums wait for one another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.barrier, self.rank = threading.Barrier(2, timeout=20), threading.local()
        self.given: List[Any] = [None, None]
        # The compiler's stance is the process's: two threads would give it back in the wrong order.
        monkeypatch.setattr("clda_core._host.borrowing._uncompiled", lambda *models: nullcontext())
        for module in ("aligned_average", "classes"):
            monkeypatch.setattr(f"clda_core.update.{module}.sum_across_ranks", self.sum)

    def sum(self, tensors: Any) -> List[Tensor]:
        self.given[self.rank.index] = list(tensors)
        self.barrier.wait()
        ours, theirs = self.given
        self.barrier.wait()
        return [a + b for a, b in zip(ours, theirs)]

    def run(self, work: Any) -> List[Any]:
        def one(index: int) -> Any:
            self.rank.index = index
            return work(index)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, (0, 1)))


@pytest.mark.parametrize("counts", [(20, 20), (40, 1), (31, 1), (1, 1)], ids=str)
def test_ranks_with_other_images_decide_and_write_alike(counts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> Any:
        teacher = alive(0)
        update = AlignedAverage(decay=0.0, samples=100_000)
        result = update.apply(round_context(teacher, alive(1), inputs=images(rank, counts[rank])))
        return teacher, result, update.state_dict()["maps"]

    (first, of_first, maps), (second, of_second, others) = Ranks(monkeypatch).run(work)
    assert of_first == of_second
    assert bits(maps) == bits(others)
    assert not changed(first, values(second))
    assert ("fc" in of_first.updated) is (sum(counts) >= 32)
    monkeypatch.undo()
    alone, together = alive(0), torch.cat([images(rank, count) for rank, count in enumerate(counts)])
    expected = AlignedAverage(decay=0.0, samples=100_000).apply(round_context(alone, alive(1), inputs=together))
    assert of_first == expected
    assert all(torch.allclose(value, values(alone)[name], atol=1e-6) for name, value in values(first).items())


TOO_FEW = "{} rows (samples x positions) are too few to match channels, 32 are needed"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31])
def test_a_batch_too_small_to_match_by_changes_nothing_and_is_not_remembered(count: int) -> None:
    """Over two rows all correlations are 1 or -1, and what they match would stay for twenty rounds."""
    teacher = randomise(mlp(hidden=16), 0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].weight.copy_(teacher[0].weight[order])
        student[0].bias.copy_(teacher[0].bias[order])
        student[2].weight.copy_(teacher[2].weight[:, order])
    before, inputs = values(teacher), torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    update = AlignedAverage(decay=0.5)
    result = update.apply(round_context(teacher, student, inputs=inputs[:count]))
    assert result.updated == ()
    assert set(result.skipped.values()) == {TOO_FEW.format(count)}
    assert not changed(teacher, before)
    assert update.state_dict()["maps"] == {}
    for _ in range(3):
        assert update.apply(round_context(teacher, student, inputs=inputs)).updated == ("0", "2", "5")
    assert len(update.state_dict()["maps"]) == 4
    assert all(torch.allclose(value, before[name], atol=1e-5) for name, value in values(teacher).items())


def test_positions_are_rows_and_layers_without_them_wait() -> None:
    result = AlignedAverage().apply(round_context(alive(0), alive(1), inputs=images(count=4)))
    assert result.updated == ("conv1", "depth", "conv2")
    assert result.skipped == {"fc: weight": TOO_FEW.format(4), "fc: bias": TOO_FEW.format(4)}


def test_a_students_head_beside_a_teachers_hidden_layer_of_its_width_is_skipped() -> None:
    """Its rows are classes, and those of the hidden layer are not."""
    teacher = randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)), 0)
    student = randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)), 1)
    before, inputs = values(teacher), torch.randn(64, 5)
    related = {"2": group_layers(student)[1]}
    result = AlignedAverage(decay=0.0).apply(round_context(teacher, student, ["2"], inputs=inputs, related=related))
    assert result.skipped == {"2: weight": MAY_BE_CLASSES, "2: bias": MAY_BE_CLASSES}
    assert not changed(teacher, before)


def test_a_class_that_does_not_vary_leaves_the_others_their_places() -> None:
    teacher = alive(0)
    with torch.no_grad():
        teacher.fc.weight[1] = 0
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.fc.weight.copy_(teacher.fc.weight.flip(0)[[0, 2, 1, 3]])
        student.fc.bias.copy_(teacher.fc.bias.flip(0)[[0, 2, 1, 3]])
    AlignedAverage(decay=0.0).apply(round_context(teacher, student, ["fc"], inputs=images(count=40)))
    assert torch.allclose(teacher.fc.weight, student.fc.weight, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch, "compile"), reason="needs torch.compile")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_model_is_not_compiled_anew() -> None:
    pytest.importorskip("torch._dynamo").reset()  # forget what an earlier test compiled
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    teacher, student = randomise(mlp(hidden=8), 0), randomise(mlp(hidden=4), 1)
    compiled = torch.compile(teacher, backend=backend)
    inputs = torch.randn(32, 5)
    compiled(inputs)
    count = len(graphs)
    result = AlignedAverage().apply(round_context(compiled, student, inputs=inputs))
    assert result.updated == ("0", "2", "5")
    assert count > 0
    assert len(graphs) == count


class ChannelsFirst(nn.Module):
    """LayerNorm over dimension 1, as in ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class FunctionalNorm(nn.LayerNorm):
    """The same as a subclass, as in torchvision and timm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [6, 9], ids=["as wide as deep", "wider"])
@pytest.mark.parametrize(
    "norm",
    [lambda width: nn.InstanceNorm2d(width, affine=True), nn.PReLU, ChannelsFirst, FunctionalNorm],
    ids=["InstanceNorm2d", "PReLU", "ChannelsFirst", "FunctionalNorm"],
)
def test_norms_of_other_kinds_are_aligned_by_their_channels(norm: Any, side: int) -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm(6), nn.Conv2d(6, 4, 1))

    student, order = randomise(network(), 0), [3, 0, 5, 1, 4, 2]
    teacher = network()
    state = {name: value[order] for name, value in student.state_dict().items() if not name.startswith("2.")}
    state["2.weight"], state["2.bias"] = student[2].weight[:, order], student[2].bias
    teacher.load_state_dict(state)
    inputs = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0))
    before = values(teacher)
    result = AlignedAverage(decay=0.0).apply(round_context(teacher, student, inputs=inputs))
    assert result.updated == ("0", "2"), "the norm is of the layer of its convolution"
    assert not result.skipped
    for name, value in values(teacher).items():
        assert torch.allclose(value, before[name], atol=1e-6), name


def test_a_learned_scale_without_channels_is_skipped() -> None:
    class Scaled(nn.Linear):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    teacher, student = nn.Sequential(Scaled(4, 3)), nn.Sequential(Scaled(4, 3))
    result = AlignedAverage().apply(round_context(teacher, student, inputs=torch.randn(40, 4)))
    assert result.updated == ("0",)
    assert "no channels" in result.skipped["0: scale"]


class Encoder(nn.Module):
    """PyTorch's own Transformer encoder; in eval mode it has a fast path that calls none of its parts."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **BATCH_FIRST)
        self.stem, self.encoder, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 3)
        self.padded = padded

    def forward(self, x: Tensor) -> Tensor:
        padding = (torch.arange(x.shape[1]) >= 6).expand(x.shape[:2])
        tokens = self.stem(x) if BATCH_FIRST else self.stem(x).transpose(0, 1)
        found = self.encoder(tokens, src_key_padding_mask=padding if self.padded else None)
        return self.head((found if BATCH_FIRST else found.transpose(0, 1))[:, :6].mean(1))


BATCH_FIRST: Dict[str, Any] = {}
if "batch_first" in inspect.signature(nn.TransformerEncoderLayer.__init__).parameters:  # came with torch 1.9
    BATCH_FIRST["batch_first"] = True


@pytest.mark.filterwarnings("ignore:.*nested.tensor:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("selected", [["encoder.layers.1"], None], ids=["one layer", "all"])
def test_parts_of_pytorchs_transformer_encoder_are_aligned(padded: bool, selected: Any) -> None:
    """Selected alone, a layer's hooks do not keep the others from handing it nested tensors."""
    torch.manual_seed(0)
    teacher = Encoder(padded)
    for layer in teacher.encoder.layers:
        nn.init.normal_(layer.linear1.bias)
    student = copy.deepcopy(teacher)
    order = torch.randperm(12)
    with torch.no_grad():
        for layer in student.encoder.layers:
            layer.linear1.weight.copy_(layer.linear1.weight[order])
            layer.linear1.bias.copy_(layer.linear1.bias[order])
            layer.linear2.weight.copy_(layer.linear2.weight[:, order])
    inputs = torch.randn(40, 9, 5)
    before = values(teacher)
    with no_traces(teacher, student):
        result = AlignedAverage(decay=0.0).apply(round_context(teacher, student, selected, inputs=inputs))
    assert set(result.skipped.values()) == {"it does not belong to a leaf module", NOT_CALLED}
    assert all("self_attn" in key for key in result.skipped)
    assert result.updated == (("encoder.layers.1",) if selected else ("stem", *ENCODER_LAYERS, "head"))
    assert all(torch.allclose(value, before[name], atol=1e-5) for name, value in values(teacher).items())
    views = [ModelView(model, group_layers(model)) for model in (teacher, student)]
    assert set(ENCODER_LAYERS) <= set(BySimilarity(minimum=0.9)(*views, inputs).pairs)


NOT_CALLED = "its module is not called in the forward pass"
ENCODER_LAYERS = [f"encoder.layers.{index}" for index in range(3)]
