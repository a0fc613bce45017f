"""torch's one-sided transports: found where they are, and where not, it is said what to install."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from torchft.checkpointing.one_sided import OneSidedUnavailable, one_sided_transports

NAME = "torch.distributed._transport"


@pytest.mark.skipif(importlib.util.find_spec(NAME) is not None, reason="this torch has one-sided transports")
def test_a_torch_without_them_says_which_one_has() -> None:
    with pytest.raises(OneSidedUnavailable, match=r"pip install 'torch>=2\.15'"):
        one_sided_transports()


def test_those_that_are_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(available_transports=lambda: ["tcp", "ucxx"], new_transport=lambda name, device: None)
    monkeypatch.setitem(sys.modules, NAME, module)
    assert one_sided_transports() == ("tcp", "ucxx")


def test_another_interface_of_that_name_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    with pytest.raises(OneSidedUnavailable, match="is not the interface that torchft knows"):
        one_sided_transports()


def test_a_missing_package_that_they_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'nixl'", name="nixl")

    monkeypatch.setattr("torchft.checkpointing.one_sided.importlib.import_module", fail)
    with pytest.raises(OneSidedUnavailable, match="needs the module nixl"):
        one_sided_transports()
