# Every verb makes .venv itself. Arguments for a program: make demo ARGS="--data DIR", make test ARGS="-k philox".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h) kernels/cpu/build.py
INPUTS := pyproject.toml setup.py constraints.txt $(NATIVE)

.PHONY: help demo test check bench zoo docs build clean

help:
	@echo "make demo   train, attack and report on real images (a few minutes)"
	@echo "make test   all tests"
	@echo "make check  ruff: faults and format"
	@echo "make bench  benchmarks beside the peers, which it installs"
	@echo "make zoo    what the engine makes of the networks of timm and torchvision; goes on where it was interrupted"
	@echo "make docs   the documentation as a site, in site/; a warning is an error"
	@echo "make build  sdist and wheel into dist/"
	@echo "make clean  remove .venv and everything built"

# Passive waiting: on a machine whose cores others use too, threads that spin at barriers make small networks ten times slower.
bench demo test zoo: export OMP_WAIT_POLICY ?= passive

demo: $(VENV)/installed-demo
	$(BIN)/rse-fast demo $(ARGS)

# One process a core; what a file's tests share is made once, so a file stays in one process.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed-bench $(VENV)/installed-peers
	$(PIP) install -q --no-deps -c constraints.txt baal
	$(BIN)/rse-fast bench $(ARGS)

# timm imports torchvision, which asks for one torch exactly; both are installed beside the torch that is there.
zoo: $(VENV)/installed-test
	$(PIP) install -q -c constraints.txt huggingface_hub pyyaml
	$(PIP) install -q --no-deps -c constraints.txt timm torchvision
	$(BIN)/python -m rse_fast.bench.zoo $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

# The sdist first, then the wheel from the sdist: so the sdist is known to be complete.
build: $(VENV)/installed-test
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist site *.egg-info kernels/cpu/librse_fast_cpu.* kernels/cpu/library_problem.txt

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, so that the demo does not wait for what only the tests need. A changed C++ file reinstalls, which rebuilds.
$(VENV)/installed-%: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@
