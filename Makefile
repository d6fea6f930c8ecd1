# Verbs of this repository. Each sets up what it needs; the set-up is skipped while nothing has changed.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests. Half of them wait for other processes half of the time, so one per CPU keeps all busy.
TEST_PROCESSES ?= $(shell nproc 2>/dev/null || echo 2)
BUF := @bufbuild/buf@1.75.0

.PHONY: help install demo serve test test-gpu test-compose bench docs check format protos clean
.DEFAULT_GOAL := help

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml setup.py constraints.txt tools/install.sh
	@bash tools/install.sh $(VENV)
	@touch $@

install: $(STAMP) ## make .venv with pinned dependencies, and the gRPC stubs
	@$(BIN)/python -m tools.generate_stubs --if-stale

demo: install ## see the whole service work once: three processes, bundled model, CPU
	@$(BIN)/python -m pagewire.demo

serve: install ## serve the bundled model, or: make serve ARGS="--model DIR_OR_HUB_ID"
	@$(BIN)/pagewire up $(ARGS)

test: install ## run the whole test suite; GPU tests skip where there is no GPU
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --maxprocesses 4 --dist loadscope $(ARGS)

test-gpu: install ## run the GPU tests only
	@$(BIN)/python -m pytest -m gpu $(ARGS)

test-compose: install ## build the images and drive docker-compose.yml on a Docker engine; skips where none can be had
	@PAGEWIRE_TEST_COMPOSE=1 $(BIN)/python -m pytest tests/compose $(ARGS)

bench: install ## a small measurement of the bundled model; ARGS="--help" shows what else there is
	@$(BIN)/pagewire bench throughput $(or $(ARGS),--scale 0.02 --length-scale 0.125 --max-num-seqs 64)

docs: install ## build the documentation site into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "documentation: open build/site/index.html"

check: install ## style, types and protocol rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if ! command -v npx >/dev/null; then \
		echo "buf lint skipped: npx is not installed"; \
	elif ! npx --yes $(BUF) --version >/dev/null 2>&1; then \
		echo "buf lint skipped: npm cannot fetch $(BUF)"; \
	else \
		echo "buf lint"; cd protos && npx --yes $(BUF) lint; \
	fi

format: install ## apply the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: $(STAMP) ## write the gRPC stubs again
	@$(BIN)/python -m tools.generate_stubs

clean: ## remove what was made here: .venv, stubs, caches
	rm -rf $(VENV) pagewire/v1 build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
