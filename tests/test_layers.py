import pytest
import torch
from torch import nn

from clda_core.errors import CldaError
from clda_core.layers import (
    ModelView,
    canonical_buffers,
    canonical_parameters,
    group_layers,
    local_names,
)
from clda_core.relation import ByRelativeDepth
from tests._host.test_names import WRAPPERS
from tests.models import CNN, Block, ResNet, SegFormer, ViT, Wrapped, mlp
from tests.nested_models import NESTED, UnitResNet

MODELS = {"resnet": ResNet, "vit": ViT, "segformer": SegFormer, "cnn": CNN, "mlp": mlp}


def names(model: nn.Module, by=None) -> "list[str]":
    return [layer.name for layer in group_layers(model, by)]


def by_name(model: nn.Module, by=None) -> dict:
    return {layer.name: layer for layer in group_layers(model, by)}


def test_resnet() -> None:
    layers = by_name(ResNet((2, 1)))
    assert list(layers) == ["conv1", "layer1.0", "layer1.1", "layer2.0", "fc"]
    assert layers["conv1"].parameters == ("conv1.weight", "bn1.weight", "bn1.bias")
    assert layers["conv1"].buffers == ("bn1.running_mean", "bn1.running_var")
    assert "layer2.0.downsample.0.weight" in layers["layer2.0"].parameters
    assert "layer2.0.downsample.1.running_var" in layers["layer2.0"].buffers
    assert [layer.stage for layer in layers.values()] == [None, "layer1", "layer1", "layer2", None]


def test_vit() -> None:
    layers = by_name(ViT(depth=3))
    assert set(layers) == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "norm",
        "head",
    }
    assert layers["blocks.1"].stage == "blocks"
    assert len(layers["blocks.1"].parameters) == 12
    assert layers["cls_token"].parameters == ("cls_token",)


def test_segformer() -> None:
    found = names(SegFormer((1, 2)))
    assert found == [
        "backbone.patch_embed1.proj",
        "backbone.patch_embed2.proj",
        "backbone.block1.0",
        "backbone.norm1",
        "backbone.block2.0",
        "backbone.block2.1",
        "backbone.norm2",
        "decode_head.linear_c.0",
        "decode_head.linear_c.1",
        "decode_head.linear_fuse.0",
        "decode_head.linear_pred",
    ]
    layers = by_name(SegFormer((1, 2)))
    assert "backbone.patch_embed1.norm.weight" in layers["backbone.patch_embed1.proj"].parameters
    assert layers["decode_head.linear_fuse.0"].buffers == (
        "decode_head.linear_fuse.1.running_mean",
        "decode_head.linear_fuse.1.running_var",
    )


def test_plain_cnn() -> None:
    layers = by_name(CNN())
    assert list(layers) == ["features.0", "features.4", "classifier"]
    assert layers["features.4"].parameters == (
        "features.4.weight",
        "features.4.bias",
        "features.5.weight",
        "features.5.bias",
        "features.6.weight",
    )


def test_mlp() -> None:
    layers = by_name(mlp(5, 6, 3))
    assert [(name, layer.numel) for name, layer in layers.items()] == [("0", 36), ("2", 54), ("5", 21)]


def test_nested_containers_give_the_innermost_repeated_blocks() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(4), Block(4)])
            self.reduction = nn.Linear(4, 4)

    model = nn.Sequential(Stage(), Stage())
    assert names(model) == ["0.blocks.0", "0.blocks.1", "0.reduction", "1.blocks.0", "1.blocks.1", "1.reduction"]


@pytest.mark.parametrize("case", NESTED)
def test_of_nested_repeated_modules_the_residual_block_is_the_layer(case) -> None:
    model, blocks = NESTED[case]
    layers = group_layers(model)
    for block in blocks:
        (layer,) = [layer for layer in layers if layer.name == block]
        inside = tuple(name for name, _ in model.named_parameters() if name.startswith(block + "."))
        assert layer.parameters == inside
        assert layer.stage == block.rpartition(".")[0]
    others = {layer.name for layer in layers} - set(blocks)
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    assert others <= leaves | {"cls_token"}


