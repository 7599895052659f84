"""Writes in threads: one after the other, and none after one that failed."""

import threading

import pytest

from llm_barber.checkpoint.behind import WriteBehind


def test_writes_follow_each_other_in_the_order_in_which_they_began() -> None:
    behind, goes_on, log = WriteBehind(), threading.Event(), []

    def first() -> None:
        assert goes_on.wait(60)
        log.append("first")

    behind.start(first)
    for name in ("second", "third"):
        behind.start(lambda name=name: log.append(name))
    assert behind.busy
    behind.check()  # waits for nothing
    assert not log
    goes_on.set()
    behind.wait()
    assert log == ["first", "second", "third"]
    assert not behind.busy


def test_after_a_failure_nothing_is_written_and_everyone_is_told() -> None:
    behind, goes_on, log = WriteBehind(), threading.Event(), []

    def fail() -> None:
        assert goes_on.wait(60)
        raise OSError(28, "No space left on device")

    behind.start(fail)
    behind.start(lambda: log.append("written"))
    goes_on.set()
    for told in (behind.wait, behind.check, behind.wait):
        with pytest.raises(OSError, match="No space left"):
            told()
    behind.start(lambda: log.append("written"))
    with pytest.raises(OSError, match="No space left"):
        behind.wait()
    assert not log


def test_something_is_done_once_all_is_written() -> None:
    behind, goes_on, done = WriteBehind(), threading.Event(), threading.Event()
    behind.when_done(done.set)
    assert done.is_set()
    done.clear()
    behind.start(lambda: goes_on.wait(60) and None)
    behind.when_done(done.set)
    assert not done.is_set()
    goes_on.set()
    assert done.wait(60)
