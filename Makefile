# Everything a newcomer needs: `make demo` and `make test`. Both set up first what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ifneq ($(shell command -v uv),)
INSTALL := uv pip install --quiet --python $(BIN)/python
endif
# Text only: half of llama.cpp's compile time is its image and audio support.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF

.PHONY: help setup setup-dev demo test test-gpu check fix bench protos lock clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

setup: $(VENV)/ready ## install what Skim needs to run

setup-dev: $(VENV)/ready-dev ## and what its tests and linters need

$(VENV)/ready: requirements.txt
	@echo "Setting up. The first time this compiles llama.cpp: about 5 minutes on two cores."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps --editable .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	@touch $@

demo: setup ## hide a needle in a long document; answer with and without skimming
	$(BIN)/skim demo $(ARGS)

test: setup-dev ## all tests that need no GPU
	$(BIN)/python -m pytest $(ARGS)

test-gpu: setup-dev ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

check: setup-dev ## lint and type-check; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos

fix: setup-dev ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev ## the published retrieval table, small
	$(BIN)/python -m bench.retrieval --sizes 8192 --n 20 --keep 0.1 --json

protos: setup-dev ## regenerate skim/v1 from protos/
	$(BIN)/python protos/generate.py

lock: setup-dev ## pin every dependency anew
	uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --group dev pyproject.toml -o requirements-dev.txt
	uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate -c requirements-dev.txt pyproject.toml -o requirements.txt

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
