"""Bytes between host and device, and launches, do not grow: runs on the pretend GPU (`tests/device_budgets.py`).

A budget is what a run takes today. Whoever lowers it lowers the number here.
"""

import json
import subprocess
import sys
from typing import Any

import pytest
from torch.utils import backend_registration

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch has no devices written in Python", allow_module_level=True)

Counts = dict[str, dict[str, int]]


def counts(*settings: dict[str, Any]) -> list[Counts]:
    command = [sys.executable, "-m", "tests.device_budgets", *map(json.dumps, settings)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert not process.returncode, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]
