import gc
import weakref

import pytest
import torch
from torch import nn

from clda_core._named import named_tensors
from clda_core.errors import CldaError
from clda_core.layers import canonical_buffers, canonical_name, canonical_parameters, group_layers
from tests.models import CNN, Block, ResNet, SegFormer, ViT, Wrapped, mlp

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


WRAPPERS = {
    "parallel": nn.DataParallel,
    "compiled": Wrapped,
    "parallel of compiled": lambda model: nn.DataParallel(Wrapped(model)),
    "compiled of parallel": lambda model: Wrapped(nn.DataParallel(model)),
    "parallel twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
}


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


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.module._orig_mod.module.fc.weight", "fc.weight"),
        ("encoder._orig_mod.0.weight", "encoder.0.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.fc.weight", "layers.0.fc.weight"),
        ("module", "module"),
    ],
)
def test_canonical_name(name, canonical) -> None:
    assert canonical_name(name) == canonical


def test_names_that_collide_are_an_error() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(CldaError, match=r"share a canonical name.*'module.weight', which becomes 'weight' again"):
        canonical_parameters(model)


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


def _tied(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight


def _converted(model: nn.Sequential) -> None:
    parameter = model[0].bias
    del model[0].bias
    model[0].register_buffer("bias", parameter)


def _renamed(model: nn.Sequential) -> None:
    model[3].weight_again = model[3].weight
    del model[3].weight


CHANGES = {
    "a parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(2, 2))),
    "a removed parameter": lambda model: setattr(model[0], "bias", None),
    "a new parameter": lambda model: model[2].register_parameter("scale", nn.Parameter(torch.zeros(1))),
    "a buffer": lambda model: setattr(model[3], "running_mean", torch.ones(2)),
    "a module": lambda model: model.__setitem__(1, nn.Linear(2, 2)),
    "an appended module": lambda model: model.add_module("4", nn.Linear(2, 2)),
    "the order": lambda model: model._modules.update({"0": model[1], "1": model[0]}),
    "a tie": _tied,
    "a parameter that becomes a buffer": _converted,
    "a name": _renamed,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_tensors_are_named_anew_when_the_model_has_changed(change: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2))
    before = named_tensors(model)
    again = named_tensors(model)
    assert again.state is before.state
    assert list(again.all()) == list(before.all())
    CHANGES[change](model)
    after = named_tensors(model)
    assert after.state is not before.state
    walked = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = {name: tensor for name, tensor in walked.items() if tensor.is_floating_point()}
    assert {name: id(tensor) for name, tensor in after.all().items()} == {
        name: id(tensor) for name, tensor in floating.items()
    }


def test_values_may_change_without_naming_anew() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = named_tensors(model)
    with torch.no_grad():
        model[0].weight.zero_()
    model.load_state_dict(model.state_dict())
    model.double()
    assert named_tensors(model).state is before.state
    assert named_tensors(model).parameters["0.weight"].dtype == torch.float64


def test_naming_keeps_nothing_alive() -> None:
    class Cyclic(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.parent = [parent]

    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("1", Cyclic(model))
    parameter = model[0].weight
    named_tensors(model)
    dead = [weakref.ref(model), weakref.ref(model[0])]
    del model
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    assert parameter.shape == (2, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_named_too() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    assert list(canonical_parameters(model)) == list(canonical_parameters(model)) == ["0.weight", "0.bias"]
