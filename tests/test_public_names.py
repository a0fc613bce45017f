"""``__all__`` is exact in every module, and what has to be light does not import torch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import torchft

ROOT = Path(__file__).parents[1]
GENERATED = "torchft.coordination.proto"


def _modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(torchft.__path__, "torchft.", onerror=lambda name: None)]
    return ["torchft", *(n for n in found if not n.startswith(GENERATED) and not n.endswith(".__main__"))]


def _defined(module: ModuleType) -> set[str]:
    """Public classes and functions whose home is this module."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isroutine(value))
        and getattr(value, "__module__", None) == module.__name__
    }


@pytest.mark.parametrize("name", _modules())
def test_all_is_exact(name: str) -> None:
    module = importlib.import_module(name)
    defined = _defined(module)
    exported = getattr(module, "__all__", None)
    if exported is None:
        assert hasattr(module, "__path__"), f"{name} has no __all__"
        assert not defined, f"{name} defines {sorted(defined)} and has no __all__"
        return
    assert len(set(exported)) == len(exported), f"{name}.__all__ names something twice"
    missing = [n for n in exported if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ names {missing}, which do not exist"
    assert not [n for n in exported if n.startswith("_")], f"{name}.__all__ names something private"
    unlisted = sorted(defined - set(exported))
    assert not unlisted, f"{name} defines {unlisted}, which are not in its __all__: list them or begin them with _"


@pytest.mark.parametrize("name", _modules())
def test_module_says_what_it_is(name: str) -> None:
    doc = importlib.import_module(name).__doc__
    assert doc, f"{name} has no docstring"
    assert doc.strip()


@pytest.mark.parametrize("name", ["torchft", "torchft.config", "torchft.runtime.loop", "torchft.core.membership"])
def test_modules_without_tensors_do_not_import_torch(name: str) -> None:
    _check_imports_not("torch", name)


def test_a_trainer_does_not_wait_for_what_only_sharded_tensors_need() -> None:
    _check_imports_not("sympy", "torchft.manager, torchft.ddp, torchft.optim, torchft.data, torchft.local_sgd")


@pytest.mark.parametrize("package", ["torchft.core", "torchft.runtime", "torchft.coordination", "torchft.cli"])
def test_lighthouse_and_command_line_do_not_import_torch(package: str) -> None:
    _check_imports_not("torch", package)


def _check_imports_not(unwanted: str, names: str) -> None:
    code = f"import sys, {names}; sys.exit('{unwanted} was imported' if '{unwanted}' in sys.modules else 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
