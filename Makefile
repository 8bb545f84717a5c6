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

.PHONY: help demo test test-all test-quick test-repeat check bench zoo battery fuzz sanitize faults load docs build wheel clean

help:
	@echo "make demo         train, attack and report on real images (a few minutes)"
	@echo "make test         all tests but the longest (about ten minutes on two free cores)"
	@echo "make test-all     and those that take minutes: every loop in examples/, every export"
	@echo "make test-quick   the noise and the conversion, without the slow ones (half a minute)"
	@echo "make test-repeat  all tests TIMES=20 times, with new inputs and in random order"
	@echo "make check        faults and format (ruff), types of the public API (mypy)"
	@echo "make bench        benchmarks beside the peers, which it installs"
	@echo "make zoo          what the engine makes of the networks of timm and torchvision; goes on where it was interrupted"
	@echo "make battery      randomness: TestU01, dieharder, normals; in parts, a stopped run goes on (hours)"
	@echo "make fuzz         20,000 random calls and damaged files (most of an hour)"
	@echo "make sanitize     the C++ library under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make faults       kills every command at 100 random instants, fills its disk, and compares what it leaves (half an hour)"
	@echo "make load         one ensemble under eight threads for ten minutes"
	@echo "make docs         the documentation as a site, in site/; a warning is an error"
	@echo "make build        sdist and wheel into dist/"
	@echo "make wheel        a manylinux wheel into dist/, tried in a new environment (Linux)"
	@echo "make clean        remove .venv and everything built"

# Passive waiting: on a machine whose cores others use too, threads that spin at barriers make small networks ten times slower.
battery bench demo faults fuzz load test test-all test-quick test-repeat zoo: export OMP_WAIT_POLICY ?= passive

demo: $(VENV)/installed-demo
	$(BIN)/rse-fast demo $(ARGS)

# One process a core; what a file's tests share is made once, so a file stays in one process.
test: $(VENV)/installed-test
	@echo "all tests: about ten minutes on two free cores; make test-quick is a part of them"
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not long" $(ARGS)

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-quick: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not long and not bench" $(QUICK) $(ARGS)

test-repeat: $(VENV)/installed-test
	@failed=0; for run in $$(seq $(TIMES)); do \
	  order=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); echo "run $$run of $(TIMES): --random-order $$order"; \
	  $(BIN)/python -m pytest -q -n auto --dist loadfile --random-order $$order $(ARGS) || failed=$$((failed + 1)); \
	done; echo "$$failed of $(TIMES) runs failed"; test $$failed = 0
faults: export RSE_FAST_KILLS ?= 100
faults: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 0 -s tests/faults/test_kills.py tests/faults/test_faults.py $(ARGS)

load: export RSE_FAST_LOAD_SECONDS ?= 600
load: export OMP_NUM_THREADS ?= 1
load: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 0 -s tests/faults/test_load.py $(ARGS)

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/installed-bench $(VENV)/installed-peers
	$(PIP) install -q --no-deps -c constraints.txt baal
	$(BIN)/rse-fast bench $(ARGS)

# TestU01 and dieharder are Debian's: apt-get install libtestu01-0-dev dieharder. The former is in its component non-free.
battery: $(VENV)/installed-test
	$(BIN)/python -m bench.battery $(ARGS)

fuzz: export RSE_FAST_FUZZ_CASES ?= 20000
fuzz: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto tests/fuzz $(ARGS)

sanitize: $(VENV)/installed-test
	$(BIN)/python tests/sanitize/run.py $(ARGS)

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
