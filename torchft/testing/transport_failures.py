"""What every checkpoint transport refuses, and how it fails: a part of the transport suite."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch

from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTransport,
    IntegrityError,
    ManifestError,
    StepNotServed,
    TransferAborted,
    UnsafeStateError,
)
from torchft.testing.transport_pair import PLENTY, SHORT, Pair, State, TransportPair, assert_same, expect, transfer

__all__ = ["TransportFailures"]


class TransportFailures(TransportPair):
    """Tests; see :mod:`torchft.testing.transport_suite`."""

    # --------------------------------------------------------------------------------------------- refusals

    def test_source_refuses_what_is_unsafe_and_names_its_path(self) -> None:
        pair = self.open()
        try:
            state = {"user": {"default": {"sched": threading.Lock()}}}
            text = expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, state, SHORT))
            assert "state['user']['default']['sched'] holds a <_thread.lock>" in text
            text = expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, {(1, 2): 3}, SHORT))
            assert "(1, 2)" in text
            cycle: list[object] = []
            cycle.append(cycle)
            expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, cycle, SHORT))
            sparse = {"s": torch.eye(3).to_sparse()}
            text = expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, sparse, SHORT))
            assert "state['s']" in text
        finally:
            pair.close()

    def test_pickle_only_when_allowed(self) -> None:
        state = {"set": {1, 2}, "w": torch.ones(3)}
        pair = self.open(allow_pickle=True)
        try:
            assert transfer(pair, state)["set"] == {1, 2}
        finally:
            pair.close()
        pair = self.open(allow_pickle=True)
        try:
            text = expect(ManifestError, lambda: transfer(pair, {"x": _Foreign()}))
            assert "add_safe_globals" in text
        finally:
            pair.close()

    def test_wrong_step_is_refused_and_both_are_named(self) -> None:
        for asked in (2, 9):
            pair = self.open()
            try:
                text = expect(StepNotServed, lambda p=pair, a=asked: transfer(p, {"x": 1}, 3, SHORT, ask=a))  # type: ignore[misc]
                assert f"step {asked}" in text
                assert "step 3" in text
            finally:
                pair.close()

    def test_a_step_that_is_declined_is_refused_at_once_with_the_reason(self) -> None:
        """Passed over for a transport that leaves ``decline`` as it is: then the receiver waits for its timeout."""
        pair = self.open()
        try:
            if type(pair.source).decline is CheckpointTransport.decline:
                return
            declining = threading.Thread(
                target=pair.source.decline, args=(3, "the state function\nraised", [1]), daemon=True
            )
            declining.start()
            metadata = pair.source.metadata()
            text = expect(StepNotServed, lambda: pair.receiver.recv_checkpoint(0, metadata, 3, PLENTY))
            declining.join(60)
            assert not declining.is_alive(), "the source did not return"
            assert "step 3" in text
            assert "the state function raised" in text
            state = {"w": torch.randn(1000)}
            assert_same(state, transfer(pair, state, 4))
        finally:
            pair.close()

    # ---------------------------------------------------------------------------------------------- failures

    def test_source_gone_before(self) -> None:
        pair = self.open()
        try:
            metadata = pair.source.metadata()
            pair.lose_source()
            expect(CheckpointError, lambda: pair.receiver.recv_checkpoint(0, metadata, 3, timedelta(seconds=5)))
        finally:
            pair.close()

    def test_source_gone_during(self) -> None:
        pairs: list[Pair] = []

        def into() -> State:
            pairs[0].lose_source()  # the receive has begun, no data is there
            return {}

        pairs.append(self.open(into))
        try:
            state = {"w": torch.ones(64 << 18)}
            expect(CheckpointError, lambda: transfer(pairs[0], state, timeout=timedelta(seconds=10)))
        finally:
            pairs[0].close()

    def test_source_gone_after(self) -> None:
        pair = self.open()
        try:
            state = {"w": torch.randn(1000)}
            received = transfer(pair, state)
            pair.lose_source()
            assert_same(state, received)
        finally:
            pair.close()

    def test_damaged_bytes_are_not_accepted(self) -> None:
        pairs: list[Pair] = []

        def into() -> State:
            pairs[0].corrupt()
            return {}

        pairs.append(self.open(into))
        try:
            state = {"w": torch.ones(64 << 18)}
            text = expect(IntegrityError, lambda: transfer(pairs[0], state))
            assert "replica rank 0" in text
        finally:
            pairs[0].close()

    def test_receiver_times_out_when_the_source_never_sends(self) -> None:
        pair = self.open()
        try:
            metadata = pair.source.metadata()
            expect((TimeoutError, StepNotServed), lambda: pair.receiver.recv_checkpoint(0, metadata, 3, SHORT))
        finally:
            pair.close()

    def test_steps_follow_each_other_with_changing_sizes(self) -> None:
        pair = self.open()
        try:
            for step, size in enumerate((100, 3 << 20, 10, 9 << 20, 0)):
                weights = torch.randint(0, 256, (size,), dtype=torch.uint8)
                state = {"w": weights, "step": step}
                assert_same(state, transfer(pair, state, step))
                weights.fill_(0)  # what was sent may be written again
        finally:
            pair.close()

    def test_abort_ends_a_receive_that_runs(self) -> None:
        """Passed over for a transport that leaves ``abort`` as it is: doing nothing is allowed."""
        self._ends_a_receive_that_runs(lambda receiver: receiver.abort("a member died"), "a member died")

    def _ends_a_receive_that_runs(self, end: Callable[[CheckpointTransport[State]], object], why: str) -> None:
        """``end``, called by another thread while a state comes, makes that fail with ``why``."""
        pairs: list[Pair] = []

        def into() -> State:
            ending = threading.Thread(target=end, args=(pairs[0].receiver,))
            ending.start()
            ending.join(30)
            return {}

        pairs.append(self.open(into))
        try:
            if type(pairs[0].receiver).abort is not CheckpointTransport.abort:
                text = expect(TransferAborted, lambda: transfer(pairs[0], {"w": torch.ones(64 << 18)}))
                assert why in text
        finally:
            pairs[0].close()

    def test_abort_of_nothing_changes_nothing(self) -> None:
        pair = self.open()
        try:
            state = {"w": torch.randn(1000)}
            for step in range(3):
                for transport in (pair.source, pair.receiver):
                    transport.abort()
                    transport.abort("again")
                assert_same(state, transfer(pair, state, step))
        finally:
            pair.close()

    def test_shutdown_ends_a_receive_that_runs(self) -> None:
        """Passed over for a transport that leaves ``abort`` as it is."""
        self._ends_a_receive_that_runs(lambda receiver: receiver.shutdown(wait=False), "shut down")

    def test_shutdown_twice(self) -> None:
        pair = self.open()
        pair.close()
        pair.source.shutdown()
        pair.receiver.shutdown(wait=False)


class _Foreign:
    """A class that a receiver has no reason to load."""
