"""The order in which collectives are issued, where one of them consists of several.

The idea
    All members of a process group must issue its collectives in one order. A collective of several steps issues its
    next step when the one before has ended, which is at another moment on each member; what a member issued in
    between would come in another order on another one. So a lane lets in one collective at a time.

Rules
    1. A collective has the lane to itself from its first step until its last one is *issued*; what is asked for
       meanwhile is issued after that, in the order of asking. Whoever asks never waits.
    2. Everything that is issued on a process group while a collective of several steps is under way must go through
       one lane.
    3. A closed lane issues nothing: what would come too late for its step must not come among the next one's.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

from torchft.futures import fail, hand_on
from torchft.process_group.base import ProcessGroup, ProcessGroupError

__all__ = ["Lane", "after_this", "future_on", "lane_of"]


class Lane:
    """See the module. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # held while a collective is issued, not while one is waited for
        self._waiting: deque[Callable[[], None]] = deque()
        self._taken = False
        self._advancing = False
        self._closed = False

    def enter(self, begin: Callable[[], None]) -> None:
        """Calls ``begin`` when its turn comes: now, or on the thread on which the last one before it leaves.

        Args:
            begin: must see to it that :meth:`leave` is called once, and must not raise.
        """
        with self._lock:
            self._waiting.append(begin)
        self._advance()

    def leave(self) -> None:
        """Lets the next one in."""
        with self._lock:
            self._taken = False
        self._advance()

    def issue(self, call: Callable[[], Work]) -> Work:
        """The work that ``call`` makes; for whoever has the lane.

        Raises:
            ProcessGroupError: the lane is closed.
            Exception: what ``call`` raises.
        """
        with self._lock:
            if self._closed:
                raise ProcessGroupError("a collective was not issued: the step that it belongs to has ended")
            return call()

    def run(self, call: Callable[[], Work], device: torch.device) -> Future[Any]:
        """A collective of one step: its future.

        Args:
            call: issues it, now or later.
            device: of its tensors.

        Raises:
            Exception: what ``call`` raises, where it is called now. Later it is the future's.
        """
        with self._lock:
            if not self._taken and not self._waiting:
                return self.issue(call).get_future()
        out = future_on(device)
        in_order = after_this(device)

        def begin() -> None:
            try:
                in_order()
                future = self.issue(call).get_future()
            except Exception as e:
                fail(out, e)
                return
            finally:
                self.leave()
            future.add_done_callback(lambda done: hand_on(done, out))

        self.enter(begin)
        return out

    def close(self) -> None:
        """Nothing is issued any more once this returns: what waits fails when its turn comes."""
        with self._lock:
            self._closed = True

    def _advance(self) -> None:
        # One thread goes through all whose turn has come: those that fail at once leave inside `begin`, and must
        # not be followed deeper and deeper.
        with self._lock:
            if self._advancing:
                return
            self._advancing = True
        while True:
            with self._lock:
                if self._taken or not self._waiting:
                    self._advancing = False
                    return
                self._taken = True
                begin = self._waiting.popleft()
            begin()


_lanes: weakref.WeakKeyDictionary[Any, Lane] = weakref.WeakKeyDictionary()
_lanes_lock = threading.Lock()


def lane_of(process_group: ProcessGroup) -> Lane:
    """The lane of all who do not bring their own. Before ``configure`` its works must have ended."""
    with _lanes_lock:
        return _lanes.setdefault(process_group, Lane())


def future_on(device: torch.device) -> Future[Any]:
    """One that knows the device, so that who waits for it waits for the device's stream."""
    return Future() if device.type == "cpu" else Future(devices=[device])


def after_this(device: torch.device) -> Callable[[], None]:
    """What makes the stream of another thread, later, wait for what this thread's stream has to do until now."""
    if device.type == "cpu":
        return lambda: None
    event = torch.accelerator.current_stream(device).record_event()
    return lambda: torch.accelerator.current_stream(device).wait_event(event)
