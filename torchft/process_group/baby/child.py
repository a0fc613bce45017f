"""The child: it hosts a process group and does what its trainer's messages say.

The idea
    One message after the other, on the main thread, in the order in which they come: that is the order of the
    collectives. Each answer is sent by whatever thread finds that its collective has ended.

Rules
    1. It never decides anything. It is killed when the trainer aborts, and ends when the trainer is gone.
    2. On a GPU it answers when the device has done the collective, not when it has been given it: the trainer's
       streams never wait for something that a killed child would have had to do.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

from torchft.process_group.baby.calls import arguments_of
from torchft.process_group.baby.gpu import open_gpu_block
from torchft.process_group.baby.memory import map_host_block
from torchft.process_group.base import ProcessGroup
from torchft.runtime.messages import Channel, Message
from torchft.runtime.worker import Worker

__all__ = ["main"]

logger = logging.getLogger(__name__)


def main(arguments: Message, files: list[int]) -> None:
    """The child's life.

    Args:
        arguments: ``host``, the group's ``module:Class``; ``device``; ``timeout``, seconds.
        files: the socket to the trainer.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    channel = Channel(socket.socket(fileno=files[0]))
    device = torch.device(arguments["device"])
    _Host(channel, arguments["host"], device, timedelta(seconds=arguments["timeout"])).run()
    os._exit(0)  # whatever still runs


class _Host:
    def __init__(self, channel: Channel, host: str, device: torch.device, timeout: timedelta) -> None:
        self._channel = channel
        self._host = host
        self._device = device
        self._timeout = timeout
        self._group: ProcessGroup | None = None
        self._blocks: dict[int, torch.Tensor] = {}
        self._ready: dict[int, Any] = {}  # events, of blocks on a GPU
        self._waiter = Worker("torchft-baby-wait")  # one will do: what was issued first ends first

    def run(self) -> None:
        while (received := self._channel.receive()) is not None:
            message, files = received
            try:
                self._do(message, files)
            except Exception as e:
                if "id" not in message:
                    raise
                self._answer(message["id"], e)

    def _do(self, message: Message, files: list[int]) -> None:
        if "timeout" in message:
            self._timeout = timedelta(seconds=message["timeout"])
            if self._group is not None:
                self._group.set_timeout(self._timeout)
        elif "configure" in message:
            self._made().configure(**message["configure"])
            self._answer(message["id"], None)
        elif "adopt" in message:
            self._blocks[message["adopt"]] = map_host_block(files[0], message["size"])
        else:
            self._forget(message.get("gone", ()))
            if "call" in message:
                self._call(message, files)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            del self._blocks[number]
            self._ready.pop(number, None)

    def _open(self, number: int, told: dict[str, Any], files: list[int]) -> None:
        if "host" in told:
            self._blocks[number] = map_host_block(files[0], told["host"])
        else:
            self._blocks[number], self._ready[number] = open_gpu_block(told)

    def _made(self) -> ProcessGroup:
        if self._group is None:
            module, _, name = self._host.partition(":")
            if self._device.type != "cpu":
                torch.accelerator.set_device_index(self._device.index or 0)
            self._group = getattr(importlib.import_module(module), name)(timeout=self._timeout)
        return self._group

    def _call(self, message: Message, files: list[int]) -> None:
        if "new" in message:
            self._open(message["block"], message["new"], files)
        ready = self._ready.get(message.get("block", 0))
        if ready is not None:  # the trainer's copy into the block
            torch.accelerator.current_stream(self._device).wait_event(ready)
        written: list[tuple[torch.Tensor, torch.Tensor]] = []

        def use(view: torch.Tensor, is_written: bool) -> torch.Tensor:
            if view.device.type == self._device.type:
                return view
            there = view.to(self._device)  # a device whose memory cannot be shared
            if is_written:
                written.append((view, there))
            return there

        arguments = arguments_of(message["args"], lambda n: self._blocks[message["block"] if n is None else n], use)
        work: Work = getattr(self._made(), message["call"])(*arguments)
        if self._device.type != "cpu":
            work.wait()  # makes this thread's stream wait, not this thread
            event = torch.accelerator.current_stream(self._device).record_event()
            self._waiter.submit(partial(self._ended, message["id"], written, event.synchronize))
            return
        try:
            future: Future[Any] = work.get_future()
        except RuntimeError:  # some of gloo's collectives have none
            self._waiter.submit(partial(self._ended, message["id"], written, work.wait))
            return
        future.add_done_callback(lambda done: self._ended(message["id"], written, done.value))

    def _ended(
        self, number: int, written: list[tuple[torch.Tensor, torch.Tensor]], outcome: Callable[[], object]
    ) -> None:
        error: Exception | None = None
        try:
            outcome()
            for view, there in written:
                view.copy_(there)
        except Exception as e:
            error = e
        self._answer(number, error)

    def _answer(self, number: int, error: Exception | None) -> None:
        text = None if error is None else str(error) or type(error).__name__
        try:
            self._channel.send({"id": number, "error": text})
        except OSError:
            os._exit(0)  # the trainer is gone
