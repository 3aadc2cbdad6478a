# One target for each thing a person does; `make` lists them.

MODEL ?= examples/demo/checkpoint
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

bin := .venv/bin
served_name := $(if $(filter examples/demo/checkpoint,$(MODEL)),--served-model-name demo)

export PATH := $(CURDIR)/$(bin):$(PATH)
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install serve test test-all test-suites fuzz soak lint format bench bench-kernels docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: ## set up .venv: vLLM, MindSpore, this package, its kernels
	@scripts/setup.sh

serve: install ## OpenAI-compatible server; MODEL=path-or-hub-id HOST= PORT= ARGS="any option of vllm serve"
	@exec $(bin)/vllm serve $(MODEL) $(served_name) --host $(HOST) --port $(PORT) $(ARGS)

test: ## the quick tests; ARGS="-k name" picks
	@scripts/setup.sh test
	@$(bin)/python -m pytest $(ARGS)

test-all: ## every test, the slow ones too
	@scripts/setup.sh test test-weights
	@$(bin)/python -m pytest -m "" $(ARGS)

test-suites: ## models of MindSpore's suites (docs/suites.md), in an environment of their own
	@scripts/setup_suites.sh
	@PATH="$(CURDIR)/.venv-suites/bin:$$PATH" .venv-suites/bin/python -m pytest -m "" tests/suites $(ARGS)

fuzz: ## hostile input, 100,000 of each kind; ARGS="--targets headers rope", "--inputs 1000" and others go to tests/fuzz
	@scripts/setup.sh test
	@$(bin)/python -m tests.fuzz $(ARGS)

soak: ## a server under load for 30 minutes; ARGS="--minutes 2", "--clients 16", "--adapters 0"
	@scripts/setup.sh test
	@$(bin)/python -m tests.soak $(ARGS)

lint: ## ruff and mypy
	@scripts/setup.sh lint
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

format: ## reformat, and fix what ruff can fix
	@scripts/setup.sh lint
	$(bin)/ruff check --fix
	$(bin)/ruff format

bench: ## side by side with other engines (hours); ARGS="--quick", "--help" and others go to benchmarks/run.py
	@scripts/setup.sh bench
	@$(bin)/python -m benchmarks.run $(ARGS)

bench-kernels: install ## each kernel beside the machine's own limits; ARGS= go to benchmarks/kernels.py
	@$(bin)/python benchmarks/kernels.py $(ARGS)

docs: ## docs/models.md from the registry, docs/features.md from the marks of the tests
	@scripts/setup.sh test
	@$(bin)/python scripts/models.py
	@$(bin)/python scripts/features.py

clean: ## remove caches and build products; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache kernel_meta rank_*
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