def test_stages_of_different_depth_relate_block_by_block() -> None:
    for gated in (False, True):
        teacher, student = UnitResNet((3, 4, 2), gated), UnitResNet((1, 1, 1), gated)
        related = ByRelativeDepth()(
            ModelView(teacher, group_layers(teacher)), ModelView(student, group_layers(student))
        )
        assert related.unrelated == {}
        assert [related.pairs[f"stages.1.layers.{i}"].name for i in range(4)] == ["stages.1.layers.0"] * 4


def test_a_class_that_lists_parts_everywhere_is_repeated_at_its_innermost() -> None:
    class Residual(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.Sequential(*parts)

    def block() -> nn.Module:
        return Residual(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))

    model = nn.Sequential(Residual(block(), block()), Residual(block(), block(), block()))
    assert names(model) == [f"0.parts.{i}" for i in range(2)] + [f"1.parts.{i}" for i in range(3)]


def test_blocks_in_a_module_dict() -> None:
    assert names(nn.ModuleDict({"a": Block(4), "b": Block(4)})) == ["a", "b"]


def test_a_block_class_that_occurs_once_is_not_repeated() -> None:
    assert names(nn.Sequential(mlp(), Block(4)))[-2:] == ["1.mlp.fc1", "1.mlp.fc2"]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_layers_partition_parameters_and_float_buffers(build) -> None:
    model = build()
    layers = group_layers(model)
    parameters = [name for layer in layers for name in layer.parameters]
    assert sorted(parameters) == sorted(name for name, _ in model.named_parameters())
    buffers = [name for layer in layers for name in layer.buffers]
    assert sorted(buffers) == sorted(name for name, buffer in model.named_buffers() if buffer.is_floating_point())
    assert sum(layer.numel for layer in layers) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_wrappers_change_nothing(build, wrap) -> None:
    model = build()
    assert group_layers(wrap(model)) == group_layers(model)
    wrapped = canonical_parameters(wrap(model))
    assert all(wrapped[name] is parameter for name, parameter in model.named_parameters())


def test_a_compiled_block_keeps_its_name() -> None:
    model = ResNet((2, 1))
    expected = names(model)
    model.layer1[1] = Wrapped(model.layer1[1])
    model.fc = Wrapped(model.fc)
    assert names(model) == expected
    assert by_name(model)["layer1.1"].parameters == by_name(ResNet((2, 1)))["layer1.1"].parameters


def test_lazy_modules_are_refused_until_they_have_shapes() -> None:
    lazy = getattr(nn, "LazyLinear", None)
    model = nn.Sequential(nn.Linear(3, 4) if lazy is None else lazy(4), nn.Linear(4, 2))
    if lazy is not None:
        with pytest.raises(CldaError, match=r"lazy modules.*received '0.weight' without one. Fix: run the model once"):
            group_layers(model)
    model(torch.zeros(1, 3))
    assert [(layer.name, layer.numel) for layer in group_layers(model)] == [("0", 16), ("1", 10)]


