# Works on a fresh machine with Python 3.10 or newer, pip and make: everything else goes into .venv, once, and again when what it was
# made from changes. Where there is an NVIDIA GPU, torch is a CUDA build and, with nvcc, the kernels of csrc/ are compiled.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= vllm/assets/tiny-qwen3_5-moe
JOBS ?= 2
# Where CPU builds of torch come from. Empty: only what pip is set up with.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
CLIENTS := $(VENV)/clients
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
export PATH := $(CURDIR)/$(BIN):$(PATH)
# No test downloads a model: the one they use is in the repository.
test test-gpu: export HF_HUB_OFFLINE := 1

CUDA_SOURCES := $(wildcard csrc/*.cu csrc/*.cuh tests/csrc/emulated/*.cpp tests/csrc/emulated/*.h)

.DEFAULT_GOAL := help
.PHONY: help serve test test-gpu lint format csrc clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.run ## serve MODEL (default: the tiny one in the repository) at 127.0.0.1:8000; Ctrl-C stops it
	$(BIN)/vllm serve $(MODEL) --reasoning-parser qwen3 --tool-call-parser qwen3_coder --enable-auto-tool-choice

test: $(VENV)/.test $(CLIENTS)/.done lint ## everything that needs no GPU; this is what CI runs
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --durations=15 -m "not gpu"

test-gpu: $(VENV)/.test csrc ## the tests that need a CUDA device
	$(BIN)/python -m pytest --durations=15 -m gpu

lint: $(VENV)/.test ## what `make format` would change, and what it cannot
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --output-format concise .
	$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)

format: $(VENV)/.test ## format Python and CUDA sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA_SOURCES)

csrc: $(VENV)/.run ## compile csrc/ again, after editing it
	$(BIN)/python setup.py --quiet build_ext --inplace

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info vllm/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian keeps ensurepip in a package of its own; without it, pip installs a pip into the environment from outside.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, PYTHON=$(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV) install pip; }

# torch comes first and by itself, or the requirements below would bring the CUDA build to every machine.
$(VENV)/.run: requirements/common.txt requirements/cpu.txt requirements/cuda.txt pyproject.toml setup.py tools/install_torch.py | $(BIN)/python
	$(PIP) "setuptools>=77" wheel
	if command -v nvcc >/dev/null && command -v nvidia-smi >/dev/null; then $(PIP) "cmake>=3.22" ninja; fi
	$(BIN)/python tools/install_torch.py --cpu-index "$(TORCH_CPU_INDEX)"
	$(PIP) -r requirements/common.txt
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.run
	$(PIP) -r requirements/test.txt
	touch $@

# Client programs see what is in $(VENV), but what they install for themselves comes first and stays out of it.
SITE := import site; print(site.getsitepackages()[0])
$(CLIENTS)/.done: requirements/clients.txt $(VENV)/.test
	$(BIN)/python -m venv --without-pip $(CLIENTS)
	$(BIN)/python -c '$(SITE)' > "$$($(CLIENTS)/bin/python -c '$(SITE)')/below.pth"
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -qq --no-compile -r requirements/clients.txt
	touch $@
