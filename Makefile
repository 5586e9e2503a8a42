# `make demo` and `make test` do all the set-up on a fresh machine; nothing else is needed first.

PYTHON ?= python3
PYTHON_NEWEST ?= python3.13
BIN := .venv/bin
NEWEST := .venv-newest/bin

.PHONY: demo test test-slow test-newest docs format clean

## The main job on the built-in model and chat set, on a CPU.
demo: .venv/installed
	$(BIN)/phi3-jax demo --output out/demo

## Lint, format, types and layering, then every test but the slow ones.
test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

## The tests that need no PyTorch, on the newest Python, JAX and Flax.
test-newest: .venv-newest/installed
	$(NEWEST)/python -m pytest -n 2 --dist worksteal -m "not slow"

## The documentation as a site, in site/; a broken link, anchor or name is an error.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-newest out site

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# PyTorch first and by itself: a resolver that meets it as a dependency may pick a build of several GB.
.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[parity,dev,docs,eval,lm-eval]"
	touch $@

.venv-newest/installed: pyproject.toml
	test -x $(NEWEST)/python || $(PYTHON_NEWEST) -m venv .venv-newest
	$(NEWEST)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev,eval]"
	touch $@
