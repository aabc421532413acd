# Every target makes its own environment, so that any of them is a fine first command after a clone.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## a cluster on this machine, questions and where their time went; ONCE=1: end by itself
	$(BIN)/eagleray demo $(if $(ONCE),--once)

serve: $(STAMP) ## an OpenAI-compatible endpoint; options in ARGS, for example ARGS='my.yaml --port 8001'
	$(BIN)/eagleray serve $(ARGS)

test: $(STAMP) ## the tests; more of them with ARGS='-m slow'
	$(BIN)/pytest $(ARGS)

lint: $(STAMP) ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_types_and_layers.py

bench: $(STAMP) ## replay a trace against a cluster; options in ARGS
	$(BIN)/python benchmarks/replay.py $(ARGS)

clean: ## everything that the other targets made, the environment included
	rm -rf $(VENV) .typecheck build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt scripts/make_environment.sh
	scripts/make_environment.sh $(VENV)
	@touch $@
