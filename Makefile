# Every target sets up what it needs: Python >= 3.11, pip and make are enough.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build of torch pairs with no triton; tests pin the one that pairs with the newest torch.
CONSTRAINTS := tests/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup test check docs megablocks trackers flower interpret aot test-oldest aot-3.6 demo bench bench-gpu gpu-cache test-gpu clean

help: ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/.ready: setup.py pyproject.toml $(CONSTRAINTS)
	@echo "setup: making $(VENV) and installing $(TORCH) and the rest, a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedmoe needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[test]"
	@touch $@

setup: $(VENV)/.ready ## create .venv with fedmoe, torch and the test tools (TORCH= picks the torch)

# A worker for each core, each with one thread; a worker that runs out of tests takes some of another's.
test: setup ## the whole test suite
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist worksteal --durations=25 --durations-min=5

docs: setup ## build the documentation site into build/site; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The rules of the house take seconds; learned from make test, a wrong word costs a quarter of an hour.
check: setup ## lint, format, types and the rules of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 tests/test_house.py

# Without their dependencies, for megablocks pins an old torch. Both are small source packages; where megablocks finds a
# CUDA compiler it also builds an extension, which takes minutes and which nothing here uses.
megablocks: setup ## the megablocks binding against the published package, which this installs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation stanford-stk==0.7.1 megablocks==0.10.0
	$(BIN)/python -m pytest -q tests/bindings/megablocks

# Each brings many packages, so they are not among those of the tests.
trackers: setup ## the sinks of Weights & Biases and MLflow against the published packages, which this installs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[mlflow,wandb]"
	$(BIN)/python -m pytest -q tests/bindings/tracking tests/test_no_network.py

# In an environment of its own: Flower holds back typer and rich. Its tests start a SuperLink and four SuperNodes on the
# loopback interface, with certificates that they make themselves.
FLOWER := .venv-flower
$(FLOWER)/.ready: setup.py pyproject.toml $(CONSTRAINTS)
	@echo "setup: making $(FLOWER) with fedmoe and Flower, a few minutes the first time"
	@test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[flower,privacy]" pytest pytest-timeout hypothesis
	@touch $@

flower: $(FLOWER)/.ready ## the Flower binding against the published package: real processes, TLS, a device that dies, .venv-flower
	$(FLOWER)/bin/fedmoe --help > /dev/null
	$(FLOWER)/bin/python -m pytest -q tests/bindings/flower

interpret: setup ## every Triton kernel in Triton's interpreter, on CPU, against the float64 reference
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/interpret

aot: setup ## compile every kernel for GPUs that are not here, check the code, keep the table in bench/results
	$(BIN)/python -m bench.aot.run --keep

# The oldest torch and triton that pyproject.toml admits, which machines with a GPU have. That torch comes with 4 GB of
# CUDA libraries, which no test here needs and without which it does not import.
OLDEST := .venv-oldest
OLDEST_CONSTRAINTS := tests/constraints-oldest.txt
$(OLDEST)/.ready: setup.py pyproject.toml $(OLDEST_CONSTRAINTS)
	@echo "setup: making $(OLDEST) with the oldest torch and triton, a few minutes the first time"
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST_CONSTRAINTS) -e ".[test]"
	@touch $@

# What goes through torch's operators, Triton's interpreter or its compiler. Left out are the interpreter's files of one
# kernel each (70 CPU seconds): the same kernels run within the operator in experts/test_moe_mlp.py; and tests of bench
# that ask neither (60 CPU seconds).
OLDEST_PYTEST := $(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses=8 --dist worksteal
NEITHER := $(foreach name,rooms upstream,--ignore=tests/bench/test_$(name).py)
ONE_KERNEL := $(foreach name,up down data_gradient,--ignore=tests/interpret/experts/test_$(name).py)
test-oldest: $(OLDEST)/.ready ## kernels, benchmarks and the interpreter with the oldest torch and triton, .venv-oldest
	$(OLDEST_PYTEST) tests/kernels tests/bench $(NEITHER)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(OLDEST_PYTEST) tests/interpret $(ONE_KERNEL)

aot-3.6: $(OLDEST)/.ready ## the same as aot with triton 3.6.0, of .venv-oldest
	$(OLDEST)/bin/python -m bench.aot.run --keep

# Absolute, so that no variable that is lost or empty can send the runs anywhere else.
DEMO := $(CURDIR)/runs/demo
DEMO_SYSTEMS := hfedmoe random fedavg
demo: setup ## fine-tune a small MoE over ten budgeted clients, next to random experts and FedAvg, and write the report
	@number=0; for system in $(DEMO_SYSTEMS); do \
	  number=$$((number + 1)); echo "demo: run $$number of $(words $(DEMO_SYSTEMS)), $$system"; \
	  $(BIN)/fedmoe simulate examples/demo.toml algorithm=$$system out="$(DEMO)/$$system" --force || exit; \
	done
	@$(BIN)/fedmoe report $(DEMO_SYSTEMS:%="$(DEMO)/%") --out "$(DEMO)/report.html"

bench: setup ## CPU microbenchmarks against the experts of transformers and one dense product
	$(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,rounds --benchmark-sort=name

bench-gpu: setup ## on a GPU: correctness, compute-sanitizer, times against peers, table and plots; goes on where it stopped
	PYTHON=$(abspath $(BIN)/python) bash bench/gpu.sh

# What is carried to a machine with a GPU, so that it compiles nothing: for Python 3.12 with triton 3.6.0, for Triton's
# launchers are modules of one Python.
GPU_PYTHON ?= python3.12
CARRIED := .venv-gpu
$(CARRIED)/.ready:
	@$(GPU_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "the cache is made for Python 3.12: make GPU_PYTHON=/path/to/python3.12 gpu-cache"; exit 1; }
	test -x $(CARRIED)/bin/python || $(GPU_PYTHON) -m venv $(CARRIED)
	$(CARRIED)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(CARRIED)/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0 "numpy<2.4" rich transformers
	@touch $@

gpu-cache: $(CARRIED)/.ready ## pack into .gpu/ what `bench/gpu.sh first` and `second` would compile on a GPU, and prove it whole
	$(CARRIED)/bin/python -m bench.gpu.cache wheels
	PYTHONPATH= TRITON_CACHE_DIR=$(abspath runs/triton-carried) $(CARRIED)/bin/python -m bench.gpu.cache build
	PYTHONPATH= $(CARRIED)/bin/python -m bench.gpu.cache check

test-gpu: setup ## on a GPU: correctness as pytest
	$(BIN)/python -m pytest -q -m gpu tests/gpu

clean: ## remove the environment and the runs
	rm -rf $(VENV) $(OLDEST) $(CARRIED) $(FLOWER) runs build dist *.egg-info
