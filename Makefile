# `make` lists the targets. ARGS= goes to the program a target runs: make demo ARGS="--seed 1", make test ARGS="-k lsr".

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
STAMP_OF_DEMO := $(VENV)/.stamp-demo
PYTHON ?= $(shell .ci/find-python 3.11+)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := PIP_CONSTRAINT=.ci/constraints.txt $(PIP) install -q
WORKERS ?= 2
ARGS ?=
# Two workers with a thread each finish sooner than one with two, and sums do not depend on the number of cores. A file goes
# to one worker, since what its tests share, several processes that train for example, would be made by each worker otherwise.
SPREAD := -n $(WORKERS) --dist loadfile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD)
EVIDENCE := OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence
SCHEMA := $(BIN)/check-jsonschema --builtin-schema
NOX := $(BIN)/nox --noxfile .ci/noxfile.py
# Where the repository's owner is named; tests/test_packaging.py looks for other places.
OWNED := README.md pyproject.toml CITATION.cff .mkdocs.yml docs .github
OWNER := [A-Za-z0-9-]+

.DEFAULT_GOAL := help
.PHONY: help venv demo evidence-quick cost gpu test test-oldest test-matrix lint format types docs tutorial docs-check wheel owner import-time ci clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

venv: $(STAMP)  ## make or renew .venv (PYTHON= picks the interpreter, 3.11 or newer)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml .ci/constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(STAMP_OF_DEMO) $@

# A sixth of the packages, to which `make venv` adds the others. Python compiles what the demo imports, a tenth of their files.
$(STAMP_OF_DEMO): pyproject.toml .ci/constraints.txt | $(BIN)/python
	$(INSTALL) --no-compile -e '.[examples]'
	@touch $@

demo: $(STAMP_OF_DEMO)  ## train on the digits and print the table, 4-6 minutes (ARGS="--seed 1")
	$(BIN)/python -m examples.classification.digits $(ARGS)

evidence-quick: venv  ## one seed of two benchmarks, all main variants, 10-15 minutes (ARGS="--seeds 101")
	$(EVIDENCE) digits --seeds 100 --variants main,turns --records runs/evidence/quick $(ARGS)
	$(EVIDENCE) street --seeds 100 --variants main,turns --records runs/evidence/quick $(ARGS)

test: venv  ## run the tests, the doctests and the snippets of README and docs (ARGS="-k name")
	$(PYTEST) $(ARGS)

test-oldest: wheel  ## the same on Python 3.8 and torch 1.7.1, with the wheel installed
	$(NOX) -s oldest -- $(SPREAD) $(ARGS)

test-matrix: wheel  ## the same on every supported Python and in the environments that hosts pin (ARGS="-s py39")
	$(NOX) $(ARGS)

lint: venv  ## check style and format, and the forms of what GitHub reads
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff

format: venv  ## apply what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv  ## check the package's types
	$(BIN)/mypy --strict clda_core

docs: venv  ## build the documentation into site/, any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file .mkdocs.yml

tutorial: venv  ## run docs/tutorial.ipynb and keep its outputs, 1-3 minutes (ARGS="--check" only runs it)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python .ci/tutorial.py $(ARGS)

docs-check: docs  ## open every page in Chromium at two widths, 5-15 minutes (ARGS="--pages hosts/ --schemes light")
	$(INSTALL) playwright
	$(BIN)/python .ci/docs_check.py $(ARGS)

wheel: venv  ## build dist/ and check what it holds
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python .ci/check_wheel.py dist/*.whl

owner:  ## write the repository's owner wherever it is named (NAME=...)
	@test -n "$(NAME)" || { echo "who? make owner NAME=..." >&2; exit 1; }
	grep -rlE '$(OWNER)(/|\.github\.io/)clda-core' $(OWNED) | xargs perl -pi -e \
	  's#(github(usercontent)?\.com/)$(OWNER)/clda-core#$${1}$(NAME)/clda-core#g; s#//$(OWNER)(\.github\.io/clda-core)#//$(NAME)$${1}#g'

cost: venv  ## times and memory against their budgets, up to 5 minutes (ARGS="--parts saliency")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cost --quick $(ARGS)

gpu: venv  ## the tests, costs and one benchmark that need a GPU, 25 minutes (ARGS="--parts tests")
	$(BIN)/python -m benchmarks.gpu $(ARGS)

import-time: venv  ## what `import clda_core` costs over `import torch`
	$(BIN)/python .ci/import_time.py

ci:  ## everything that must hold before a change is merged
	.ci/run

clean:  ## remove everything that is made here, the environments too
	rm -rf $(VENV) .nox build dist site .cache runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find clda_core examples tests benchmarks .ci -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
