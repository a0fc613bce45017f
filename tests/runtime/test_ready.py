"""Descriptors of any number are waited for."""

from __future__ import annotations

import fcntl
import math
import os
import resource
import socket

import pytest

from torchft.runtime.ready import readable


def test_a_descriptor_beyond_what_select_takes_is_waited_for() -> None:
    here, there = socket.socketpair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"no process may open more than {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    high = -1
    with here, there:
        try:
            high = fcntl.fcntl(here.fileno(), fcntl.F_DUPFD_CLOEXEC, 1500)
            assert high >= 1500
            assert not readable(high, 0)
            assert not readable(here, 0.001)
            there.send(b"x")
            assert readable(high, 60.0)
            assert readable(here, None)
            there.close()
            assert readable(high, math.inf)
        finally:
            os.close(high)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
