"""Tasks in processes of their own: outcomes, errors with their hints, and processes that end."""

import os
import pickle
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import pytest

from llm_barber.errors import BarberError, ModelError, SettingsError
from llm_barber.messages import Message, message
from llm_barber.tools.side_by_side import side_by_side, worker_processes


def double(number: int) -> int:
    return 2 * number


def refuse(number: int) -> int:
    raise ModelError(f"number {number} is wrong", "give another")


def leave(_: int) -> int:
    os._exit(3)


def start_and_sleep(path: Path) -> None:
    path.touch()
    time.sleep(600)


@pytest.mark.timeout(300)
def test_outcomes_and_errors_come_back() -> None:
    asked = []

    def tasks() -> Iterator[int]:
        for number in range(5):
            asked.append(number)
            yield number

    with worker_processes(2, __name__) as pool:
        outcomes = side_by_side(pool, 2, double, tasks())
        first = next(outcomes)
        assert len(asked) == 2  # the third waits for a free process
        assert sorted([first, *outcomes]) == [0, 2, 4, 6, 8]
        with pytest.raises(ModelError, match="number 7 is wrong") as caught:
            list(side_by_side(pool, 2, refuse, [7]))
        assert caught.value.hint == "give another"
        with pytest.raises(BarberError, match="was ended from outside"):
            list(side_by_side(pool, 2, leave, [1]))


@pytest.mark.timeout(300)
def test_an_error_ends_the_processes(tmp_path: Path) -> None:
    before = set(active_children())
    with pytest.raises(KeyboardInterrupt), worker_processes(1, __name__) as pool:
        pool.submit(start_and_sleep, tmp_path / "started")
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert set(active_children()) <= before


def test_errors_keep_their_hints_on_the_way() -> None:
    told = message("{swaps} is wrong")
    error = pickle.loads(pickle.dumps(SettingsError(told, "give another")))
    assert (type(error), str(error), error.hint) == (SettingsError, "swaps is wrong", "give another")
    assert isinstance(error.message, Message)
    assert error.message.as_options == "--swaps is wrong"
