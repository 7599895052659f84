"""Rates of a named machine, and how amounts and times are printed."""

import pytest
import torch

from llm_barber.planning.rates import SHA256, disk_rates, named_rates
from llm_barber.planning.table import amount, duration
from llm_barber.planning.work import Work
from tests.helpers.plans import RATES


def test_rates_by_hand() -> None:
    assert (RATES.exact, RATES.grams) == (5e13, 2e14)
    assert named_rates(4e14, None, 2e12, 1e10, 5e9, 2e9, torch.float32).grams == 5e13
    assert RATES.seconds(Work(products=4e14, read=4e9, copied=1e10, reduced=1.5e10)) == {
        "compute": 1, "memory": 0, "link": 1, "network": 3, "disk": 2, "launches": 0,
    }  # fmt: skip
    assert (amount(16.1e9), amount(12)) == ("16.1 G", "12 ")
    assert (duration(8.31), duration(720), duration(12240)) == ("8.3 s", "12 min", "3.4 h")


def test_what_is_written_is_hashed() -> None:
    slow, fast = disk_rates(1e9), disk_rates(2e10)
    assert (slow["read"], slow["written"]) == (1e9, 1e9)  # hashed while the disk writes
    assert fast["written"] == SHA256
    assert fast["kept"] == pytest.approx(1e10)  # hashed before the disk writes
