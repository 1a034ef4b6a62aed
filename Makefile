# `make demo`: train and judge the whole line. `make test`: what a change needs. `make test-all`: that and the rest.
# `make lint`: ruff. Each makes its environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHONDONTWRITEBYTECODE :=  # compiled modules are kept: tests start many processes, each imports jax

.PHONY: demo test test-all lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.easy_vqa.demo --out demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv

$(VENV)/.demo: setup.py | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[demo]'
	touch $@

# torch first and by pip: it serves parity tests only, and pip's own settings decide where its wheel comes from.
$(VENV)/.dev: setup.py | $(BIN)/uv
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache demo
