"""Texts, tasks and targets that several benchmarks take."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
CALIBRATION, VALIDATION, TEST = "text/c4-sample.txt", "text/wikitext2-validation.txt", "text/wikitext2-raw-test.txt"
TASKS = ("arc_easy", "hellaswag")
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")
TASK_TARGETS = ("0.5", "2:4")
DEFAULT_NAME = "smollm2-135m"
