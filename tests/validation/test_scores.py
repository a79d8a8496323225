"""The score of a network without a learner: what it is, what it leaves alone, and what it refuses."""

import math
import pathlib
from typing import Any, List

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, Outputs, validate
from clda_core.validation import (
    HardConsistency,
    MixVal,
    MutualInformation,
    NegativeEntropy,
    NeighbourhoodDensity,
    SoftConsistency,
    mixed,
    validation_statistics,
)
from tests.distributed import processes
from tests.helpers import Segmenter, batch, images, networks, no_traces, seeded
from tests.validation.validators import CASES


def noisy(inputs: Tensor) -> Tensor:
    return inputs + torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))


def options(validator: Any) -> Any:
    return {"view": noisy} if validator.needs_view and not isinstance(validator, MixVal) else {}


@pytest.mark.parametrize("name", CASES)
def test_the_score_is_that_of_the_summed_statistics_in_eval_mode(name: str) -> None:
    model, validator = networks()[0].train(), CASES[name].make()
    batches = [batch(seed) for seed in range(3)]
    with no_traces(model, values_too=True):
        found = validate(model, batches, validator, **options(validator))
        statistics = validation_statistics(model, iter(batches), validator, **options(validator))
    model.eval()
    total = torch.zeros(())
    for inputs in batches:
        view = mixed(inputs) if name == "MixVal" else noisy(inputs)
        with torch.no_grad():
            total = total + validator.statistics(model(inputs), model(view))
    assert torch.allclose(statistics, total, rtol=1e-10)
    assert found == pytest.approx(validator.score(total).item(), nan_ok=True)


def test_the_better_of_two_networks() -> None:
    """One that tells three groups of points apart, and one that was given other weights."""
    centres = 5 * torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    points = [centres + 0.3 * torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(9)]
    good, bad = nn.Linear(3, 3), seeded(lambda: nn.Linear(3, 3), 0)
    with torch.no_grad():
        good.weight.copy_(2 * torch.eye(3))
        good.bias.zero_()
    for validator in (MutualInformation(), SoftConsistency(), HardConsistency(), MixVal()):
        assert validate(good, points, validator, **options(validator)) > validate(
            bad, points, validator, **options(validator)
        )


def test_a_network_for_segmentation_and_what_is_read_by_extract() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded(Segmenter, 0)

        def forward(self, x: Tensor, *, scale: float) -> Any:
            return {"out": scale * self.net(x)}

    model = Wrapped().eval()
    given = [{"x": images(seed), "scale": 2.0} for seed in range(2)]
    found = validate(model, given, NegativeEntropy(), extract=lambda raw: Outputs(raw["out"]))
    with torch.no_grad():
        whole = torch.cat([2.0 * model.net(images(seed)) for seed in range(2)])
    assert found == pytest.approx(NegativeEntropy().score(NegativeEntropy().statistics(whole)).item())


def test_a_network_that_returns_the_same_memory_at_every_call() -> None:
    """As one does that is replayed as a CUDA graph: its logits on the view must not overwrite those before."""

    class Replayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.memory = torch.zeros(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.memory.copy_(self.scale.detach() * x)

    first = 9 * torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    assert validate(Replayed(), [first], HardConsistency(), view=lambda x: x.roll(1, 1)) == 0.0


def test_a_view_of_a_validator_that_needs_none_is_not_made() -> None:
    def unexpected(inputs: Any) -> Any:
        raise AssertionError

    model = networks()[0]
    found = validate(model, [batch()], MutualInformation(), view=unexpected)
    assert found == validate(model, [batch()], MutualInformation())


def test_logits_that_are_not_finite_on_one_batch_leave_no_score() -> None:
    model = networks()[0]
    bad = batch()
    bad[0] = math.nan
    for validator in (MutualInformation(), HardConsistency(), NeighbourhoodDensity()):
        assert math.isfinite(validate(model, [batch()], validator, **options(validator)))
        assert math.isnan(validate(model, [batch(), bad, batch()], validator, **options(validator)))


class Changing:
    """A validator whose statistics grow with the batch."""

    needs_view = False

    def statistics(self, logits: Tensor, view_logits: Any = None, mask: Any = None) -> Tensor:
        return logits[:, 0]

    def score(self, statistics: Tensor) -> Tensor:
        return statistics.sum()


MODEL = networks()[0]
GIVEN = [batch()]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: validate(MODEL, batch(), MutualInformation()), "batches is one tensor"),
        (lambda: validate(MODEL, [], MutualInformation()), "there is nothing to validate the model on"),
        (lambda: validate(MODEL.forward, GIVEN, MutualInformation()), "the model is no model"),
        (lambda: validate(MODEL, GIVEN, MutualInformation), "this is no validator"),
        (lambda: validate(MODEL, GIVEN, SoftConsistency()), "SoftConsistency compares predictions on two views"),
        (lambda: validate(MODEL, GIVEN, SoftConsistency(), view=batch()), "view cannot be called"),
        (lambda: validate(MODEL, GIVEN, MixVal(), view=noisy), "MixVal makes its second view itself"),
        (lambda: validate(MODEL, GIVEN, SoftConsistency(), view=lambda x: x[:3]), "another batch size"),
        (lambda: validate(MODEL, GIVEN, MutualInformation(), extract="out"), "extract cannot be called"),
        (lambda: validate(MODEL, [batch(), batch(count=2)], Changing()), "statistics of Changing cannot be added up"),
    ],
)
def test_wrong_arguments(call: Any, match: str) -> None:
    with no_traces(MODEL, values_too=True), pytest.raises(CldaError, match=f"{match}.*Fix: "):
        call()


def ranks_of(rank: int, ranks: int) -> List[float]:
    model = networks()[0]
    shares = [[batch(0), batch(1)], [], [batch(2)]]
    found = [validate(model, shares[rank], validator) for validator in (MutualInformation(), NegativeEntropy())]
    try:
        validate(model, [], MutualInformation())
    except CldaError as error:
        return [*found, float("nothing to validate" in str(error))]
    return found


def test_every_rank_gets_the_score_on_the_batches_of_all(tmp_path: pathlib.Path) -> None:
    """Ranks with two batches, none, and one."""
    found = processes.run(ranks_of, ranks=3, folder=tmp_path)
    whole = [validate(networks()[0], [batch(seed) for seed in range(3)], MutualInformation())]
    whole.append(validate(networks()[0], [batch(seed) for seed in range(3)], NegativeEntropy()))
    assert all(rank == pytest.approx([*whole, 1.0], rel=1e-12) for rank in found)
    assert found[0] == found[1] == found[2]
