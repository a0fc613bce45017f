"""The Manager's default transport, and how one of the user's own does what it does."""

from __future__ import annotations

import urllib.error
import urllib.request
from datetime import timedelta
from typing import Any

import pytest

from tests.checkpointing.loopback import port_of
from tests.groups import Replica, running
from torchft.checkpointing import HTTPTransport, Unauthorized
from torchft.heal_pause import Pausing


def test_the_token_of_the_environment_is_asked_for_and_presented(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as groups:
        monkeypatch.setenv("TORCHFT_TOKEN", "right")
        a, b = (groups.replica(name, seed=seed) for seed, name in enumerate("ab"))
        groups.train_together((a.manager, a.step), (b.manager, b.step))
        assert a.weights() == b.weights()
        transport: Any = a.manager._transport
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port_of(transport)}/checkpoint/1/manifest", timeout=60)
        assert refused.value.code == 401


@pytest.mark.parametrize("how", [{}, {"hostname": "127.0.0.3"}])
def test_others_are_told_the_address_that_routes_to_the_lighthouse_of_the_manager(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, str]
) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with running() as groups:  # it passes lighthouse_addr
        transport: Any = groups.replica("a", **how).manager._transport
        addresses = [a for a in transport.metadata().split() if a.startswith("http://")]
        assert addresses[0] == f"http://{how.get('hostname', '127.0.0.1')}:{port_of(transport)}"


@pytest.mark.parametrize(("token", "given"), [("wrong", "another one was given"), ("", "none was given")])
def test_a_group_with_another_token_is_told_so_once_and_waits_while_the_others_train(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, token: str, given: str
) -> None:
    monkeypatch.setattr("torchft.heal_pause._TOKEN", (0.05, 0.05))
    with running(join_timeout_ms=60_000) as groups:
        monkeypatch.setenv("TORCHFT_TOKEN", "right")
        a = groups.replica("a")
        a.step()
        monkeypatch.setenv("TORCHFT_TOKEN", token)
        b = groups.replica("b")
        transport: Any = b.manager._transport
        committed: list[bool] = []
        refused: list[Exception] = []
        waited: list[Exception] = []
        goal: list[int] = []

        def train() -> None:
            while not goal or a.manager.current_step() < goal[0]:
                a.optimizer.zero_grad()
                a.compute(1.0)
                committed.append(a.manager.should_commit())

        def heal() -> None:
            while not goal or b.manager.current_step() < goal[0]:
                b.step()
                why = b.manager.errored()
                if isinstance(why, Unauthorized):
                    refused.append(why)
                elif why is not None:
                    waited.append(why)
                elif not goal and b.manager.current_step():  # it has healed
                    goal.append(b.manager.current_step() + 3)
                if len(refused) == 3:
                    transport._token = "right"  # as if it had been started again

        groups.together(heal, train)
    assert all(committed), "it costs the others no step"
    assert len(refused) == 3
    assert len(waited) > len(refused), "it is not tried in each step"
    assert given in str(refused[0])
    assert "set TORCHFT_TOKEN to the same text in all groups" in str(refused[0])
    assert all(isinstance(e, Pausing) and given in str(e) for e in waited)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "the token of this group is not that of the groups that have the state" in said
    assert given in said
    assert "right" not in caplog.text


def test_a_bad_token_is_refused_by_the_name_of_the_variable_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("two words", "schlüssel", ""):
        with pytest.raises(ValueError, match="TORCHFT_TOKEN") as error:
            HTTPTransport(token=token)
        assert not token or token not in str(error.value)


def test_a_transport_of_ones_own_receives_into_the_registered_state(caplog: pytest.LogCaptureFixture) -> None:
    with running() as groups, caplog.at_level("INFO", "torchft.checkpointing"):
        replicas: list[Replica] = []
        for number, name in enumerate("ab"):
            transport: HTTPTransport[Any] = HTTPTransport(
                timedelta(seconds=40),
                snapshot="lock",
                token="secret",
                copy_below=0,
                state_dict=lambda number=number: replicas[number].manager.live_state(),
            )
            replicas.append(groups.replica(name, seed=number, checkpoint_transport=transport))
        a, b = replicas
        groups.train_together((a.manager, a.step), (b.manager, b.step))
        assert a.weights() == b.weights()
        live = a.manager.live_state()
        assert live["user"]["default"]["model"]["weight"].data_ptr() == a.model.weight.data_ptr()
        assert live["torchft"] == a.manager.state_dict()
        size = sum(p.numel() * 4 for p in b.model.parameters())
        assert f", {size} of them in place" in caplog.text
