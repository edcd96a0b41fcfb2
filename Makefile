# The verbs of this project; `make help` lists them.

# The interpreter of .venv: 3.11 or later.
PYTHON ?= python3
# More arguments for pytest, e.g. make test PYTEST_ARGS="-k ssh -x"; -n0 runs them one at a time
PYTEST_ARGS ?=
# How long make soak takes; SOAK_ARGS="--seed S" has the same faults again.
MINUTES ?= 1
SOAK_ARGS ?=
# More arguments for tools/matrix.py, e.g. make matrix MATRIX_ARGS="--row 3.13"
MATRIX_ARGS ?=

python := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help env host test check format matrix demo docs dist soak bench clean

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' Makefile | expand -t 10

env: ## .venv, up to date: this module (editable) and all that tests, checks and demo use
	@tools/make_env.sh .venv "$(PYTHON)" -r requirements-dev.txt

host:
	@tools/prepare_host.sh

test: host env ## all the tests, with all the set-up they need
	$(python) -m pytest @tests/parallel.txt $(PYTEST_ARGS)

check: env ## format, lint, security, types, imports, known vulnerabilities of what is installed
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	.venv/bin/lint-imports --no-logo --no-cache
	@$(python) tools/audit.py

format: env ## rewrite the sources in the project's format
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

matrix: host ## the tests on each supported combination of Python, inmanta-core and mitogen
	@"$(PYTHON)" tools/matrix.py $(MATRIX_ARGS)

soak: host env ## puts, runs and reads for MINUTES=n (1) while everything around them fails
	@$(python) tools/soak.py --minutes $(MINUTES) $(SOAK_ARGS)

demo: env ## an orchestrator that deploys a small model; KEEP=1 leaves it up
	@exec env KEEP="$(KEEP)" $(python) demo/run.py

docs: ## the guide, in docs/_build/html, with its links checked
	@tools/make_env.sh .venv-docs "$(PYTHON)" -r docs/requirements.txt
	@rm -rf docs/_build
	@.venv-docs/bin/python -m sphinx -q -W --keep-going -b linkcheck docs docs/_build/linkcheck
	@.venv-docs/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html

dist: ## wheel and sdist, in dist/, checked and tried on each supported Python
	@"$(PYTHON)" -m tools.dist

bench: host ## this module against the published one, execnet, asyncssh and ssh: docs/benchmarks.md
	@tools/make_env.sh .venv-bench/ours "$(PYTHON)" -r benchmarks/requirements.txt matplotlib
	@.venv-bench/ours/bin/python benchmarks/run.py

clean: ## remove all that was made here
	rm -rf .venv .venv-* .cache build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
