# make reproduce and make test are the two commands; each makes .venv first if it is missing or old.
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

.PHONY: help env env-hashed test test-oldest reproduce report notebooks bench lint audit lock

help:
	@echo "make reproduce   train the six setups through papermill, then Table 2 and figures"
	@echo "                 (PRESET=tiny SEEDS=1 JOBS= EXPERIMENT=)"
	@echo "make test        all tests, notebooks included"
	@echo "make test-oldest the fast tests with the oldest versions that are allowed"
	@echo "make env         .venv with everything, pinned by constraints.txt"
	@echo "make env-hashed  the same, every file compared with its recorded sha256 (Linux x86_64)"
	@echo "make report      Table 2 and figures again, from records (PRESET= or EXPERIMENT=)"
	@echo "make notebooks   execute the committed notebooks again, in place"
	@echo "make bench       speed against TRL and generate, ceilings, scaling: JSON and a page with"
	@echo "                 pictures (MODEL= a folder or GGUF file for a larger model, ONLY= cases)"
	@echo "make lint        ruff, notebooks included"
	@echo "make audit       known vulnerabilities in the pinned versions"
	@echo "make lock        the files with the sha256 of every pin again, from constraints.txt"

env: $(STAMP)

# The CUDA build of torch is some gigabytes larger than the CPU build, so without an NVIDIA GPU the
# latter is taken where its index answers; elsewhere pip takes the build that it finds.
define CPU_OR_ANY_TORCH
if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
	    'import urllib.request as u; u.urlopen("$(CPU_TORCH_INDEX)/", timeout=5)' 2>/dev/null && \
	    $(BIN)/pip install --extra-index-url $(CPU_TORCH_INDEX) "torch==$(TORCH)+cpu"; \
	  then :; else $(BIN)/pip install "torch==$(TORCH)"; fi
endef

define NEW_VENV
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one: make env PYTHON=python3.12" >&2; exit 1; }
$(PYTHON) -m venv $(VENV)
endef

$(STAMP): pyproject.toml constraints.txt
	@$(NEW_VENV)
	@$(CPU_OR_ANY_TORCH)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Nothing is installed that is not in a lock file with this sha256, and no package builds itself
# here. The one exception is the CPU build of torch: its index has other files than PyPI, and only
# its version is pinned. With an NVIDIA GPU, or HASHED_TORCH=1, torch is PyPI's and hashed too.
env-hashed:
	@$(NEW_VENV)
	$(BIN)/pip install --require-hashes --only-binary :all: --no-deps -r requirements.lock
	@if command -v nvidia-smi >/dev/null || [ -n "$(HASHED_TORCH)" ]; then \
	  $(BIN)/pip install --require-hashes --only-binary :all: --no-deps -r requirements-cuda.lock; \
	  else $(CPU_OR_ANY_TORCH); fi
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	@touch $(STAMP)

test: env
	$(BIN)/python -m pytest tests
	! command -v nvidia-smi >/dev/null || $(BIN)/python -m pytest -m gpu tests
	folder=$$(mktemp -d) && { HYBRIDRL_SMOKE=1 CUDA_VISIBLE_DEVICES= HYBRIDRL_RESULTS_DIR=$$folder \
	  $(BIN)/python -m pytest --nbval-lax --nbval-current-env notebooks; \
	  status=$$?; rm -rf "$$folder"; exit $$status; }

# The fast tests with the oldest versions that pyproject.toml allows, in an environment of its own.
OLDEST := .venv-oldest
OLDEST_TESTS := upstream numerics objectives policy decoding packing samplers evaluation problems \
  config checkpoints training notebook_views report adapters precision distributed hub memory resume

test-oldest:
	@$(MAKE) --no-print-directory VENV=$(OLDEST) $(OLDEST)/.oldest
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS:%=tests/test_%.py)

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
	$(BIN)/python -m hybridrl_lib.notebook.execute --preset tiny

bench: env
	$(BIN)/python benchmarks/suite.py $(if $(MODEL),--model "$(MODEL)") $(if $(ONLY),--only $(ONLY))

audit:
	@$(PYTHON) .ci/audit

lock:
	$(PYTHON) .ci/lock

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff check --line-length 88 notebooks