def test_tied_weights_count_once_under_their_first_name() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(7, 3)
    model.blocks = nn.Sequential(Block(3), Block(3))
    model.head = nn.Linear(3, 7)
    model.head.weight = model.embedding.weight
    layers = by_name(model)
    assert layers["embedding"].parameters == ("embedding.weight",)
    assert layers["head"].parameters == ("head.bias",)
    assert sum(layer.numel for layer in layers.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_a_shared_module_is_one_layer() -> None:
    block = Block(4)
    assert names(nn.Sequential(block, Block(4), block)) == ["0", "1"]


def test_buffers_that_are_no_weights_are_left_out() -> None:
    model = mlp()
    model[3].register_buffer("steps", torch.zeros((), dtype=torch.long))
    model[3].register_buffer("cache", torch.zeros(2), persistent=False)
    model[3].register_buffer("scale", torch.zeros(2))
    assert list(canonical_buffers(model)) == ["3.scale"]
    assert by_name(model)["2"].buffers == ("3.scale",)


def test_a_norm_without_parameters_joins_by_its_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    layers = by_name(model)
    assert list(layers) == ["0", "2"]
    assert layers["0"].buffers == ("1.running_mean", "1.running_var")


@pytest.mark.parametrize("by", [[r"stem", r"blocks"], lambda name: None if "head" in name else name.partition(".")[0]])
def test_regrouped_a_norm_without_parameters_stays_with_those_before_it(by) -> None:
    def norm() -> nn.Module:
        return nn.BatchNorm1d(2, affine=False)

    model = nn.ModuleDict({"first": norm(), "stem": nn.Linear(2, 2), "norm": norm()})
    model["blocks"] = nn.Sequential(norm(), nn.Linear(2, 2), nn.Sequential(norm()))
    model["head"] = nn.Sequential(nn.Linear(2, 2), norm())
    layers = by_name(model, by=by)
    assert {name: {buffer.rpartition(".")[0] for buffer in layer.buffers} for name, layer in layers.items()} == {
        "stem": {"first", "norm"},
        "blocks": {"blocks.0", "blocks.2.0"},
    }


def _weight_norm_by_hooks(module: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(module)


PARAMETRIZED = {"weight_norm": _weight_norm_by_hooks, "spectral_norm": nn.utils.spectral_norm}
if hasattr(nn.utils, "parametrizations"):  # from torch 1.9 on, weight_norm from 2.0 on
    PARAMETRIZED["parametrized orthogonal"] = nn.utils.parametrizations.orthogonal
    PARAMETRIZED["parametrized spectral_norm"] = nn.utils.parametrizations.spectral_norm
    if hasattr(nn.utils.parametrizations, "weight_norm"):
        PARAMETRIZED["parametrized weight_norm"] = nn.utils.parametrizations.weight_norm


class Computed(nn.Module):
    """Blocks, a stack with norms, and leaves, whose weights are computed from others."""

    def __init__(self, compute, depth: int = 3) -> None:
        super().__init__()

        def linear() -> nn.Module:
            return compute(nn.Linear(4, 4))

        self.stem, self.norm = linear(), nn.LayerNorm(4)
        self.blocks = nn.Sequential(*[Block(4) for _ in range(depth)])
        for block in self.blocks:
            block.mlp.fc1, block.attn.proj = compute(block.mlp.fc1), linear()
        self.features = nn.Sequential(*[part for _ in range(depth) for part in (linear(), nn.LayerNorm(4))])
        self.head = linear()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", PARAMETRIZED.values(), ids=PARAMETRIZED)
class TestParametrized:
    """Layers whose weights are computed from other parameters, by hooks or by torch.nn.utils.parametrize."""

    def test_the_layers_are_those_of_the_plain_network(self, compute) -> None:
        model, plain = Computed(compute), Computed(lambda module: module)
        layers = group_layers(model)
        assert [(layer.name, layer.stage) for layer in layers] == [
            (layer.name, layer.stage) for layer in group_layers(plain)
        ]
        assert "norm.weight" in layers[0].parameters
        assert [name for layer in layers for name in layer.parameters] == sorted(
            (name for name, _ in model.named_parameters()), key=_place_in(layers)
        )
        buffers = sorted(name for name, buffer in model.named_buffers() if buffer.is_floating_point())
        assert sorted(name for layer in layers for name in layer.buffers) == buffers

    def test_blocks_that_are_parametrized_themselves_repeat(self, compute) -> None:
        class Scaled(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 4)
                self.inner = nn.Linear(4, 4)

        model = nn.Sequential(compute(Scaled()), compute(Scaled()))
        assert names(model) == ["0", "1"]

    def test_a_parameter_of_a_composite_module_is_one_layer(self, compute) -> None:
        composite = nn.Linear(4, 4, bias=False)
        composite.inner = nn.Linear(4, 4)
        model = nn.Module()
        model.outer = compute(composite)
        layers = [layer for layer in group_layers(model) if not layer.name.startswith("outer.inner")]
        by_hooks = not any("parametrizations" in name for name, _ in model.named_parameters())
        assert by_hooks or [layer.name for layer in layers] == ["outer.weight"]
        assert {name for layer in layers for name in layer.parameters} == {
            name for name, _ in model.named_parameters() if not name.startswith("outer.inner")
        }

    def test_tensors_pair_with_those_of_the_related_layer(self, compute) -> None:
        teacher, student = Computed(compute, depth=3), Computed(compute, depth=2)
        ours, theirs = by_name(teacher), by_name(student)
        related = ByRelativeDepth()(
            ModelView(teacher, tuple(ours.values())), ModelView(student, tuple(theirs.values()))
        )
        assert related.unrelated == {}
        last, its_last = ours["features.4"], related.pairs["features.4"]
        assert its_last.name == "features.2"
        pairs = local_names(last, last.parameters + last.buffers)
        assert pairs.keys() == local_names(its_last, its_last.parameters + its_last.buffers).keys()
        assert pairs["+1.weight"] == "features.5.weight"
        assert len(pairs) == len(last.parameters) + len(last.buffers)

    def test_regrouped_by_a_pattern_buffers_stay_with_their_parameters(self, compute) -> None:
        (layer,) = group_layers(Computed(compute), by=[r"features"])
        assert set(layer.buffers) == {name for name in canonical_buffers(Computed(compute)) if "features" in name}


def _place_in(layers):
    order = {name: place for place, name in enumerate(name for layer in layers for name in layer.parameters)}
    return order.__getitem__


def test_a_leaf_with_parts_that_have_no_parameters_is_a_leaf() -> None:
    class Quantised(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.fake_quantise = nn.Identity()
            self.fake_quantise.register_buffer("scale", torch.ones(1))

    model = nn.Sequential(Quantised(), nn.LayerNorm(2), Quantised())
    assert names(model) == ["0", "2"]
    assert by_name(model)["0"].parameters == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert by_name(model)["2"].buffers == ("2.fake_quantise.scale",)


def test_patterns_name_layers_by_what_they_match() -> None:
    layers = by_name(ResNet((2, 1)), by=[r"layer\d+", r"fc"])
    assert list(layers) == ["layer1", "layer2", "fc"]
    assert len(layers["layer1"].parameters) == 12
    assert len(layers["layer1"].buffers) == 8


def test_the_first_pattern_that_matches_wins() -> None:
    assert names(ResNet((2, 1)), by=[r"layer1\.0", r"layer1", r"layer2"]) == ["layer1.0", "layer1", "layer2"]


def test_a_function_names_layers() -> None:
    def by(name: str):
        return "norms" if "bn" in name else None if name.startswith("fc") else "weights"

    layers = by_name(ResNet((2, 1)), by=by)
    assert list(layers) == ["weights", "norms"]
    assert all("bn" in name for name in layers["norms"].parameters)
    assert "bn1.running_mean" in layers["norms"].buffers


def test_one_layer_a_parameter() -> None:
    model = mlp()
    assert names(model, by=lambda name: name) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_grouping_sees_canonical_names(wrap) -> None:
    assert names(wrap(ResNet((2, 1))), by=[r"layer\d+"]) == ["layer1", "layer2"]


def test_grouping_leaves_the_model_as_it_was() -> None:
    model = ResNet()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    group_layers(model)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: list(attributes) for name, attributes in after.items()} == {
        name: list(attributes) for name, attributes in before.items()
    }
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model", "by", "match"),
    [
        (nn.ReLU(), None, "the model has no parameters.*received ReLU"),
        (mlp(), [r"layer\d"], "leaves every parameter out.*for example '0.weight'"),
        (mlp(), lambda name: None, "leaves every parameter out"),
        (mlp(), lambda name: 3, "failed for parameter '0.weight'.*received 3"),
        (mlp(), lambda name: "", "failed for parameter '0.weight'.*non-empty"),
        (mlp(), r"layer\d", "of a wrong type.*a sequence of regular expressions"),
        (mlp(), [3], "of a wrong type"),
        (mlp(), 3, "of a wrong type"),
        (mlp(), ["("], "not a regular expression"),
    ],
)
def test_wrong_input(model, by, match) -> None:
    with pytest.raises(CldaError, match=match):
        group_layers(model, by)
