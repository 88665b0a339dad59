# Wraps plain pip; README.md shows the same commands for people without make.
PYTHON ?= python3
BIN := .venv/bin
DEMO := $(BIN)/seqlm

.PHONY: demo test soak lint coverage reference docs clean

demo: .venv/installed
	$(DEMO) train --cell mingru --width 128 --layers 3 --time-limit 60s --run demo --force
	$(DEMO) eval --run demo
	$(DEMO) generate "def " --run demo --chars 400 --seed 1

# worksteal: a worker keeps to neighbouring tests, whose fixtures and compiled loops it then has
test: lint
	$(BIN)/pytest -n auto --dist worksteal

# 40 trainings of two processes, 200 kills at random moments, 2,000 forged files, and a result of
# five minutes once more (it downloads tiny Shakespeare): not part of the tests
soak: .venv/installed
	PYTHONPATH=tests $(BIN)/python tests/soak.py --kills 200
	SEQLM_TEST_FORGED=2000 $(BIN)/pytest tests/test_untrusted.py -k forged_files
	cd "$$(mktemp -d)" && "$(CURDIR)/$(DEMO)" results mingru-5m --run

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# which lines the tests run, in all their processes; compiled loops and kernels are not counted
coverage: .venv/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n auto --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --sort=cover

# pages, schemas and tables that are generated from the code and from measurements
reference: .venv/installed
	PYTHONPATH=. $(BIN)/python docs/reference.py

# the site, into site/; a warning is an error
docs: .venv/installed
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# the marker is touched last, so an installation that failed half-way is made again
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing seqlm and PyTorch into .venv: once, some minutes (up to 3 GB on Linux with pip's default PyTorch)."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv site .pytest_cache .ruff_cache
