# The same torch everywhere: a CPU build where that is what pip finds, else the CUDA build.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
PYTHON ?= python3
VENV ?= .venv
# a test file is one process's work from beginning to end
PYTEST_ARGUMENTS ?= -n 2 --dist loadfile
BIN = $(VENV)/bin

.PHONY: quickstart test install check clean

quickstart: $(VENV)/.installed
	$(BIN)/posttrain quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

install: $(VENV)/.installed

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first, so that nothing else chooses its build
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "$(TORCHVISION)" -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "$(TORCHVISION)" -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
