# Two commands: `make demo` and `make test`. Each first sets up what it needs in .venv.
#
#   PYTHON=...       the interpreter to build .venv with (default: the first fitting one on the PATH)
#   MACHINE=...      cpu, nvidia or plain (default: found out)
#   DEMO_OUT=...     where the demo writes (default: demo-out)
#   PYTEST_ARGS=...  more arguments for pytest
#   INPUTS=...       how many mutated caches `make fuzz` tries (default: 10000)

PYTHON ?=
MACHINE ?=
DEMO_OUT ?= demo-out
PYTEST_ARGS ?=
INPUTS ?= 10000

BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
# Really run: version managers leave shims on the PATH for versions that are not in use.
FITS = -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
CANDIDATES = $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.14 python)

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu fuzz misuse lint bench docs pins clean clean-all

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 \t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: ## set up .venv; nothing to do when it is up to date
	@for python in $(CANDIDATES); do \
		if "$$python" $(FITS) 2>/dev/null; then \
			exec "$$python" tools/setup_env.py $(if $(PYTHON),--python-chosen) $(if $(MACHINE),--machine $(MACHINE)); \
		fi; \
	done; \
	echo "error: $(or $(PYTHON),the PATH) has no Python 3.11 to 3.14: install one, or name one with make PYTHON=/path/to/python" >&2; exit 1

demo: setup ## cache a teacher, distill a student, measure what it forgot
	@$(BIN)/duet-distill demo --out "$(DEMO_OUT)"

test: setup ## run the tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

gpu: setup ## the tests and measurements that need an NVIDIA GPU
	@$(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)
	@$(MAKE) bench

fuzz: setup ## try mutated caches on everything that reads one
	@$(BIN)/python tests/teacher_cache/fuzz --inputs $(INPUTS)

misuse: setup ## try what a tired user types and does on every command
	@$(BIN)/python tests/misuse

lint: setup ## ruff (lint and format) and mypy strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy tools

bench: setup ## run every measurement of benchmarks/
	@for script in benchmarks/*/bench_*.py; do \
		echo "== $$script"; $(BIN)/python "$$script" || exit 1; \
	done

docs: setup ## write docs/api.md and docs/cli.md from docstrings and help texts
	@$(BIN)/python tools/reference_pages.py

pins: ## resolve the dependencies into constraints/ (needs python3.11)
	@python3.11 tools/pin_versions.py

clean: ## remove the demo's output, caches and build leftovers
	@rm -rf demo-out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## clean, and remove .venv too
	@rm -rf .venv
