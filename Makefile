# Everything a developer or an operator does with this repository. CI runs the same targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON := .venv/bin/python

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# --- run it

.PHONY: demo up down
demo: ## start the whole suite on real servers and show it at work
	@scripts/bootstrap demo
	@$(PYTHON) scripts/suite.py demo

up: ## start the whole suite in the background
	@scripts/bootstrap demo
	@$(PYTHON) scripts/suite.py up

down: ## stop what demo or up started
	@scripts/bootstrap
	@$(PYTHON) scripts/suite.py down

# --- work on it

.PHONY: setup lock format lint imports types docs docs-check check test ci test-compose bench
setup: ## make .venv from requirements.lock
	@scripts/bootstrap

lock: setup ## bring requirements.lock up to date with the pyproject files
	scripts/lock

format: setup ## format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix -q .

lint: setup ## check format and lint
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

imports: setup ## check who may import whom
	.venv/bin/lint-imports

types: setup ## mypy --strict
	@# a tree at a time: each service has a tests/conftest.py of its own
	@for tree in libs/common services/* scripts tests benchmarks; do echo "mypy $$tree"; .venv/bin/mypy $$tree || exit; done

docs: setup ## write the generated API and topic documents
	$(PYTHON) scripts/api_documents.py

docs-check: setup ## check that the generated documents are fresh
	$(PYTHON) scripts/api_documents.py --check

check: setup ## the gate without the tests
	scripts/lock --check
	$(MAKE) --no-print-directory lint imports types docs-check

test: ## every test, on private servers that it starts itself
	@scripts/bootstrap test
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile

ci: check test ## what CI runs

test-compose: ## build the images, bring the compose stack up, smoke-test it, take it down
	scripts/test-compose

bench: ## measure a claim beside a peer and the bare limit: make bench BENCH=usage_ingest ARGS="--turns 1"
	@scripts/bootstrap $(if $(findstring precache,$(BENCH)),bench,test)
	$(PYTHON) benchmarks/$(BENCH).py $(ARGS)
