import json
from typing import Any

import pytest

from clda_core import Never, Report, RoundRecord, Schedule
from clda_core.history import Earlier
from tests.helpers import batch, make_learner, networks, sgd


def report(**options: Any) -> Report:
    rounds = (
        RoundRecord(
            step=210,
            rates={"conv1": 0.5, "layer1.0": 0.125},
            selected=("layer1.0",),
            updated=("layer1.0",),
            skipped={"layer1.0: bias": "shapes differ"},
            accepted=True,
            score_before=1.0,
            score_after=1.25,
        ),
        RoundRecord(
            step=220,
            rates={"conv1": 0.25, "layer1.0": 1.0},
            source_rates={"conv1": 0.75},
            selected=("conv1", "layer1.0"),
            strength=0.5,
            accepted=False,
            score_before=1.25,
            score_after=float("nan"),
        ),
    )
    defaults = {
        "layers": ("conv1", "layer1.0", "classifier"),
        "rounds": rounds,
        "unrelated": {"classifier": "no student layer of this name"},
        "steps": 225,
        "discarded": 3,
    }
    return Report(**{**defaults, **options})


EMPTY = {"rounds": (), "unrelated": {}, "steps": 7, "discarded": 0}

TABLE = """\
CLDA after 225 optimizer steps: 2 rounds, 1 of them changed the teacher, 2 judged and 1 accepted, \
3 observations discarded (non-finite)
layer       first LSR  last LSR  selected  updated  note
conv1           0.500     0.250         1        0
layer1.0        0.125     1.000         2        1
classifier    unknown   unknown         0        0  unrelated: no student layer of this name"""


def test_the_table() -> None:
    assert str(report()) == TABLE


EARLIER = Earlier(
    rounds=3,
    changed=2,
    judged=2,
    accepted=1,
    first_rates={"conv1": 0.75},
    last_rates={"conv1": 0.625, "classifier": 0.5},
    selected={"conv1": 3},
    updated={"conv1": 2},
)


def test_the_table_counts_rounds_that_are_not_kept_one_by_one() -> None:
    first = RoundRecord(step=100, rates={"conv1": 0.75}, selected=("conv1",), updated=("conv1",))
    then = RoundRecord(step=110, rates={"classifier": 0.5}, selected=("conv1",), updated=("conv1",), accepted=True)
    last = RoundRecord(step=120, rates={"conv1": 0.625}, selected=("conv1",), accepted=False)
    earlier = Earlier().and_then(first).and_then(then).and_then(last)
    assert earlier == EARLIER._replace(first_rates={"conv1": 0.75, "classifier": 0.5})
    made = report(earlier=earlier)
    assert made.made == 5
    assert str(made).splitlines() == [
        "CLDA after 225 optimizer steps: 5 rounds (the last 2 kept one by one), 3 of them changed the teacher, "
        "4 judged and 2 accepted, 3 observations discarded (non-finite)",
        "layer       first LSR  last LSR  selected  updated  note",
        "conv1           0.750     0.250         4        2",
        "layer1.0        0.125     1.000         2        1",
        "classifier      0.500     0.500         0        0  unrelated: no student layer of this name",
    ]


def test_the_table_says_why_a_selected_layer_was_never_updated() -> None:
    record = RoundRecord(
        step=1, rates={"conv1": 0.5}, selected=("conv1",), skipped={"conv1: weight": "shapes differ: a, b"}
    )
    (line,) = [of for of in str(report(rounds=(record,))).splitlines() if of.startswith("conv1")]
    assert line.endswith("1        0  shapes differ: a, b")


def led(step: int, lead: float, **options: Any) -> RoundRecord:
    return RoundRecord(step=step, rates={"conv1": 0.5}, selected=("conv1",), lead=lead, **options)


def test_the_report_says_who_led_and_why_no_round_changed_the_teacher() -> None:
    behind = [led(step, lead, trust=0.0, skipped={"conv1": "behind"}) for step, lead in ((10, -0.25), (20, -0.125))]
    lines = str(report(rounds=tuple(behind))).splitlines()
    assert lines[1] == "lead of the student: -0.250 at first, -0.125 at last (trust 0.00)"
    assert lines[2] == "no round changed the teacher: behind"
    ahead = led(30, 0.5, trust=1.0, updated=("conv1",))
    lines = str(report(rounds=(*behind, ahead))).splitlines()
    assert lines[1] == "lead of the student: -0.250 at first, +0.500 at last (trust 1.00)"
    assert not any(line.startswith("no round") for line in lines)


