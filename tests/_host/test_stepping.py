import inspect
from typing import Any, List, Optional

import pytest
import torch
from torch import nn

from clda_core._host.accelerate import accelerated
from clda_core._host.stepping import StepWatch, adaptive_rate, make_step, unscale


class FakeScaler:
    """A GradScaler that finds what it is told to find."""

    def __init__(self, overflow: bool = False, error: Optional[Exception] = None) -> None:
        self.overflow, self.error = overflow, error

    def step(self, optimizer: Any) -> None:
        if not self.overflow:
            optimizer.step()
        if self.error is not None:
            raise self.error


class FusedScaler(FakeScaler):
    """As with a fused optimizer, which is called in any case and looks at ``found_inf`` on the device."""

    def step(self, optimizer: Any) -> None:
        optimizer.found_inf = torch.tensor(float(self.overflow))
        optimizer.step()
        del optimizer.found_inf


def sgd() -> Any:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.5)


def value(optimizer: Any) -> float:
    return optimizer.param_groups[0]["params"][0][0].item()


class FusedOptimizer:
    """Skips on the device by what a scaler left on it."""

    found_inf: Any
    steps = 0.0

    def step(self) -> None:
        self.steps += 1 - self.found_inf.item()


@pytest.mark.parametrize("overflow", [False, True])
def test_a_skipped_step_is_noticed(overflow: bool) -> None:
    optimizer = sgd()
    before = set(vars(optimizer))
    assert make_step(optimizer, FakeScaler(overflow), None) == (None, not overflow)
    assert set(vars(optimizer)) == before
    assert value(optimizer) == (1.0 if overflow else 0.5)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_that_a_fused_optimizer_skips_is_noticed(overflow: bool) -> None:
    optimizer = FusedOptimizer()
    assert make_step(optimizer, FusedScaler(overflow), None) == (None, not overflow)
    assert optimizer.steps == (0 if overflow else 1)
    assert "step" not in vars(optimizer)


def test_a_step_patched_by_a_scheduler_is_put_back() -> None:
    optimizer = sgd()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    patched, before = optimizer.step, dict(vars(optimizer))
    assert make_step(optimizer, FakeScaler())[1]
    assert optimizer.step is patched or optimizer.step == patched
    assert set(vars(optimizer)) - {"_opt_called"} == set(before) - {"_opt_called"}  # the scheduler's own mark
    assert vars(optimizer).get("step") is before.get("step")
    schedule.step()  # would warn, had the scheduler not seen the optimizer's step
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_an_error_leaves_no_trace() -> None:
    optimizer = sgd()
    before = set(vars(optimizer))
    with pytest.raises(ValueError, match="out of memory"):
        make_step(optimizer, FakeScaler(error=ValueError("out of memory")))
    assert set(vars(optimizer)) == before


def test_the_watched_step_has_the_signature_that_scalers_look_at() -> None:
    seen: List[Any] = []

    class Legacy(torch.optim.SGD):
        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
            seen.append(grad_scaler)

    class Scaler:
        def step(self, optimizer: Any) -> None:
            assert "grad_scaler" in inspect.signature(optimizer.step).parameters
            optimizer.step(grad_scaler=self)

    scaler = Scaler()
    assert make_step(Legacy([nn.Parameter(torch.ones(1))], lr=0.1), scaler)[1]
    assert seen == [scaler]


def test_an_optimizer_is_watched_until_closed_whoever_steps_it() -> None:
    """Also one that calls ``super().step()``, that steps another on the way, or raises."""
    optimizer, log = sgd(), []  # type: Any, List[Any]
    before = set(vars(optimizer))
    outer = StepWatch(optimizer, after=lambda made: log.append(("outer", made)))
    watch = StepWatch(optimizer, before=lambda: log.append(outer.inside), after=lambda made: log.append(made))
    assert not watch.stepped()
    optimizer.step()
    assert log == [False, ("outer", True), True]
    assert watch.stepped()
    with pytest.raises(TypeError):
        optimizer.step("no closure")
    assert not outer.inside
    assert log[3:] == [False], "after is not called for a step that raised"
    watch.close()
    outer.close()
    assert set(vars(optimizer)) == before


def test_without_a_scaler() -> None:
    optimizer = sgd()
    assert make_step(optimizer, None, None) == (None, True)
    assert value(optimizer) == 0.5
    assert make_step(optimizer, FakeScaler(overflow=True), lambda: "made") == ("made", True)
    assert value(optimizer) == 0.5


