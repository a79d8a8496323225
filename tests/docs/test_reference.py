"""What an editor shows of a public name is whole, and a strategy's card and its reference link to each other."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest

from clda_core import CldaError, info
from tests.strategies import MODULES

DOCS = Path(__file__).resolve().parents[2] / "docs"
STRATEGIES = [(role, name) for role, names in info.strategies().items() for name in names]


def callables() -> Iterator[Tuple[str, Any]]:
    """Yield every public class, function and method of ours, by a name that says where it is offered."""
    for module in MODULES:
        offered = importlib.import_module(module)
        for name in offered.__all__:
            value = getattr(offered, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)) or value is CldaError:
                continue
            yield f"{module}.{name}", value
            for attribute, member in vars(value).items() if inspect.isclass(value) else ():
                if not attribute.startswith("_") and inspect.isfunction(member):
                    yield f"{module}.{name}.{attribute}", member


def test_every_signature_names_its_parameters() -> None:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    hidden = [
        f"{name}(*{parameter.name})"
        for name, value in callables()
        if not getattr(value, "_is_protocol", False)
        for parameter in inspect.signature(value).parameters.values()
        if parameter.kind in kinds
    ]
    # What is saved beside a learner has the names that its user gives it.
    of_checkpoints = [f"clda_core.checkpoint.{name}(*beside)" for name in ("load", "pack", "save", "unpack")]
    assert hidden == [*of_checkpoints, "clda_core.saliency.Histogram.add(*scores)"]


def test_every_parameter_is_annotated_and_defaults_are_short_enough_to_read() -> None:
    wrong = [
        f"{name}({parameter})"
        for name, value in callables()
        if not getattr(value, "_is_protocol", False)
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name != "self"
        and (
            parameter.annotation is parameter.empty
            or (parameter.default is not parameter.empty and len(repr(parameter.default)) > 80)
        )
    ]
    assert wrong == []


def test_no_module_hides_a_public_name_of_its_package() -> None:
    """mkdocstrings would show the module in its place, and links to the name would lead nowhere."""
    hidden = [
        f"{module}.{name}"
        for module in MODULES
        if hasattr(importlib.import_module(module), "__path__")
        for name in importlib.import_module(module).__all__
        if not inspect.ismodule(getattr(importlib.import_module(module), name))
        and importlib.util.find_spec(f"{module}.{name}") is not None
    ]
    assert hidden == []


def test_every_public_name_says_where_it_is_from() -> None:
    strangers = [name for name, value in callables() if not value.__module__.startswith("clda_core.")]
    assert strangers == []


def test_every_public_class_and_function_explains_its_parameters() -> None:
    silent = [
        name
        for name, value in callables()
        if not getattr(value, "_is_protocol", False)
        and "." not in value.__qualname__
        and [each for each in inspect.signature(value).parameters if each != "self"]
        and not re.search(r"^(Args|Attributes):", inspect.getdoc(value) or "", re.M)
    ]
    assert silent == []


def pages_that_link(role: str, name: str) -> List[Path]:
    target = re.compile(rf"\(((?:\.\./)?api/\w+\.md)#clda_core\.{role}\.{name}\)")
    return [page for page in DOCS.rglob("*.md") if target.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("role", "name"), STRATEGIES)
def test_a_strategys_card_and_its_reference_link_to_each_other(role: str, name: str) -> None:
    (card,) = pages_that_link(role, name)
    page = re.search(rf"\(([./]*api/\w+\.md)#clda_core\.{role}\.{name}\)", card.read_text(encoding="utf-8"))[1]
    reference = (card.parent / page).resolve()
    text = reference.read_text(encoding="utf-8")
    assert f"::: clda_core.{role}\n" in text + "\n"
    assert f"](../{card.relative_to(DOCS).as_posix()})" in text
