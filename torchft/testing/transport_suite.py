"""What every checkpoint transport must do, as tests: derive from :class:`TransportSuite` and say how to open a pair.

    class TestMyTransport(TransportSuite):
        def open(self, into=None, allow_pickle=False):
            ...
            return Pair(source, receiver, lose_source=..., corrupt=..., close=...)

pytest finds the inherited ``test_`` methods; each opens its own pair, and every wait in them is bounded.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from datetime import timedelta

import torch
from torch.distributed.tensor import DTensor, Shard

from torchft.checkpointing.mesh import MeshSpec
from torchft.checkpointing.tree import DTYPES
from torchft.testing.transport_failures import TransportFailures
from torchft.testing.transport_pair import Pair, assert_same, transfer

__all__ = ["Pair", "TransportSuite", "assert_same", "transfer"]


class TransportSuite(TransportFailures):
    """All tests: what arrives, what is received in place, what is refused, and how it fails."""

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
            received = transfer(pair, {"big": big}, timeout=timedelta(seconds=240))
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
