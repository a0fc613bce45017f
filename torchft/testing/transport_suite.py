"""What every checkpoint transport must do, as tests: derive from :class:`TransportSuite` and say how to open a pair.

    class TestMyTransport(TransportSuite):
        def open(self, into=None, allow_pickle=False):
            ...
            return Pair(source, receiver, lose_source=..., corrupt=..., close=...)

pytest finds the inherited ``test_`` methods; each opens its own pair, and every wait in them is bounded.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from torchft.checkpointing.mesh import MeshSpec
from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTransport,
    IntegrityError,
    ManifestError,
    StepNotServed,
    TransferAborted,
    UnsafeStateError,
)
from torchft.checkpointing.tree import DTYPES

__all__ = ["Pair", "TransportSuite", "assert_same", "transfer"]

PLENTY = timedelta(seconds=30)
SHORT = timedelta(seconds=1)
State = Any


@dataclass
class Pair:
    """A source (replica rank 0) and a receiver (replica rank 1) that can talk to each other."""

    source: CheckpointTransport[State]
    receiver: CheckpointTransport[State]
    lose_source: Callable[[], None]
    """Ends the source as its death would: connections break."""
    corrupt: Callable[[], None]
    """Damages a byte of what the source sends from here on, after it was hashed. Called between the receiver's
    reading the manifest and the data."""
    close: Callable[[], None]


def assert_same(want: object, got: object, path: str = "state") -> None:
    """Equal types, values to the bit, dtypes, shapes and strides.

    Raises:
        AssertionError: naming the path.
    """
    if isinstance(want, DTensor):
        assert isinstance(got, DTensor), path
        assert want.placements == got.placements, path
        assert want.shape == got.shape, path
        assert MeshSpec.of(want.device_mesh) == MeshSpec.of(got.device_mesh), path
        assert_same(want.to_local(), got.to_local(), f"{path} (local)")
    elif isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor), path
        assert (want.dtype, want.shape, want.stride()) == (got.dtype, got.shape, got.stride()), path
        assert _bits(want) == _bits(got), f"{path}: values differ"
    elif isinstance(want, dict):
        assert type(want) is type(got), path
        assert isinstance(got, dict)
        assert list(want) == list(got), f"{path}: keys or their order differ"
        if isinstance(want, defaultdict) and isinstance(got, defaultdict):
            assert want.default_factory is got.default_factory, path
        for key, value in want.items():
            assert_same(value, got[key], f"{path}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert type(want) is type(got), path
        assert isinstance(got, (list, tuple))
        assert len(want) == len(got), path
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert type(want) is type(got), path
        assert want == got or (want != want and got != got), f"{path}: {want!r} != {got!r}"  # nan


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def transfer(pair: Pair, state: State, step: int = 3, timeout: timedelta = PLENTY, ask: int | None = None) -> State:
    """Sends at the source and receives at the receiver, at the same time.

    Args:
        pair: of transports.
        state: sent.
        step: of the state.
        timeout: for the receiver.
        ask: the step that the receiver asks for; by default ``step``.

    Raises:
        Exception: the receiver's, else the source's.
    """
    failures: list[BaseException] = []

    def send() -> None:
        try:
            pair.source.send_checkpoint([1], step, state, PLENTY)
        except Exception as e:
            failures.append(e)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        metadata = pair.source.metadata()
        received = pair.receiver.recv_checkpoint(0, metadata, step if ask is None else ask, timeout)
    except BaseException:
        pair.lose_source()
        sender.join(60)
        if failures and isinstance(failures[0], UnsafeStateError):
            raise failures[0] from None
        raise
    sender.join(60)
    assert not sender.is_alive(), "the source did not return"
    pair.source.disallow_checkpoint()
    if failures:
        raise failures[0]
    return received


def _expect(error: type[BaseException] | tuple[type[BaseException], ...], run: Callable[[], object]) -> str:
    try:
        run()
    except error as e:
        return str(e)
    raise AssertionError(f"{error} was expected")


class TransportSuite(ABC):
    """The tests. Bound to pytest only by the names of its methods."""

    @abstractmethod
    def open(self, into: Callable[[], State] | None = None, allow_pickle: bool = False) -> Pair:
        """A fresh pair.

        Args:
            into: the receiver's ``state_dict``.
            allow_pickle: of both.
        """

    def round_trip(self, state: State, into: Callable[[], State] | None = None) -> State:
        """Moves a state over a fresh pair and checks that it arrives as it was."""
        pair = self.open(into)
        try:
            received = transfer(pair, state)
            assert_same(state, received)
            return received
        finally:
            pair.close()

    # ------------------------------------------------------------------------------------- what arrives

    def test_nested_tree_arrives_with_its_types(self) -> None:
        self.round_trip(
            {
                "user": {
                    "default": {
                        "numbers": [0, -1, 2**70, 1.5, -0.0, float("inf"), float("-inf"), float("nan")],
                        "others": (None, True, False, "text ü\ud800", b"\x00\xff", ()),
                        "torch": [torch.float8_e5m2, torch.device("cuda", 1), torch.Size([2, 3])],
                        "ordered": OrderedDict([("z", 1), ("a", [torch.arange(3)])]),
                        "defaults": defaultdict(dict, {5: {"step": torch.tensor(2.0)}}),
                        0: {-1: {}},
                    }
                },
                "torchft": {"step": 7, "batches_committed": 14},
            }
        )

    def test_model_and_optimizer_state_arrive(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(torch.randn(5, 20)).sum().backward()
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        save = {"model": model.state_dict(), "optim": optimizer.state_dict(), "sched": scheduler.state_dict()}
        save["model"] = dict(save["model"])
        self.round_trip({"user": {"default": save}, "torchft": {"step": 1, "batches_committed": 2}})

    def test_empty_tensors_and_scalars(self) -> None:
        self.round_trip(
            {
                "none": torch.empty(0),
                "shape": torch.empty(3, 0, 2, dtype=torch.int16),
                "scalar": torch.tensor(3.5),
                "one": torch.ones(1, 1, 1),
                "flag": torch.tensor(True),
            }
        )

    def test_state_without_tensors(self) -> None:
        self.round_trip({"user": {}, "torchft": {"step": 0, "batches_committed": 0}})

    def test_every_dtype_arrives_bit_for_bit(self) -> None:
        state = {}
        for name, dtype in DTYPES.items():
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, (48,), dtype=torch.uint8)
            state[name] = raw.view(dtype)
        self.round_trip(state)

    def test_views_arrive_with_their_strides(self) -> None:
        base = torch.randn(60, 40)
        self.round_trip(
            {
                "transposed": torch.randn(5, 7).t(),
                "column": torch.randn(100, 100)[:, 3],
                "every other": torch.arange(1000)[::2],
                "expanded": torch.randn(4, 1).expand(4, 50),
                "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                "conjugate": torch.randn(6, dtype=torch.complex64).conj(),
                "imaginary": torch.randn(6, dtype=torch.complex64).conj().imag,
                "rows": base[3:9],
                "block": base[20:30, 5:9],
                "end": base[-1],
            }
        )

    def test_tied_weights_are_tied_on_arrival_and_sent_once(self) -> None:
        weight = torch.randn(50, 8)
        state = {"embed": weight, "head": weight, "part": weight[10:20], "bits": weight.view(torch.int32)[1]}
        received = self.round_trip(state)
        storages = {t.untyped_storage().data_ptr() for t in received.values()}
        assert len(storages) == 1
        assert received["head"].untyped_storage().nbytes() == weight.untyped_storage().nbytes()
        received["embed"].fill_(1.0)
        assert float(received["part"].sum()) == received["part"].numel()

    def test_many_small_tensors(self) -> None:
        self.round_trip({i: {"step": torch.tensor(float(i)), "w": torch.full((i % 40,), i)} for i in range(3000)})

    def test_tensors_across_chunk_borders(self) -> None:
        sizes = [8 << 20, 1, (8 << 20) - 1, (3 << 20) + 5, 100, 20 << 20, 7]
        self.round_trip({i: torch.randint(0, 256, (n,), dtype=torch.uint8) for i, n in enumerate(sizes)})

    def test_dtensor_arrives_with_mesh_and_placements(self) -> None:
        received = self.round_trip({"w": self._dtensor(torch.arange(12.0).reshape(3, 4)), "plain": torch.ones(2)})
        assert isinstance(received["w"], DTensor)

    def test_dtensor_is_received_in_place(self) -> None:
        live = self._dtensor(torch.zeros(3, 4))
        local = live.to_local()
        received = self.round_trip({"w": self._dtensor(torch.arange(12.0).reshape(3, 4))}, lambda: {"w": live})
        assert received["w"] is live
        assert torch.equal(local, torch.arange(12.0).reshape(3, 4))

    @staticmethod
    def _dtensor(local: torch.Tensor) -> DTensor:
        mesh = MeshSpec("cpu", (2,), (0, 1), ("shard",)).build()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size([5, 4]), stride=(4, 1))

    def test_more_than_2_gib_in_one_tensor(self) -> None:
        big = torch.empty((2 << 30) + 12345, dtype=torch.uint8)
        big[:: 1 << 12] = 7
        big[-1] = 9
        live = torch.zeros(big.shape, dtype=torch.uint8)
        pair = self.open(lambda: {"big": live})
        try:
            received = transfer(pair, {"big": big}, timeout=timedelta(seconds=90))
        finally:
            pair.close()
        assert received["big"] is live
        assert torch.equal(live, big)

    # -------------------------------------------------------------------------------------------- in place

    def test_receives_into_the_live_tensors_that_fit(self) -> None:
        live = {
            "fits": torch.zeros(1000),
            "strides": torch.zeros(30, 20).t(),
            "shape": torch.zeros(6),
            "dtype": torch.zeros(5),
            "kept": torch.full((3,), 8.0),
        }
        state = {
            "fits": torch.randn(1000),
            "strides": torch.randn(20, 30),
            "shape": torch.randn(5),
            "dtype": torch.randn(5, dtype=torch.float64),
            "new": torch.randn(4),
        }
        pair = self.open(lambda: live)
        try:
            assert pair.receiver.receives_in_place
            assert not pair.source.receives_in_place
            received = transfer(pair, state)
        finally:
            pair.close()
        for key in ("fits", "strides"):
            assert received[key] is live[key], key
            assert torch.equal(live[key], state[key]), key
        for key in ("shape", "dtype", "new"):
            assert_same(state[key], received[key])
        assert list(received) == list(state)
        assert torch.equal(live["shape"], torch.zeros(6))
        assert torch.equal(live["kept"], torch.full((3,), 8.0))

    def test_in_place_writes_no_byte_beside_the_tensors(self) -> None:
        live = torch.full((40, 10), 5.0)
        source = torch.randn(40, 10)
        pair = self.open(lambda: {"left": live[:, :4], "last": live[-1, 4:]})
        try:
            received = transfer(pair, {"left": source[:, :4], "last": source[-1, 4:]})
        finally:
            pair.close()
        assert received["left"].data_ptr() == live.data_ptr()
        assert torch.equal(live[:, :4], source[:, :4])
        assert torch.equal(live[-1, 4:], source[-1, 4:])
        assert bool((live[:-1, 4:] == 5.0).all())

    def test_live_tensors_that_share_memory_the_source_does_not_share(self) -> None:
        shared = torch.zeros(100)
        state = {"a": torch.ones(100), "b": torch.full((100,), 2.0)}
        received = self.round_trip(state, lambda: {"a": shared, "b": shared})
        assert received["a"] is shared

    # --------------------------------------------------------------------------------------------- refusals

    def test_source_refuses_what_is_unsafe_and_names_its_path(self) -> None:
        pair = self.open()
        try:
            state = {"user": {"default": {"sched": threading.Lock()}}}
            text = _expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, state, SHORT))
            assert "state['user']['default']['sched'] holds a <_thread.lock>" in text
            text = _expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, {(1, 2): 3}, SHORT))
            assert "(1, 2)" in text
            cycle: list[object] = []
            cycle.append(cycle)
            _expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, cycle, SHORT))
            sparse = {"s": torch.eye(3).to_sparse()}
            text = _expect(UnsafeStateError, lambda: pair.source.send_checkpoint([1], 1, sparse, SHORT))
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
            text = _expect(ManifestError, lambda: transfer(pair, {"x": _Foreign()}))
            assert "add_safe_globals" in text
        finally:
            pair.close()

    def test_wrong_step_is_refused_and_both_are_named(self) -> None:
        for asked in (2, 9):
            pair = self.open()
            try:
                text = _expect(StepNotServed, lambda p=pair, a=asked: transfer(p, {"x": 1}, 3, SHORT, ask=a))  # type: ignore[misc]
                assert f"step {asked}" in text
                assert "step 3" in text
            finally:
                pair.close()

    # ---------------------------------------------------------------------------------------------- failures

    def test_source_gone_before(self) -> None:
        pair = self.open()
        try:
            metadata = pair.source.metadata()
            pair.lose_source()
            _expect(CheckpointError, lambda: pair.receiver.recv_checkpoint(0, metadata, 3, timedelta(seconds=5)))
        finally:
            pair.close()

    def test_source_gone_during(self) -> None:
        pairs: list[Pair] = []

        def into() -> State:
            pairs[0].lose_source()  # the manifest is there, the data is not
            return {}

        pairs.append(self.open(into))
        try:
            state = {"w": torch.ones(64 << 18)}
            _expect(CheckpointError, lambda: transfer(pairs[0], state, timeout=timedelta(seconds=10)))
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
            text = _expect(IntegrityError, lambda: transfer(pairs[0], state))
            assert "replica rank 0" in text
        finally:
            pairs[0].close()

    def test_receiver_times_out_when_the_source_never_sends(self) -> None:
        pair = self.open()
        try:
            metadata = pair.source.metadata()
            _expect((TimeoutError, StepNotServed), lambda: pair.receiver.recv_checkpoint(0, metadata, 3, SHORT))
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
        pairs: list[Pair] = []

        def into() -> State:
            ending = threading.Thread(target=pairs[0].receiver.abort, args=("a member died",))
            ending.start()
            ending.join(30)
            return {}

        pairs.append(self.open(into))
        try:
            if type(pairs[0].receiver).abort is not CheckpointTransport.abort:
                state = {"w": torch.ones(64 << 18)}
                text = _expect(TransferAborted, lambda: transfer(pairs[0], state))
                assert "a member died" in text
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

    def test_shutdown_twice(self) -> None:
        pair = self.open()
        pair.close()
        pair.source.shutdown()
        pair.receiver.shutdown(wait=False)


class _Foreign:
    """A class that a receiver has no reason to load."""
