"""Child processes that begin with everything imported.

The idea
    A Python process that imports torch takes seconds to start. So one process does that once, the *nursery*, and
    then does nothing but fork: each child begins in milliseconds, with the imports of the nursery. The nursery is
    started as a program of its own and not forked, has one thread, and calls into no device; so its children start
    clean, whatever threads, locks, sockets and GPU contexts our process has.

Rules
    1. Nobody outlives us. The nursery ends when its socket to us ends, and its children end with it
       (``PR_SET_PDEATHSIG``), whatever they do. Children that we fork (data-loader workers) do not hold the socket.
    2. A child is killed by its *pidfd* and reaped by the nursery when we ask it to: a signal never hits a process that
       merely has the same number.
    3. A nursery that was killed or stands still is replaced by the next :meth:`Nursery.spawn`.
    4. Children ignore the terminal's and the supervisor's signals to end (SIGINT, SIGTERM, SIGHUP): they are asked by
       us, so that we can finish a step first.

Linux only.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import spawn
from typing import Any

from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import close_in_children_fd
from torchft.runtime.messages import Channel, Message
from torchft.runtime.ready import readable

__all__ = ["Nursery", "NurseryError", "NurseryProcess", "serve"]

logger = logging.getLogger(__name__)

_SLICE = 0.05  # seconds between looks at whether the waiter still wants a child
_REPLY_TIMEOUT = 10.0
_END_TIMEOUT = 2.0
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class NurseryError(RuntimeError):
    """There is no child to be had. The message says why."""


class NurseryProcess:
    """A child.

    Args:
        nursery: that it came from.
        pid: its number.
    """

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self._handle = os.pidfd_open(pid)
        self._lock = threading.Lock()
        self._status: int | None = None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal. One that has ended does not get it."""
        with self._lock:
            if self._handle >= 0:
                try:
                    signal.pidfd_send_signal(self._handle, number)
                except ProcessLookupError:
                    pass

    def wait(self, timeout: float) -> int | None:
        """Its exit code (negative: the signal that ended it), or None if it still runs after ``timeout`` seconds.

        A child whose nursery is gone has the code ``-SIGKILL``: it ended with it.
        """
        with self._lock:
            handle = self._handle
        if handle < 0:
            return self._status
        if not readable(handle, timeout):
            return None
        with self._lock:
            if self._handle >= 0:
                self._status = self._nursery.bury(self.pid)
                os.close(self._handle)
                self._handle = -1
            return self._status

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)


