# Two commands matter: `make train` and `make test`. Both install what they need, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
KERNELS := $(VENV)/.kernels
TESTED := $(VENV)/.ready-test
# Python 3.12 gets another release of Megatron-core (constraints.txt), and an environment of its own.
PYTHON312 ?= python3.12
OTHER := tests/parallel tests/model tests/train/test_layouts.py tests/train/test_checkpoint_layouts.py tests/train/test_checkpoint_engine.py

.PHONY: train test test-slow test-312 test-survival test-gpu test-slurm compare setup lint types clean

train: $(KERNELS)
	$(BIN)/python -m train -cn tiny $(ARGS)

compare: $(KERNELS)
	$(BIN)/python -m train.report.compare $(ARGS)

setup: $(KERNELS)

# Two files of tests at a time: most tests start processes of their own and wait for them.
test: $(TESTED) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

test-312:
	@command -v $(PYTHON312) >/dev/null || { echo "make test-312 needs Python 3.12, and there is no $(PYTHON312): make test-312 PYTHON312=/path/to/python3.12"; exit 2; }
	$(MAKE) .venv-3.12/.ready-test VENV=.venv-3.12 PYTHON=$(PYTHON312)
	.venv-3.12/bin/python -c 'from importlib.metadata import version; import sys; print(*sys.version_info[:2], "megatron-core", version("megatron-core"))'
	OMP_NUM_THREADS=1 .venv-3.12/bin/python -m pytest -n 2 --dist loadfile $(OTHER) $(ARGS)

# A hundred kills, which take an hour or two; SURVIVAL_KILLS, SURVIVAL_SEED and SURVIVAL_TO as tests/survival/test_survival.py says.
test-survival: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m survival -s $(ARGS)

test-gpu: $(TESTED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "make test-gpu needs a CUDA device, and there is none here: not one of its tests has run"; exit 2; }
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Against a real Slurm, which root installs (Debian's packages) and starts in a directory of its own.
test-slurm: $(TESTED)
	@command -v slurmctld >/dev/null || test -x /usr/sbin/slurmctld || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null; } || { echo "make test-slurm needs Slurm, and root with apt-get to install it: use a container with Debian's slurm-wlm and munge"; exit 2; }
	@command -v slurmctld >/dev/null || test -x /usr/sbin/slurmctld || DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

types: $(TESTED)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "Nibble needs Python 3.11 or newer; $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# Numba keeps compiled kernels by their source: a changed one is compiled here, not in the first step of a run.
$(KERNELS): $(READY) model/precision/backends/cpu.py model/precision/backends/cpu_kernels.py
	$(BIN)/python -m model.precision.backends
	@touch $@

$(TESTED): $(KERNELS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
