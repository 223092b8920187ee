# The two commands are make reproduce and make test; each creates .venv first if it is missing or old.
PYTHON ?= python3
PRESET ?= tiny
SEEDS ?= 1
JOBS ?=
EXPERIMENT ?=
MODEL ?=
ONLY ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help env env-hashed test test-all test-oldest reproduce report notebooks bench lint audit lock

help:
	@echo "make reproduce   train the six setups through papermill, then Table 2 and figures"
	@echo "                 (PRESET=tiny SEEDS=1 JOBS= EXPERIMENT=)"
	@echo "make test        the fast tests and five notebooks"
	@echo "make test-all    all tests and all notebooks"
	@echo "make test-oldest fast tests with the oldest supported versions"
	@echo "make env         .venv with everything, pinned by constraints.txt"
	@echo "make env-hashed  the same, with the sha256 of every file checked (Linux x86_64)"
	@echo "make report      Table 2 and figures from records (PRESET= or EXPERIMENT=)"
	@echo "make notebooks   execute the committed notebooks in place"
	@echo "make bench       speed against TRL and generate, limits, scaling: JSON and a page with"
	@echo "                 pictures (MODEL= a folder or GGUF file for a larger model, ONLY= cases)"
	@echo "make lint        ruff, notebooks included"
	@echo "make audit       known vulnerabilities in the pinned versions"
	@echo "make lock        lock files with the sha256 of every pin, from constraints.txt"

env: $(STAMP)

# The CUDA build of torch is some gigabytes larger than the CPU build. Without an NVIDIA GPU the CPU
# build is installed if its index answers; otherwise pip installs the build that it finds.
define CPU_OR_ANY_TORCH
if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
	    'import urllib.request as u; u.urlopen("$(CPU_TORCH_INDEX)/", timeout=5)' 2>/dev/null && \
	    $(BIN)/pip install --extra-index-url $(CPU_TORCH_INDEX) "torch==$(TORCH)+cpu"; \
	  then :; else $(BIN)/pip install "torch==$(TORCH)"; fi
endef

define NEW_VENV
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is required; for example: make env PYTHON=python3.12" >&2; exit 1; }
$(PYTHON) -m venv $(VENV)
endef

$(STAMP): pyproject.toml constraints.txt
	@$(NEW_VENV)
	@$(CPU_OR_ANY_TORCH)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Only files whose sha256 is in a lock file are installed, and no package is built here. The exception
# is the CPU build of torch: its index has other files than PyPI, so only its version is pinned. With
# an NVIDIA GPU, or HASHED_TORCH=1, torch comes from PyPI and is checked too.
env-hashed:
	@$(NEW_VENV)
	$(BIN)/pip install --require-hashes --only-binary :all: --no-deps -r requirements.lock
	@if command -v nvidia-smi >/dev/null || [ -n "$(HASHED_TORCH)" ]; then \
	  $(BIN)/pip install --require-hashes --only-binary :all: --no-deps -r requirements-cuda.lock; \
	  else $(CPU_OR_ANY_TORCH); fi
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	@touch $(STAMP)

# Two processes, each with whole files: tests of a file share fixtures, and a notebook has one kernel.
# Smoke budgets, and their own results folder, keep the notebooks short.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
FAST_NOTEBOOKS := 00_start_here 01_problems_and_rewards 11_rl 21_training_dynamics 30_combined_loss
define NBVAL
folder=$$(mktemp -d) && { HYBRIDRL_SMOKE=1 CUDA_VISIBLE_DEVICES= HYBRIDRL_RESULTS_DIR=$$folder \
	  OMP_NUM_THREADS=1 $(PYTEST) --nbval-lax --nbval-current-env $(1); \
	  status=$$?; rm -rf "$$folder"; exit $$status; }
endef

test: env
	$(PYTEST) -m "not slow and not gpu" tests
	$(call NBVAL,$(FAST_NOTEBOOKS:%=notebooks/%.ipynb))

test-all: env
	$(PYTEST) -m "not gpu" tests
	! command -v nvidia-smi >/dev/null || $(BIN)/python -m pytest -m gpu tests
	$(call NBVAL,notebooks)

# Fast tests with the oldest versions that pyproject.toml allows, in a separate environment.
OLDEST := .venv-oldest
OLDEST_TESTS := config methods policy problems training learning/test_entropy_control.py \
  learning/test_grpo_variants.py report/test_report.py notebook/test_notebook_views.py \
  machine/test_memory.py test_objectives.py

test-oldest:
	@$(MAKE) --no-print-directory VENV=$(OLDEST) $(OLDEST)/.oldest
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" \
	  $(OLDEST_TESTS:%=tests/%)

$(OLDEST)/.oldest: pyproject.toml constraints-oldest.txt
	@$(NEW_VENV)
	@$(CPU_OR_ANY_TORCH)
	$(BIN)/pip install -c constraints-oldest.txt -e '.[test]' gguf
	@touch $@

reproduce: env
	$(BIN)/hybridrl reproduce --preset $(PRESET) --seeds $(SEEDS) \
	  $(if $(JOBS),--jobs $(JOBS)) $(if $(EXPERIMENT),--experiment $(EXPERIMENT))

report: env
	$(BIN)/hybridrl report $(or $(EXPERIMENT),$(PRESET))

notebooks: env
	$(BIN)/python -m hybridrl_lib.experiments.execute --preset tiny

bench: env
	$(BIN)/python benchmarks/suite.py $(if $(MODEL),--model "$(MODEL)") $(if $(ONLY),--only $(ONLY))

audit:
	@$(PYTHON) .ci/audit

lock:
	$(PYTHON) .ci/lock

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff check --line-length 88 notebooks
