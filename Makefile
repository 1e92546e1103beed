# `make demo` and `make test` set up all they need in .venv: Python 3.11 or newer with pip and venv, and a
# C compiler, are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test types suite bench coverage soak sanitize fuzz mutate clean

demo: .venv/installed
	$(BIN)/simba demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(MAKE) --jobs types suite

types: .venv/installed
	$(BIN)/mypy

suite: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

bench: .venv/installed
	$(BIN)/simba bench --device cpu

# Editable, so that the native kernels stand beside the source; constraints.txt pins what was tested. Two come into folders that
# only their own tests see: mamba-ssm, without its CUDA extension (tests/test_mamba_ssm.py), and the oldest Triton that is
# supported (tests/test_triton.py).
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard simba_compile/kernels/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation --no-deps --upgrade --target .venv/mamba_ssm mamba-ssm
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/triton_oldest triton==3.6.0
	touch $@

coverage: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n auto --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# What takes too long for every push: 10,000 calls, the kernels under sanitizers (gcc), random models, and a
# sample of mutants of the passes and options (docs/testing.md).
soak: .venv/installed
	PYTHONPATH=tests $(BIN)/python tests/test_soak.py 10000

sanitize: .venv/installed
	$(BIN)/python tests/sanitize.py 300

fuzz: .venv/installed
	SIMBA_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_aliasing.py --hypothesis-show-statistics

mutate: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py mutants.jsonl --sample 200

clean:
	rm -rf .venv build *.egg-info simba_compile/kernels/_native*.so
