"""Blocks in a GPU's memory, which the child opens through CUDA's IPC.

Order
    copy in, on the trainer's current stream → event *ready* → the child's stream waits for it → the collective; the
    child's host waits for that, and answers → copy out, on a stream of the block's own → event, which whoever waits for
    the work lets his stream wait for.

Rules
    1. Streams of the child wait for events of the trainer, never the other way: a killed child would leave the
       trainer's stream waiting forever. What the trainer waits for is the child's answer.
    2. A block's memory goes back to the allocator when the child has let it go or is dead, never while it may write.
    3. torch counts the openings of what it shares, and the opener gives its count back. A dead child cannot: then
       the trainer does it in its place, or the memory would never be freed.

Sources: ``torch.multiprocessing.reductions`` for how torch shares a storage; CUDA C programming guide, "Interprocess
communication".
"""

from __future__ import annotations

from typing import Any

import torch

from torchft.process_group.baby.calls import Plan

__all__ = ["GpuBlock", "open_gpu_block"]


class GpuBlock:
    """A block on a CUDA device."""

    def __init__(self, device: torch.device, number: int, size: int) -> None:
        self.number = number
        self._device = device
        cuda: Any = torch.cuda
        with cuda.device(device):
            self.data = torch.empty(size, dtype=torch.uint8, device=device)
            self._side = cuda.Stream(device)
            self._ready = cuda.Event(interprocess=True)
            self._ready.record()
        self._free: Any = None  # after the last copy out of it
        self._counter: tuple[bytes, int] | None = None  # of the child's opening

    def introduce(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        storage: Any = self.data.untyped_storage()
        handle = storage._share_cuda_()
        self._counter = (handle[4], handle[5])
        return {"cuda": _plain(handle), "ready": self._ready.ipc_handle().hex()}, ()

    def introduced(self) -> None:
        """The counter is the child's from now on."""

    def load(self, plan: Plan) -> None:
        stream: Any = torch.cuda.current_stream(self._device)
        if self._free is not None:
            stream.wait_event(self._free)
        plan.copy_in(self.data)
        self._ready.record(stream)

    def unload(self, plan: Plan) -> Any:
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            plan.copy_out(self.data)
            for tensor in plan.written():
                tensor.record_stream(self._side)
            self._free = self._side.record_event()
        return self._free

    def close(self, dead: bool) -> None:
        counter, self._counter = self._counter, None
        if counter is not None and dead:
            release: Any = torch.UntypedStorage
            release._release_ipc_counter_cuda(*counter)
        self.data = torch.empty(0, dtype=torch.uint8)


def open_gpu_block(told: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """The child's side: the bytes, and the event after which they may be read."""
    handle = _handle(told["cuda"])
    shared: Any = torch.UntypedStorage
    storage = shared._new_shared_cuda(*handle)
    device = torch.device("cuda", handle[0])
    data = torch.empty(0, dtype=torch.uint8, device=device)
    data.set_(storage)
    cuda_event: Any = torch.cuda.Event
    return data, cuda_event.from_ipc_handle(device, bytes.fromhex(told["ready"]))


def _plain(handle: tuple[Any, ...]) -> list[Any]:
    """torch's handle of a storage as plain data."""
    return [{"x": part.hex()} if isinstance(part, bytes) else part for part in handle]


def _handle(plain: list[Any]) -> tuple[Any, ...]:
    return tuple(bytes.fromhex(part["x"]) if isinstance(part, dict) else part for part in plain)
