# gatewise: `make quickstart` trains, `make test` checks; both make .venv and install what they need.
# Nothing but Python 3.11 or newer and make is required.
#
#   make install                 .venv with gatewise and the tools of development
#   make install TORCH=torch     ... with the newest torch of the index (machines with a GPU)
#   make quickstart              train on 2 ranks, evaluate, print a sample, compress
#   make quickstart ARGS=...     ... with other settings, as ARGS='steps=100 seed=1'
#   make test                    format, lint, types, unit, distributed and end-to-end tests

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PROMPT ?= def
ARGS ?=
ifndef RUN
RUN := runs/quickstart/$(shell date +%Y-%m-%d_%H-%M-%S)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PYTEST := env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
# Each part has a limit in seconds, where the system has `timeout` (GNU or BSD).
LIMIT := $(if $(shell command -v timeout),timeout -k 20)
limit = $(if $(LIMIT),$(LIMIT) $(1))

.PHONY: help install quickstart test lint types unit distributed e2e clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

# torch comes first and from the ordinary index, so that resolving the rest cannot replace it by
# another build. The stamps make a second run quick.
$(VENV)/.core: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gatewise needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..."; \
	  exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) '$(TORCH)'; }
	@echo "installing gatewise"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing the tools of development"
	@$(PIP) -e '.[dev]'
	@touch $@

install: $(VENV)/.dev

# With the extra `report` (`make install` has it) also report.html. The last line is the path of the
# training's result.
quickstart: $(VENV)/.core
	@$(BIN)/gatewise train experiment=quickstart run.dir='$(RUN)' $(ARGS)
	@$(BIN)/gatewise generate checkpoint='$(RUN)' prompt='$(PROMPT)' tokens=200 run.dir='$(RUN)/sample'
	@$(BIN)/gatewise compress checkpoint='$(RUN)' bits=2.5 run.dir='$(RUN)/2.5_bits'
	@! $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("plotly"))' || \
	  $(BIN)/gatewise report '$(RUN)' run.dir='$(RUN)/report'
	@echo '$(abspath $(RUN))/result.json'

lint: $(VENV)/.dev
	@$(call limit,120) $(BIN)/ruff format --check --quiet .
	@$(call limit,120) $(BIN)/ruff check --quiet .

types: $(VENV)/.dev
	@$(call limit,400) $(BIN)/mypy --no-error-summary

# Unit tests share the cores by xdist; every distributed case already uses them all.
unit: $(VENV)/.dev
	@$(call limit,600) $(PYTEST) -n 2 tests/unit

distributed: $(VENV)/.dev
	@$(call limit,900) $(PYTEST) tests/distributed

# Two files at a time: the tests of Slurm wait most of the time.
e2e: $(VENV)/.dev
	@$(call limit,1000) $(PYTEST) -n 2 --dist loadfile tests/e2e

# Cheapest first; one after the other also under `make -j`. The last line is pytest's summary.
test: $(VENV)/.dev
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory distributed
	@$(MAKE) --no-print-directory e2e

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