def test_the_table_says_once_why_no_round_changed_the_teacher() -> None:
    skipped = {"conv1": "behind", "layer1.0": "behind", "classifier": "of another shape"}
    record = RoundRecord(step=1, rates={"conv1": 1.0}, selected=("conv1", "layer1.0", "classifier"), skipped=skipped)
    shown = str(report(rounds=(record,), unrelated={}))
    assert "no round changed the teacher: behind" in shown
    assert shown.count("behind") == 1
    assert "of another shape" in shown


def test_a_round_says_why_it_changed_nothing() -> None:
    assert led(1, 0.0, updated=("conv1",)).reason is None
    assert led(1, 0.0, accepted=False, skipped={"conv1: bias": "x"}).reason == "the guard rejected it"
    assert led(1, 0.0, accepted=False, skipped={"conv1": "went back"}).reason == "went back"  # as KeepBest does
    assert led(1, 0.0, skipped={"a": "one", "b": "two", "c": "two"}).reason == "two"
    assert RoundRecord(step=1, rates={}).reason == "no layer was selected"


@pytest.mark.filterwarnings("ignore:optimizer step 2 has no target data")
def test_the_report_says_why_no_round_was_made() -> None:
    def shown(steps: int, target: bool = True, **options: Any) -> str:
        teacher, student = networks()
        learner, optimizer = make_learner(teacher, student, **options), sgd(student)
        for _ in range(steps):
            if target:
                learner.distill(student(batch()), batch()).backward()
            learner.step(optimizer)
        made = learner.report()
        assert not made.rounds
        assert str(Report.from_dict(json.loads(json.dumps(made.to_dict())))) == str(made)
        return str(made).partition("\nno round was made: ")[2].partition("\n")[0]

    assert shown(1, enabled=False) == "the learner is not enabled"
    assert shown(1, schedule=Never()) == "the schedule is Never()"
    due = {"schedule": Schedule(warmup=1, interval=1)}
    assert shown(0, **due).startswith("no optimizer step was counted. Call learner.step(optimizer)")
    assert shown(1, **due) == "the first is due at step 2"
    assert shown(2, target=False, **due) == "the round of step 2 waits for a step with target data"


def test_a_report_with_rounds_says_nothing_of_none() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, schedule=Schedule(interval=1))
    learner.distill(student(batch()), batch()).backward()
    learner.step(sgd(student))
    learner.step(sgd(student), stepped=lambda: False)
    assert learner.report().rounds
    assert learner.report().no_round == ""


def test_from_dict_reads_a_report_from_before_rounds_were_summed_up() -> None:
    state = report().to_dict()
    assert state.pop("earlier") == Earlier().to_dict()
    assert str(Report.from_dict(state)) == TABLE


def test_the_table_without_guard_or_rounds() -> None:
    plain = report(rounds=(RoundRecord(step=1, rates={"conv1": 1.0}),), unrelated={}, discarded=0)
    assert str(plain).splitlines()[:2] == [
        "CLDA after 225 optimizer steps: 1 rounds, 0 of them changed the teacher",
        "no round changed the teacher: no layer was selected",
    ]
    assert str(report(**EMPTY)) == "CLDA after 7 optimizer steps: 0 rounds"
    before = report(**{**EMPTY, "unrelated": {"conv1": "no such layer"}})
    assert str(before).splitlines()[1:] == ["conv1: unrelated: no such layer"]


@pytest.mark.parametrize("options", [{}, EMPTY, {"earlier": EARLIER}])
def test_to_dict_is_json_and_holds_everything(options: Any) -> None:
    made = report(**options)
    loaded = json.loads(json.dumps(made.to_dict()))
    assert str(loaded) == str(made.to_dict())
    assert repr(Report.from_dict(loaded)) == repr(made)  # not ==, since a score is NaN


def test_to_dict_shares_nothing_with_the_report() -> None:
    made = report()
    made.to_dict()["rounds"][0]["rates"]["conv1"] = 9.0
    made.to_dict()["unrelated"].clear()
    assert str(made) == TABLE
