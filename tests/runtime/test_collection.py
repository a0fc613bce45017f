from __future__ import annotations

import gc
import os
import threading

import pytest

from torchft.runtime.collection import collection_put_off


def test_nothing_is_collected_inside_and_all_is_as_before_outside() -> None:
    assert gc.isenabled()
    with collection_put_off():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_who_collects_by_hand_goes_on_doing_so() -> None:
    gc.disable()
    try:
        with collection_put_off():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_exception_ends_it() -> None:
    with pytest.raises(RuntimeError, match="in it"), collection_put_off():
        raise RuntimeError("in it")
    assert gc.isenabled()


def test_the_last_thread_that_leaves_ends_it() -> None:
    inside, leave = threading.Event(), threading.Event()

    @collection_put_off()
    def stay() -> None:
        inside.set()
        assert leave.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(30)
    with collection_put_off():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_child_that_is_forked_inside_collects() -> None:
    with collection_put_off():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(pid, 0)[1] == 0
