"""Activations are read once, in a form that two networks share, and no hook of ours stays."""

from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

from clda_core._host.activations import capturing, channel_dim, positions, rows


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))


def test_the_first_call_of_each_module_is_read() -> None:
    net = network()
    seen: List[Tuple[str, Tensor]] = []
    x = torch.randn(2, 3, 8, 8)
    with capturing({"a": net[0], "b": net[1]}, lambda name, module, inputs, output: seen.append((name, inputs[0]))):
        net(x)
        net(x + 1)
    assert [name for name, _ in seen] == ["a", "b"]
    assert torch.equal(seen[0][1], x)


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_only_the_users_hooks_stay(error: Any) -> None:
    net = network()
    calls: List[str] = []
    net[0].register_forward_hook(lambda *_: calls.append("user"))
    before = dict(net[0]._forward_hooks)
    try:
        with capturing({"a": net[0]}, lambda *_: calls.append("ours")):
            net(torch.randn(1, 3, 8, 8))
            if error is not None:
                raise error
    except (ZeroDivisionError, KeyboardInterrupt):
        pass
    assert dict(net[0]._forward_hooks) == before
    assert calls == ["user", "ours"]


def test_an_activation_is_a_copy_that_inplace_operations_do_not_reach() -> None:
    net = network()
    kept: Dict[str, Any] = {}
    with capturing({"conv": net[0]}, lambda name, module, _, out: kept.update({name: positions(out, module, 10**6)})):
        net(torch.randn(2, 3, 8, 8))
    assert (kept["conv"] < 0).any()


def test_of_many_samples_evenly_spaced_ones_are_taken_and_of_a_large_grid_means() -> None:
    images = torch.arange(8.0).reshape(8, 1).expand(8, 3)
    assert positions(images, None, 4)[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0]
    grid = torch.randn(2, 3, 8, 8)
    assert positions(grid, None, 32).shape == (2, 3, 4, 4)
    assert torch.allclose(positions(grid, None, 2)[..., 0, 0], grid.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("length", [16, 17])
def test_a_sequence_of_patches_is_a_square_with_or_without_a_class_token(length: int) -> None:
    tokens = torch.randn(2, length, 6)
    found = positions(tokens, nn.Linear(6, 6), 10**6)
    assert torch.equal(found, tokens[:, -16:].transpose(1, 2).reshape(2, 6, 4, 4))


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.long), torch.zeros(0, 3), None, ()])
def test_what_has_no_channels_is_not_read(value: Any) -> None:
    assert positions(value, None, 10) is None


def test_channels_are_where_the_module_has_them() -> None:
    image, sequence = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 3)
    assert channel_dim(image, nn.Conv2d(3, 3, 1)) == 1
    assert channel_dim(sequence, nn.Linear(3, 3)) == 2
    assert channel_dim(sequence, nn.LayerNorm(3)) == 2
    assert channel_dim(sequence, None) == 1


def test_rows_correspond_on_the_smaller_grid() -> None:
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    a, b = rows(first, second)
    assert a.shape == (8, 3)
    assert torch.equal(b, second.permute(0, 2, 3, 1).reshape(8, 5))
    assert rows(first, second[:1]) is None
