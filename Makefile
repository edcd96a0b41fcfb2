# The commands of this project; `make help` lists them.

# The interpreter of .venv: 3.11 or later.
PYTHON ?= python3
# More arguments for pytest, e.g. make test PYTEST_ARGS="-k ssh -x"; -n0 runs them one at a time
PYTEST_ARGS ?=
# How long make soak takes; SOAK_ARGS="--seed S" has the same faults again.
MINUTES ?= 1
SOAK_ARGS ?=
# More arguments for nox, e.g. make matrix MATRIX_ARGS="-k core20 -- -k ssh"
MATRIX_ARGS ?= -s tests

python := .venv/bin/python
# Another PYTHON, or another place of this folder, makes .venv anew.
made := .venv/made-$(subst /,-,$(PYTHON)$(CURDIR))
nox := $(python) -m nox --no-error-on-missing-interpreters

.DEFAULT_GOAL := help
.PHONY: help env host test check format matrix demo docs dist soak bench size clean

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' Makefile | expand -t 10

env: $(made) ## .venv, up to date: this module (editable) and all that tests, checks and demo use

$(made): setup.cfg setup.py requirements-dev.txt demo/requirements.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || tools/prepare_host.sh python3-venv
	$(PYTHON) -m venv --clear .venv
	@$(python) -m pip install -qq --disable-pip-version-check -e . -r requirements-dev.txt
	@touch $@

host:
	@tools/prepare_host.sh

test: host env ## all the tests, with all the set-up they need
	$(python) -m pytest @tests/parallel.txt $(PYTEST_ARGS)

check: env ## format, lint, security, types, imports, known vulnerabilities of what is installed
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	.venv/bin/lint-imports --no-logo --no-cache
	.venv/bin/shellcheck .ci/run $$(git ls-files '*.sh')
	@$(python) tools/audit.py

format: env ## rewrite the sources in the project's format
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

matrix: host env ## the tests on each supported combination of Python, inmanta-core and mitogen
	@$(nox) $(MATRIX_ARGS)

soak: host env ## puts, runs and reads for MINUTES=n (1) while everything around them fails
	@$(python) tools/soak.py --minutes $(MINUTES) $(SOAK_ARGS)

demo: env ## an orchestrator that deploys a small model; KEEP=1 keeps it up until Ctrl-C
	@tools/prepare_host.sh openssh-server openssh-client
	@exec $(python) -m demo $(if $(KEEP),--keep)

docs: env ## the guide, in docs/_build/html, with its links checked
	@$(nox) -s docs

dist: env ## wheel and sdist, in dist/, checked and tried on each supported Python
	@$(nox) -s dist

bench: host env ## this module against the published one, execnet, asyncssh and ssh: docs/benchmarks.md
	@$(nox) -s bench -- $(BENCH_ARGS)

size: ## how many lines of code each part has
	@"$(PYTHON)" tools/code_lines.py

clean: ## remove all that was made here
	rm -rf .venv .venv-* .nox .cache build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
