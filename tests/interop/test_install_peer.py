"""`make peer`: complete or not there, and nothing done twice."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.processes import PEER

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "install_peer.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_peer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_is_installed_only_with_the_stamp_of_these_pins(script: ModuleType, tmp_path: Path) -> None:
    peer = tmp_path / "peer"
    assert not script.installed(peer)
    (peer / "torchft").mkdir(parents=True)
    assert not script.installed(peer)
    stamp = peer / script.STAMP
    stamp.write_text("{")
    assert not script.installed(peer)
    stamp.write_text(json.dumps({"pins": ["torchft==0.1.0"]}))
    assert not script.installed(peer)


@pytest.mark.peer
@pytest.mark.usefixtures("cluster")
def test_a_second_install_does_nothing() -> None:
    before = (PEER.path / "installed.json").stat()
    done = subprocess.run([sys.executable, str(SCRIPT)], check=True, timeout=120, capture_output=True, text=True)
    assert "already has torchft==" in done.stdout
    after = (PEER.path / "installed.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
