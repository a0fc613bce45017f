"""ProcessGroupTorchComms says what is there and what to use instead."""

from __future__ import annotations

import importlib.machinery
import importlib.util

import pytest

from torchft.process_group import ProcessGroupError, ProcessGroupTorchComms


def _found(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    spec = importlib.machinery.ModuleSpec("torchcomms", None) if there else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torchcomms" else pytest.fail(name))


def test_without_torchcomms_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, False)
    with pytest.raises(ProcessGroupError, match=r"needs the package torchcomms, which is not installed \(pip install"):
        ProcessGroupTorchComms()


def test_with_torchcomms_it_says_that_it_cannot_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, True)
    with pytest.raises(ProcessGroupError, match=r"torchcomms is installed, but .* ProcessGroupNCCL"):
        ProcessGroupTorchComms()
