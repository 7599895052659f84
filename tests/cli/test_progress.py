"""Progress of a run on the console: ETA, warnings, the bar after a resume."""

import logging
import time

import pytest

from llm_barber.cli.progress import ConsoleProgress


class Clock:
    """A clock in place of `time.monotonic`, which the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.seconds)


@pytest.mark.parametrize(("finished", "eta"), [(0, 70), (4, 30)])
def test_the_eta_ignores_steps_of_an_earlier_run(
    finished: int, eta: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    clock = Clock(monkeypatch)
    progress = ConsoleProgress()
    progress.start("pruning", 8, finished)
    clock.seconds += 10
    progress.advance("50.0% pruned")
    assert capsys.readouterr().err == f"pruning {finished + 1}/8, ETA {eta} s: 50.0% pruned\n"


def test_the_bar_begins_after_finished_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "120", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    clock = Clock(monkeypatch)
    progress = ConsoleProgress()
    assert progress.live
    progress._bars.get_time = time.monotonic
    progress._bars.start()
    progress.start("pruning", 8, finished=4)
    for _ in range(3):  # rich needs several steps for a rate
        clock.seconds += 10
        progress.advance("")
    progress._bars.refresh()
    (task,) = progress._bars.tasks
    progress._bars.stop()
    assert (task.completed, task.time_remaining) == (7, 10)


@pytest.mark.parametrize("verbose", [False, True])
def test_a_warning_in_the_log_is_shown_as_a_warning(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress(verbose=verbose):
        logging.getLogger("llm_barber.checkpoint").warning("%s stays", "a folder")
        logging.getLogger("llm_barber.checkpoint").info("a detail")
    shown = capsys.readouterr().err
    assert "warning: a folder stays" in shown
    assert ("a detail" in shown) is verbose
