# Everything runs in one virtual environment, made from requirements.lock and made again when it changes.

PYTHON ?= python3
LOCK := $(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
READY := .venv/ready-$(LOCK)
RUN := .venv/bin/python

export PREFECT_SERVER_ANALYTICS_ENABLED = false
export HF_HUB_OFFLINE = 1

.PHONY: demo test check bench clean

demo: $(READY)  ## the main job on the shipped model and corpus, then three SQL answers
	$(RUN) -m flows.pipeline flows/recipes/demo.toml

test: $(READY)  ## the tests
	$(RUN) -m pytest

check: $(READY)  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(READY)  ## the benchmarks, each ending in one line of JSON
	for file in tests/benchmarks/[a-z]*.py; do $(RUN) -m tests.benchmarks.$$(basename $$file .py) || exit 1; done

clean:  ## remove the environment and the caches, not the store
	rm -rf .venv .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
