"""Faults of a process: its death in several ways, and standing still in two.

``kill``, ``stop`` and ``continue_`` are done to any process, the calling one included. ``exit_``, ``raise_``,
``segfault`` and ``hold_gil`` a process does to itself.

Rules:

- A process is named by its id; ids below 2 and process groups are refused. Between stopping and continuing a process
  is held by a handle (pidfd), so that a reused id is never hit.
- ``stop`` leaves all threads of the process standing: nothing in it answers, its sockets stay open. ``hold_gil`` leaves
  all Python of the process standing, while C threads (gRPC's, NCCL's) go on.
- These are the real things: no handler is asked, nothing is cleaned up, unless a docstring says otherwise.
"""

from __future__ import annotations

import ctypes
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
from typing import NoReturn

from torchft.testing.faults.announcing import announce
from torchft.testing.faults.effect import Effect

__all__ = ["InjectedFault", "continue_", "exception_type", "exit_", "hold_gil", "kill", "raise_", "segfault", "stop"]


class InjectedFault(RuntimeError):
    """What :func:`raise_` raises unless told otherwise."""


def kill(pid: int | None = None) -> None:
    """SIGKILL: the process is gone at once, as when the kernel runs out of memory.

    Args:
        pid: of the victim; None: this process.

    Raises:
        ProcessLookupError: there is no such process.
        ValueError: ``pid`` is below 2.
    """
    announce("kill", _named(pid))
    os.kill(_checked(pid), signal.SIGKILL)
    if pid in (None, os.getpid()):
        signal.pause()  # the signal may be delivered to another thread first: nothing more happens in this one


def stop(pid: int | None = None, seconds: float | None = None) -> Effect:
    """SIGSTOP: the process stands still, keeps its memory and its connections, and answers nothing.

    Args:
        pid: of the victim; None: this process.
        seconds: after which it is continued; None: it stays stopped until somebody continues it.

    Returns:
        For another process: at once; releasing the effect continues the process. For this process: after it was
        continued, with an effect that is over. A helper process continues it, which ends with it.

    Raises:
        ProcessLookupError: there is no such process.
        ValueError: ``pid`` is below 2.
    """
    announce("stop", _named(pid), "" if seconds is None else f"{seconds:g} s")
    target = _checked(pid)
    if target == os.getpid():
        _stop_this(seconds)
        over = Effect("stop", lambda: None)
        over.release()
        return over
    handle = os.pidfd_open(target)

    def resume() -> None:
        try:
            signal.pidfd_send_signal(handle, signal.SIGCONT)
        except ProcessLookupError:
            pass  # it died meanwhile
        finally:
            os.close(handle)

    try:
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
    except BaseException:
        os.close(handle)
        raise
    return Effect(f"stop of process {target}", resume, seconds)


def continue_(pid: int) -> None:
    """SIGCONT: a stopped process goes on.

    Raises:
        ProcessLookupError: there is no such process.
        ValueError: ``pid`` is below 2.
    """
    announce("continue", _named(pid))
    os.kill(_checked(pid), signal.SIGCONT)


def raise_(kind: str | type[BaseException] = InjectedFault, message: str = "injected") -> NoReturn:
    """Raises in the calling thread.

    Args:
        kind: the type, or its name as of :func:`exception_type`.
        message: its only argument.

    Raises:
        BaseException: of type ``kind``.
        ValueError: there is no such type.
    """
    found = exception_type(kind) if isinstance(kind, str) else kind
    announce("raise", _named(None), f"{found.__name__}: {message}")
    raise found(message)


def exception_type(name: str) -> type[BaseException]:
    """``InjectedFault``, a built-in such as ``ValueError``, or one by its place: ``torch.OutOfMemoryError``.

    Raises:
        ValueError: there is none of that name.
    """
    place = "torchft.testing.faults.process" if name == InjectedFault.__name__ else "builtins"
    try:
        found = pkgutil.resolve_name(name if "." in name else f"{place}:{name}")
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        raise ValueError(f"{name!r} is not an exception: write a built-in's name, InjectedFault, or package.Name")
    return found


def exit_(code: int = 1) -> NoReturn:
    """Ends this process at once with an exit code, as a library does that gives up: no ``finally``, no ``atexit``.

    :func:`raise_` with ``SystemExit`` is the orderly way.

    Args:
        code: 0 to 255.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= code <= 255:
        raise ValueError(f"an exit code is between 0 and 255, not {code}")
    announce("exit", _named(None), f"code {code}")
    os._exit(code)


def segfault() -> NoReturn:
    """Reads address 0 in C: this process dies of a real SIGSEGV.

    ``faulthandler`` still prints its traceback first. A Python handler of SIGSEGV is taken away, since it would return
    to the same instruction for ever. No core is written.
    """
    announce("segfault", _named(None))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if callable(signal.getsignal(signal.SIGSEGV)):
        libc = ctypes.CDLL(None)  # signal.signal() works in the main thread only
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGSEGV), None)  # SIG_DFL
    while True:
        ctypes.string_at(0)


def hold_gil(seconds: float) -> None:
    """One C call that keeps the GIL: no other Python thread of this process runs meanwhile.

    Signals do not cut it short; what they call in Python runs afterwards.

    Args:
        seconds: how long.

    Raises:
        RuntimeError: this Python runs without a GIL.
        ValueError: ``seconds`` is negative.
    """
    if seconds < 0:
        raise ValueError(f"the GIL cannot be held for {seconds:g} s")
    enabled = getattr(sys, "_is_gil_enabled", None)
    if enabled is not None and not enabled():
        raise RuntimeError("this Python runs without a GIL: there is nothing to hold")
    announce("hold_gil", _named(None), f"{seconds:g} s")
    nanosleep = ctypes.PyDLL(None).nanosleep  # PyDLL, other than CDLL, does not let the GIL go around the call
    nanosleep.argtypes = [ctypes.POINTER(_Timespec), ctypes.c_void_p]
    end = time.monotonic() + seconds
    # A signal in this thread would end the call early and let other threads in.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        while (left := end - time.monotonic()) > 0:
            whole = int(left)
            nanosleep(ctypes.byref(_Timespec(whole, int((left - whole) * 1e9))), None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _checked(pid: int | None) -> int:
    if pid is None:
        return os.getpid()
    if pid < 2:
        raise ValueError(f"{pid} is not the id of a process that may be hit")
    return pid


def _named(pid: int | None) -> str:
    return f"process {pid or os.getpid()}{' (this one)' if pid in (None, os.getpid()) else ''}"


_HELPER = """
import select, signal, sys
handle, seconds = int(sys.argv[1]), float(sys.argv[2])
signal.pidfd_send_signal(handle, signal.SIGSTOP)
gone = select.select([handle], [], [], seconds)[0]
if not gone:
    signal.pidfd_send_signal(handle, signal.SIGCONT)
"""
"""Stops its parent and continues it, unless the parent dies first: a handle is readable when its process has ended."""


def _stop_this(seconds: float | None) -> None:
    if seconds is None:
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    handle = os.pidfd_open(os.getpid())
    try:
        # In a session of its own: what is sent to our process group must not stop the one that continues us.
        helper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HELPER, str(handle), str(seconds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # whoever reads ours need not wait for its end
            pass_fds=[handle],
            start_new_session=True,
        )
    finally:
        os.close(handle)
    code = helper.wait()  # bounded: it stops us, and ends right after it has continued us
    if code != 0:
        raise RuntimeError(f"the helper that stops and continues this process failed with exit code {code}")
