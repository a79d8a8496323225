"""What is there after ``import clda_core``, and what tab completion shows of it."""

import importlib.util
import subprocess
import sys

import clda_core


def after_import(code: str) -> str:
    """Return what a new process prints that imported nothing but the package."""
    command = [sys.executable, "-c", f"import sys, clda_core; {code}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode().strip()


def test_checkpoint_is_there_after_import() -> None:
    assert after_import("print(clda_core.checkpoint.save.__name__)") == "save"


def test_tab_completion_of_every_public_module_shows_its_own_names_only() -> None:
    for engine in ("lightning", "mmengine", "transformers"):
        if importlib.util.find_spec(engine):
            importlib.import_module(f"clda_core.integrations.{engine}")
    ours = {name: module for name, module in sys.modules.items() if name.startswith("clda_core.")}
    modules = {name: module for name, module in ours.items() if hasattr(module, "__all__")}
    assert {"clda_core.checkpoint", "clda_core.selection", "clda_core.update.guard"} <= modules.keys()
    for name, module in modules.items():
        assert sorted(dir(module)) == sorted(module.__all__), name
    top = {name.split(".")[1] for name in modules} - {"integrations"}  # which import their engine
    assert set(dir(clda_core)) == {*clda_core.__all__, *top}
    assert not {"nn", "torch", "sys"} & set(dir(clda_core))
