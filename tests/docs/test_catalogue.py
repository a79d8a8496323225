"""The catalogue names every strategy, leads to its card, and says which are the defaults."""

import re
from pathlib import Path

from torch import nn

from clda_core import CollaborativeLearner, info

DOCS = Path(__file__).resolve().parents[2] / "docs"
CATALOGUE = (DOCS / "catalogue.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"\[(\*\*)?`(\w+)`(?:\*\*)?\]\(([\w/.-]+)\)")


def test_every_strategy_is_listed_and_its_card_names_it() -> None:
    cards = {name: page for _, name, page in ENTRY.findall(CATALOGUE)}
    offered = {name for names in info.strategies().values() for name in names}
    assert set(cards) - {"init_student"} == offered
    silent = [name for name, page in cards.items() if f"`{name}`" not in (DOCS / page).read_text(encoding="utf-8")]
    assert silent == []


def test_the_bold_ones_are_the_defaults() -> None:
    bold = {name for mark, name, _ in ENTRY.findall(CATALOGUE) if mark}
    learner = CollaborativeLearner(nn.Linear(2, 2), nn.Linear(2, 2))
    parts = ("distillation", "saliency", "threshold", "selection", "relation", "update", "trust", "schedule")
    defaults = {type(getattr(learner, part)).__name__ for part in parts}
    assert defaults - bold == set()
    assert bold - defaults == {"PseudoLabelCrossEntropy", "SoftConsistency", "MutualInformation"}
