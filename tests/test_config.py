"""Environment variables: how they are read, what is said about a bad one, and that their page is current."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from torchft import config

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in config.SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)


@pytest.mark.parametrize("setting", config.SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("value", [None, "", "  "])
def test_unset_or_empty_means_the_default(
    setting: config.Setting[object], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(setting.name, value)
    assert setting.read() == setting.default
    assert not setting.is_set()


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        (config.LIGHTHOUSE, " http://head:29510 ", "http://head:29510"),
        (config.MANAGER_PORT, "0", 0),
        (config.MANAGER_PORT, "65535", 65535),
        (config.TIMEOUT_SEC, "90", timedelta(seconds=90)),
        (config.QUORUM_TIMEOUT_SEC, "0.5", timedelta(milliseconds=500)),
        (config.CONNECT_TIMEOUT_SEC, "1e1", timedelta(seconds=10)),
        (config.HEAL_PAUSE_SEC, "0.5", timedelta(milliseconds=500)),
        (config.QUORUM_RETRIES, "0", 0),
        (config.HOST, "10.0.0.7", "10.0.0.7"),
        (config.PROACTIVE_RECOVERY, "0", False),
        (config.PROACTIVE_RECOVERY, "off", False),
        (config.PROACTIVE_RECOVERY, "False", False),
        (config.PROACTIVE_RECOVERY, "1", True),
        (config.PROACTIVE_RECOVERY, "YES", True),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_value_is_read(
    setting: config.Setting[object], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting.name, text)
    assert setting.read() == value
    assert setting.is_set()


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (config.MANAGER_PORT, "65536"),
        (config.MANAGER_PORT, "-1"),
        (config.MANAGER_PORT, "http"),
        (config.TIMEOUT_SEC, "0"),
        (config.TIMEOUT_SEC, "-3"),
        (config.TIMEOUT_SEC, "nan"),
        (config.TIMEOUT_SEC, "inf"),
        (config.TIMEOUT_SEC, "60s"),
        (config.TIMEOUT_SEC, "1e-9"),
        (config.HOST, "http://10.0.0.7"),
        (config.HOST, "node7:29510"),
        (config.HOST, "node 7"),
        (config.QUORUM_RETRIES, "-1"),
        (config.QUORUM_RETRIES, "1.5"),
        (config.PROACTIVE_RECOVERY, "maybe"),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_error_names_the_variable_its_value_and_what_it_expects(
    setting: config.Setting[object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting.name, text)
    with pytest.raises(config.ConfigError) as caught:
        setting.read()
    assert setting.name in str(caught.value)
    assert repr(text) in str(caught.value)
    assert f"expected {setting.kind}" in str(caught.value)


TORCH = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "GLOO_SOCKET_IFNAME"}


def test_all_names_are_ours_or_torchs_and_each_is_there_once() -> None:
    names = [s.name for s in config.SETTINGS]
    assert len(set(names)) == len(names)
    assert {name for name in names if not name.startswith("TORCHFT_")} <= TORCH


def test_nothing_else_in_the_package_reads_one_of_the_variables() -> None:
    known = {s.name for s in config.SETTINGS}
    for path in (ROOT / "torchft").rglob("*.py"):
        if path.name == "config.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            reads = "environ.get(" in line or "getenv(" in line or 'environ["' in line.split("] =")[0]
            assert not (reads and any(f'"{name}"' in line for name in known)), (
                f"{path}:{number} reads a setting by itself"
            )


def test_configuration_page_is_current() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "torchft.config"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert made == config.markdown()
    assert all(f"`{s.name}`" in made for s in config.SETTINGS)
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == made, "run: python -m torchft.config > docs/configuration.md"
