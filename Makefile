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

.PHONY: help env test reproduce report notebooks bench lint

help:
	@echo "make reproduce   train the six setups through papermill, then Table 2 and figures"
	@echo "                 (PRESET=tiny SEEDS=1 JOBS= EXPERIMENT=)"
	@echo "make test        all tests, notebooks included"
	@echo "make env         .venv with everything, pinned by constraints.txt"
	@echo "make report      Table 2 and figures again, from records (PRESET= or EXPERIMENT=)"
	@echo "make notebooks   execute the committed notebooks again, in place"
	@echo "make bench       speed against TRL and generate, ceilings, scaling: JSON and a page with"
	@echo "                 pictures (MODEL= a folder or GGUF file for a larger model, ONLY= cases)"
	@echo "make lint        ruff, notebooks included"

env: $(STAMP)

# The CUDA build of torch is some gigabytes larger than the CPU build, so without an NVIDIA GPU the
# latter is taken where its index answers; elsewhere pip takes the build that it finds.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one: make env PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
	    'import urllib.request as u; u.urlopen("$(CPU_TORCH_INDEX)/", timeout=5)' 2>/dev/null && \
	    $(BIN)/pip install --extra-index-url $(CPU_TORCH_INDEX) "torch==$(TORCH)+cpu"; \
	  then :; else $(BIN)/pip install "torch==$(TORCH)"; fi
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

test: env
	$(BIN)/python -m pytest tests
	folder=$$(mktemp -d) && { HYBRIDRL_SMOKE=1 HYBRIDRL_RESULTS_DIR=$$folder \
	  $(BIN)/python -m pytest --nbval-lax --nbval-current-env notebooks; \
	  status=$$?; rm -rf "$$folder"; exit $$status; }

reproduce: env
	$(BIN)/hybridrl reproduce --preset $(PRESET) --seeds $(SEEDS) \
	  $(if $(JOBS),--jobs $(JOBS)) $(if $(EXPERIMENT),--experiment $(EXPERIMENT))

report: env
	$(BIN)/hybridrl report $(or $(EXPERIMENT),$(PRESET))

notebooks: env
	$(BIN)/python -m hybridrl_lib.notebook.execute --preset tiny

bench: env
	$(BIN)/python benchmarks/suite.py $(if $(MODEL),--model "$(MODEL)") $(if $(ONLY),--only $(ONLY))

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff check --line-length 88 notebooks
