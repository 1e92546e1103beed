# `make demo` and `make test` set up all they need in .venv: Python 3.10 or newer and pip are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench clean

demo: .venv/installed
	$(BIN)/simba demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: .venv/installed
	$(BIN)/simba bench

# Editable, so that the native kernels stand beside the source; constraints.txt pins what was tested.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard simba_compile/kernels/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info simba_compile/kernels/_native*.so
