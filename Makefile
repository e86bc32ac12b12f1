# `make demo` and `make test` do everything on a fresh machine; each creates .venv when it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when first imported, even if the environment says not to: most installed ones never are imported.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
RUN := runs/digits

.PHONY: demo test lint docs notebooks clean
.DELETE_ON_ERROR:

# The library and what it needs.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

# What the tests and linters need beside it.
.venv/ready-test: .venv/ready
	$(PIP) --editable '.[test]'
	touch $@

demo: .venv/ready
	$(BIN)/scoresde train experiment=digits run=$(RUN)
	$(BIN)/scoresde sample run=$(RUN)
	$(BIN)/scoresde bpd run=$(RUN)
	$(BIN)/scoresde report run=$(RUN)

test: .venv/ready-test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: .venv/ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site.
docs: .venv/ready-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The notebooks, run in place.
notebooks: .venv/ready-test
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf .venv build runs dist
