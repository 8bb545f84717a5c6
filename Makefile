# Every verb makes .venv itself. Arguments for a program: make demo ARGS="--data DIR", make test ARGS="-k philox".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
QUICK := tests/noise tests/convert
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h) kernels/cpu/build.py
INPUTS := pyproject.toml setup.py constraints.txt $(NATIVE)

# Runs of make test-repeat.
TIMES ?= 20

.PHONY: help demo test test-quick test-repeat check bench docs build wheel clean

help:
	@echo "make demo   train, attack and report on real images (a few minutes)"
	@echo "make test   all tests (about ten minutes on two free cores)"
	@echo "make test-quick   the noise and the conversion, without the slow ones"
	@echo "make test-repeat  all tests TIMES=20 times, with new inputs and in random order"
	@echo "make check  faults and format (ruff), types of the public API (mypy)"
	@echo "make bench  benchmarks beside the peers, which it installs"
	@echo "make docs   the documentation as a site, in site/; a warning is an error"
	@echo "make build  sdist and wheel into dist/"
	@echo "make wheel  a manylinux wheel into dist/, tried in a new environment (Linux)"
	@echo "make clean  remove .venv and everything built"

# Passive waiting: on a machine whose cores others use too, threads that spin at barriers make small networks ten times slower.
bench demo test test-quick test-repeat: export OMP_WAIT_POLICY ?= passive

demo: $(VENV)/installed-demo
	$(BIN)/rse-fast demo $(ARGS)

# One process a core; what a file's tests share is made once, so a file stays in one process.
test: $(VENV)/installed-test
	@echo "all tests: about ten minutes on two free cores; make test-quick is a part of them"
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-quick: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not bench" $(QUICK) $(ARGS)

test-repeat: $(VENV)/installed-test
	@failed=0; for run in $$(seq $(TIMES)); do \
	  order=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); echo "run $$run of $(TIMES): --random-order $$order"; \
	  $(BIN)/python -m pytest -q -n auto --dist loadfile --random-order $$order $(ARGS) || failed=$$((failed + 1)); \
	done; echo "$$failed of $(TIMES) runs failed"; test $$failed = 0

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/installed-bench $(VENV)/installed-peers
	$(PIP) install -q --no-deps -c constraints.txt baal
	$(BIN)/rse-fast bench $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

# The sdist first, then the wheel from the sdist: so the sdist is known to be complete.
build: $(VENV)/installed-test
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m build --outdir dist .

# libgomp stays outside: torch brings one, and a second would be a second pool of threads.
wheel: export RSE_FAST_REQUIRE_LIBRARY = 1
wheel: $(VENV)/installed-test $(VENV)/installed-wheel
	rm -rf build/wheel && mkdir -p build/wheel dist
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m build --wheel --outdir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libgomp.so*' --wheel-dir build/wheel/repaired build/wheel/*.whl
	.ci/check_wheel $(BIN)/python build/wheel/repaired/*.whl
	cp build/wheel/repaired/*.whl dist/

clean:
	rm -rf $(VENV) build dist site *.egg-info kernels/cpu/librse_fast_cpu.* kernels/cpu/library_problem.txt

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, so that the demo does not wait for what only the tests need. A changed C++ file reinstalls, which rebuilds.
$(VENV)/installed-%: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@