class Accelerated:
    """Shaped like Accelerate's optimizer, which steps through a scaler of its own and waits for micro-batches."""

    def __init__(self, skipped: bool = False, sync_gradients: bool = True) -> None:
        self.step_was_skipped = skipped
        self.gradient_state = type("GradientState", (), {"sync_gradients": sync_gradients})()

    def step(self) -> str:
        return "called"


@pytest.mark.parametrize("skipped", [False, True])
def test_an_optimizer_that_says_it_skipped_is_believed(skipped: bool) -> None:
    assert make_step(Accelerated(skipped)) == ("called", not skipped)
    assert make_step(Accelerated(skipped), stepped=lambda: True) == ("called", True)


@pytest.mark.parametrize("made", [False, True])
def test_stepped_is_asked_after_the_step(made: bool) -> None:
    calls: List[str] = []

    def stepped() -> bool:
        calls.append("asked")
        return made

    assert make_step(None, None, lambda: calls.append("stepped"), stepped) == (None, made)
    assert calls == ["stepped", "asked"]


def test_an_optimizer_that_accumulates_is_noticed() -> None:
    assert accelerated(Accelerated(sync_gradients=False)).accumulates
    assert not accelerated(Accelerated()).accumulates
    assert accelerated(sgd()) is None
    assert accelerated(None) is None


def scaler_on_cpu() -> Any:
    if not hasattr(torch, "amp") or not hasattr(torch.amp, "GradScaler"):
        pytest.skip("GradScaler works on the CPU from torch 2.3 on")
    return torch.amp.GradScaler("cpu", init_scale=4.0)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
@pytest.mark.parametrize("overflow", [False, True])
def test_torchs_own_scaler(overflow: bool, options: Any) -> None:
    scaler = scaler_on_cpu()
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=0.5, **options)
    before = set(vars(optimizer))
    scaler.scale(parameter.sum() * (float("inf") if overflow else 1.0)).backward()
    unscale(scaler, optimizer)
    unscale(scaler, optimizer)
    assert make_step(optimizer, scaler)[1] is not overflow
    scaler.update()
    assert (value(optimizer) == 1.0) is overflow
    assert set(vars(optimizer)) == before


def test_unscale_passes_other_errors_on() -> None:
    class Scaler:
        def unscale_(self, optimizer: Any) -> None:
            raise RuntimeError("unscale_() is being called after step().")

    with pytest.raises(RuntimeError, match="after step"):
        unscale(Scaler(), sgd())


def test_unscale_after_the_host_did() -> None:
    class Scaler:
        calls = 0

        def unscale_(self, optimizer: Any) -> None:
            self.calls += 1
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")

    scaler = Scaler()
    unscale(scaler, sgd())
    assert scaler.calls == 1


@pytest.mark.filterwarnings("error")
def test_a_scheduler_that_is_built_while_a_watch_is_open_keeps_its_own() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    made: List[bool] = []
    watch = StepWatch(optimizer, after=made.append)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the step() that it finds
    optimizer.step()
    scheduler.step()
    assert made == [True]
    watch.close()
    optimizer.step()
    scheduler.step()
    assert made == [True], "closed, it only passes on"


def test_a_watched_step_has_the_signature_by_which_a_scaler_chooses_how_to_call_it() -> None:
    class Scaled(torch.optim.SGD):
        def step(self, grad_scaler: Any = None) -> None:  # type: ignore[override]
            pass

    optimizer = Scaled([nn.Parameter(torch.zeros(2))], lr=1.0)
    before = inspect.signature(optimizer.step)
    with StepWatch(optimizer):
        assert inspect.signature(optimizer.step) == before


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([(6e-5, 3)], 6e-5),
        ([(6e-4, 2), (6e-5, 9)], 6e-5),
        ([(6e-5, 2), (6e-4, 2)], 6e-5),
        ([(1e-4 * 0.5**depth, 4) for depth in range(12)], 1e-4 * 0.5**6),
        ([(1e-4, 1), (0.0, 9)], 1e-4),
        ([(0.0, 1)], 0.0),
        ([(float("inf"), 5), (1e-3, 1)], 1e-3),
    ],
    ids=["one", "a backbone and a head", "as many in both", "falling from layer to layer", "one still", "still", "inf"],
)
def test_the_rate_of_several_groups_is_that_of_the_middle(rates: Any, expected: float) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1)) for _ in range(count)], "lr": rate} for rate, count in rates]
    assert adaptive_rate(torch.optim.AdamW(groups)) == pytest.approx(expected)