class Nursery:
    """A process that forks children. Started by the first :meth:`spawn`, or earlier by :meth:`start`.

    Args:
        preload: modules that all children begin with.
        name: for messages.
        by_fork: it is a fork of the calling process, which must have one thread and no device in use. For a process
            that is itself fresh from a nursery.
    """

    def __init__(self, preload: Sequence[str], name: str, by_fork: bool = False) -> None:
        self._preload = list(preload)
        self._name = name
        self._by_fork = by_fork
        self._lock = threading.RLock()  # held while one request is answered
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | _Forked | None = None
        self._ready = False
        self._owner = os.getpid()
        atexit.register(self.close)

    def start(self) -> None:
        """Starts it, if it does not run. Does not wait until it is ready.

        Raises:
            NurseryError: this system has no such thing.
        """
        if not hasattr(os, "pidfd_open") or not sys.platform.startswith("linux"):
            raise NurseryError(f"the {self._name} needs Linux (pidfd_open, PR_SET_PDEATHSIG)")
        with self._lock:
            if self._process is not None and self._process.poll() is None and os.getpid() == self._owner:
                return
            self._forget()
            self._owner = os.getpid()
            ours, theirs = socket.socketpair()
            close_in_children_fd(ours)
            with theirs:
                try:
                    if self._by_fork:
                        self._process = _Forked(lambda: _serve_forked(theirs.fileno(), self._preload))
                    else:
                        self._process = _start_program(theirs.fileno(), self._preload)
                except OSError as e:
                    ours.close()
                    raise NurseryError(f"the {self._name} cannot be started: {e}") from e
            self._channel = Channel(ours, _REPLY_TIMEOUT)
            self._ready = False

    def spawn(
        self,
        target: str,
        arguments: Message,
        files: Sequence[int],
        deadline: Deadline,
        wanted: Callable[[], bool] = lambda: True,
    ) -> NurseryProcess:
        """A new child, which calls ``target(arguments, files)`` and exits with what that returns, or 0.

        It has the caller's environment.

        Args:
            target: ``module:function``.
            arguments: plain data.
            files: descriptors, which the child gets copies of.
            deadline: until when it must have begun.
            wanted: asked now and then while it waits for the nursery to be ready.

        Raises:
            NurseryError: it did not begin in time, is not wanted any more, or the nursery ended.
        """
        with self._lock:
            self.start()
            self._await_ready(deadline, wanted)
            request = {"spawn": target, "arguments": arguments, "environment": dict(os.environ)}
            reply = self._ask(request, tuple(files))
            if "error" in reply:
                raise NurseryError(f"the {self._name} cannot fork: {reply['error']}")
            return NurseryProcess(self, int(reply["pid"]))

    def bury(self, pid: int) -> int:
        """Reaps a child that has ended: its exit code."""
        with self._lock:
            if self._channel is None or not self._ready or os.getpid() != self._owner:
                return -signal.SIGKILL
            try:
                return int(self._ask({"bury": pid}, ())["status"])
            except NurseryError:
                return -signal.SIGKILL

    def close(self) -> None:
        """Ends it and all of its children. A later :meth:`spawn` starts it again."""
        with self._lock:
            self._forget()

    # The rest is called with the lock.

    def _await_ready(self, deadline: Deadline, wanted: Callable[[], bool]) -> None:
        while not self._ready:
            assert self._channel is not None
            if readable(self._channel.socket, min(_SLICE, deadline.remaining())):
                self._reply()
                self._ready = True
            elif not wanted():
                raise NurseryError(f"the {self._name} is not waited for any more")
            elif deadline.expired:
                raise NurseryError(f"the {self._name} did not become ready within {deadline.timeout:g} s")

    def _ask(self, request: Message, files: tuple[int, ...]) -> Message:
        assert self._channel is not None
        try:
            self._channel.send(request, files)
        except OSError as e:
            raise self._failed(str(e)) from e
        if not readable(self._channel.socket, _REPLY_TIMEOUT):
            raise self._failed(f"it did not answer within {_REPLY_TIMEOUT:g} s")
        return self._reply()

    def _reply(self) -> Message:
        assert self._channel is not None
        received = self._channel.receive()
        if received is None:
            raise self._failed("it ended")
        return received[0]

    def _failed(self, why: str) -> NurseryError:
        code = self._process.poll() if self._process is not None else None
        self._forget()
        return NurseryError(f"the {self._name} failed: {why}{'' if code is None else f' (exit code {code})'}")

    def _forget(self) -> None:
        channel, process, self._channel, self._process = self._channel, self._process, None, None
        self._ready = False
        if os.getpid() != self._owner:  # a forked child, which has no part in it
            return
        if channel is not None:
            channel.close()
        if process is not None:
            try:
                process.wait(_END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start_program(descriptor: int, preload: list[str]) -> subprocess.Popen[bytes]:
    # As multiprocessing does: the same interpreter finds the same modules. Its output is our errors' output: what we
    # print may be read by a program.
    code = (
        "import sys, json; path, fd, preload = json.loads(sys.argv[1]); sys.path[:] = path; "
        "from torchft.runtime.nursery import serve; serve(fd, preload)"
    )
    try:
        os.fstat(2)
        errors = 2
    except OSError:
        errors = subprocess.DEVNULL
    executable = os.fsdecode(spawn.get_executable() or sys.executable)
    # One thread: only then is forking safe.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [executable, "-c", code, json.dumps([sys.path, descriptor, preload])],
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=[descriptor],
        env={**os.environ, **threads},
    )


class _Forked:
    """As much of ``Popen`` as is needed here."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                run()
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = Deadline(timeout if timeout is not None else 1e9)
        handle = os.pidfd_open(self.pid) if self._code is None else -1
        try:
            if handle >= 0 and not readable(handle, deadline.remaining()):
                raise subprocess.TimeoutExpired("nursery", deadline.timeout)
        finally:
            if handle >= 0:
                os.close(handle)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ in the nursery


def serve(descriptor: int, preload: Sequence[str]) -> None:
    """The nursery's life: it returns in no process; children end inside of it."""
    for number in _ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor), _REPLY_TIMEOUT)
    for module in preload:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is there now is never looked at again, so that its pages stay shared with the children
    try:
        channel.send({"ready": True})
        while (received := channel.receive()) is not None:
            message, files = received
            if "bury" in message:
                channel.send({"status": _reap(int(message["bury"]))})
            else:
                _fork(channel, message, files)
    except OSError:
        pass  # our owner is gone
    os._exit(0)


def _serve_forked(descriptor: int, preload: list[str]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != descriptor:
            try:
                os.close(int(name))
            except OSError:
                pass  # the listing's own
    serve(descriptor, preload)


def _reap(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return -signal.SIGKILL


def _fork(channel: Channel, message: Message, files: list[int]) -> None:
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as e:
        channel.send({"error": str(e)})
        pid = -1
    if pid == 0:
        code = 1
        try:
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:  # or else it died before it was asked for
                channel.close()
                code = _run(message, files)
        except BaseException:
            logger.exception("a child of the nursery failed")
        finally:
            os._exit(code)
    for number in files:
        os.close(number)
    if pid > 0:
        channel.send({"pid": pid})


def _run(message: Message, files: list[int]) -> int:
    os.environ.clear()
    os.environ.update(message["environment"])
    module, _, name = str(message["spawn"]).partition(":")
    target: Callable[[Message, list[int]], Any] = getattr(importlib.import_module(module), name)
    try:
        return int(target(message["arguments"], files) or 0)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
